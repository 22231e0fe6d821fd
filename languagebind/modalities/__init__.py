"""A modality is a function from file contents to a tensor, plus its options.

To add one, put `modalities/imu.py` with a frozen dataclass `class Imu(Modality)` here: `--modality imu` then
exists, its fields are flags, and training and evaluation need no other change. A modality imports no model, no
other modality, and its decoders only when it decodes.
"""

import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

Source = str | os.PathLike | bytes


class DecodeError(ValueError):
    """A file that cannot be used: unreadable, empty, cut off, of a wrong kind, or larger than the limits allow."""

    def __init__(self, source: Source | Sequence[Source], reason: str):
        super().__init__(f"{describe(source)}: {reason}")
        self.reason = reason
        self.source = describe(source)

    def __reduce__(self):
        return type(self), (self.source, self.reason)  # by default, the message alone


@dataclass(frozen=True)
class Modality(ABC):
    """Turns file contents into a (C, T, H, W) tensor; T is 1 unless the modality has frames.

    This is all that the encoder, the loader and the evaluation know about a modality.
    """

    # The members of a shard that hold this modality: `<key>.<extension>`, the first one present is taken. A member
    # `<key>.<k>.<extension>` is frame k: a modality with T > 1 is given all of them, another one the frame drawn.
    extensions: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one preprocessed sample; the encoder is built for exactly this."""

    @abstractmethod
    def decode(self, source: Source | Sequence[Source]) -> Any:
        """File contents (path or bytes; a sequence of them where frames are files) to the raw signal.

        Raises:
            DecodeError: the contents cannot be used; junk is never returned.
        """

    @abstractmethod
    def from_memory(self, value: Any) -> Any:
        """A PIL image, array, tensor or waveform to the raw signal that `decode` gives.

        Raises:
            DecodeError: the value is empty or has a shape or type that this modality cannot take.
        """

    @abstractmethod
    def transform(self, raw: Any, rng: torch.Generator | None = None) -> Tensor:
        """The raw signal to (C, T, H, W), float32. Augments only when given the generator to draw from."""

    def picture(self, raw: Any) -> tuple[Tensor, str]:
        """The raw signal for people to look at: (3, H, W) bytes, and what its colours stand for ("" if it is plain).

        Unless a modality draws its own, this is what the encoder is given, of several frames the middle one, with the
        least value in black and the greatest in white.
        """
        from ._pictures import stretched, to_bytes

        x = self.transform(raw)  # (C, T, H, W)
        shown, low, high = stretched(x[:3, x.shape[1] // 2])
        return to_bytes(shown if len(shown) == 3 else shown[:1]), f"{low:.3g} (black) to {high:.3g} (white)"

    def preprocess(self, value: Any, rng: torch.Generator | None = None) -> Tensor:
        """A path, bytes or in-memory form to (C, T, H, W). Without `rng` (evaluation), the same bits every time.

        Raises:
            DecodeError: `value` cannot be used.
        """
        raw = self.decode(value) if is_source(value) else self.from_memory(value)
        x = self.transform(raw, rng)
        if tuple(x.shape) != self.input_shape:
            raise RuntimeError(f"{type(self).__name__}: made {tuple(x.shape)}, declares {self.input_shape}")
        return x


def modality_names() -> list[str]:
    """Every modality in this folder, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def modality_class(name: str) -> type[Modality]:
    """The class of a modality: `depth` is `Depth` in `depth.py`.

    Raises:
        ValueError: there is no such file.
    """
    if name not in modality_names():
        raise ValueError(f"unknown modality {name!r}, expected one of {modality_names()}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name.title().replace("_", ""))


def modality_name(modality: Modality) -> str:
    """The file name of a modality, the name it has on the command line."""
    return type(modality).__module__.rpartition(".")[2]


def is_source(value: Any) -> bool:
    """Whether `value` stands for a file, or for files that are frames, rather than for decoded data."""
    if isinstance(value, (str, os.PathLike, bytes)):
        return True
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(v, (str, os.PathLike, bytes)) for v in value)
    )


def read(source: Source) -> bytes:
    """The bytes of a path, or the bytes themselves.

    Raises:
        DecodeError: there is no such file, it cannot be read, or it is empty.
    """
    if isinstance(source, bytes):
        data = source
    else:
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise DecodeError(source, error.strerror or str(error)) from error
    if not data:
        raise DecodeError(source, "the file is empty")
    return data


def describe(source: Source | Sequence[Source]) -> str:
    """How an error names a source: its path, or how many bytes it was."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, (list, tuple)):
        return f"[{describe(source[0])}, ... {len(source)} frames]" if source else "[]"
    return os.fspath(source)
