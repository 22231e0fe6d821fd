"""A modality is a function from the content of a file to a tensor, plus its options.

To add one, put `modalities/imu.py` with a frozen dataclass `class Imu(Modality)` here: `--modality imu` then
exists, its fields are flags, and training and evaluation need no other change. A modality imports no model, no
other modality, and its decoders only when it decodes.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ._sources import DecodeError, Source, describe, fetch, is_source, read

__all__ = ["DecodeError", "Modality", "Source", "describe", "is_source", "modality_class", "modality_name",
           "modality_names", "read"]  # fmt: skip


@dataclass(frozen=True)
class Modality(ABC):
    """Turns the content of a file into a (C, T, H, W) tensor; T is 1 unless the modality has frames.

    This is all that the encoder, the loader and the evaluation know about a modality.
    """

    # The member of a shard with this modality is the first `<key>.<extension>` that exists. A member
    # `<key>.<k>.<extension>` is frame k: a modality with T > 1 takes all frames, others the caption's or a random one.
    extensions: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one preprocessed sample; the encoder is built for exactly this."""

    @abstractmethod
    def decode(self, source: Any) -> Any:
        """Decode a file (path or bytes; a sequence of them if frames are files) into the raw signal.

        Raises:
            DecodeError: the file cannot be used; a damaged signal is never returned.
        """

    @abstractmethod
    def from_memory(self, value: Any) -> Any:
        """Turn a PIL image, array, tensor or waveform into the raw signal that `decode` returns.

        Raises:
            DecodeError: the value is empty, or has a shape or type that this modality cannot take.
        """

    @abstractmethod
    def transform(self, raw: Any, rng: torch.Generator | None = None) -> Tensor:
        """Turn the raw signal into (C, T, H, W), float32. Augments only if given a generator to draw from."""

    def picture(self, raw: Any) -> tuple[Tensor, str]:
        """Draw the raw signal for people: return (3, H, W) bytes, and what the colours mean ("" if that is obvious).

        By default, draw the encoder's input (the middle one of several frames) from its least value (black) to its
        greatest (white).
        """
        from ._pictures import stretched, to_bytes

        x = self.transform(raw)  # (C, T, H, W)
        shown, low, high = stretched(x[:3, x.shape[1] // 2])
        return to_bytes(shown if len(shown) == 3 else shown[:1]), f"{low:.3g} (black) to {high:.3g} (white)"

    def preprocess(self, value: Any, rng: torch.Generator | None = None) -> Tensor:
        """A path, http(s) address, bytes or in-memory form -> (C, T, H, W).

        Without `rng` (evaluation), the result is the same to the bit every time.

        Raises:
            DecodeError: `value` cannot be used.
        """
        raw = self.decode(fetch(value)) if is_source(value) else self.from_memory(value)
        x = self.transform(raw, rng)
        if tuple(x.shape) != self.input_shape:
            raise RuntimeError(f"{type(self).__name__} made {tuple(x.shape)}, but declares {self.input_shape}")
        return x


def modality_names() -> list[str]:
    """List the modalities in this folder, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def modality_class(name: str) -> type[Modality]:
    """Return the class of a modality: `depth` is `Depth` in `depth.py`.

    Raises:
        UserError: there is no such file.
    """
    if name not in modality_names():
        raise UserError(f"unknown modality {name!r}, expected one of {modality_names()}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name.title().replace("_", ""))


def modality_name(modality: Modality) -> str:
    """Return the file name of a modality, which is its name on the command line."""
    return type(modality).__module__.rpartition(".")[2]


def check_options(options: Any, *positive: str) -> None:
    """Raise `UserError` if one of the named fields is not above 0, or a `Literal` field has an unknown value."""
    for name, kind in get_type_hints(type(options)).items():
        value, choices = getattr(options, name), get_args(kind) if get_origin(kind) is Literal else ()
        if (name in positive and not value > 0) or (choices and value not in choices):
            advice = f"choose from {', '.join(choices)}" if choices else "set it above 0"
            raise UserError(f"--{name.replace('_', '-')} is {value!r}, {advice}")


def to_tensor(array: np.ndarray | Tensor) -> Tensor:
    """Copy a numpy array of any byte order into a tensor, or raise `DecodeError`; return a tensor as it is."""
    if isinstance(array, Tensor):
        return array
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise DecodeError(array, f"cannot use an array of {array.dtype}") from error
