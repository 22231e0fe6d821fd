"""A modality turns the content of a file into a tensor. The options are the fields of its class.

To add one, write `modalities/imu.py` with a frozen dataclass `class Imu(Modality)`. Then `--modality imu` exists, its
fields are flags, and training and evaluation need no other change; see `docs/new_modality.md`. A modality does not
import models or other modalities, and it imports its decoders only when it decodes.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ._sources import DecodeError, Source, describe, fetch, is_source, read

LIMITS = ("max_pixels", "max_seconds", "video_backend")  # options that change no input: limits, and the video decoder
READING = ("exif", *LIMITS)  # options that may differ from those of training
UNUSED = ("hflip", "random_crop", "fast_resize", *LIMITS)  # options that do not change the inputs in evaluation

__all__ = ["DecodeError", "Modality", "Source", "describe", "is_source", "modality_class", "modality_name",
           "modality_names", "read"]  # fmt: skip


@dataclass(frozen=True)
class Modality(ABC):
    """Turns the content of a file into a (C, T, H, W) tensor; T is 1 unless the modality has frames.

    This is all that the encoder, the loader and the evaluation know about a modality.
    """

    # In a shard, a sample's member for this modality is the first `<key>.<extension>` that exists, and files are packed
    # under the first extension that fits. Extensions that other modalities share come last: `depth.png` before `png`.
    # `<key>.<k>.<extension>` is frame k. A modality with T > 1 reads all frames, others the caption's or a random one.
    extensions: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = ""  # if it is not that of the file, as in another preprocessing of a modality
    details: ClassVar[Mapping[str, Any]] = {}  # further facts about the preprocessing that a result records

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape (C, T, H, W) of one preprocessed sample, the only shape that the encoder accepts."""

    @abstractmethod
    def decode(self, source: Any) -> Any:
        """Decode a file (path or bytes), or a sequence of files that are frames, into the raw signal.

        Raises `DecodeError` if the file cannot be used; a damaged signal is never returned.
        """

    @abstractmethod
    def from_memory(self, value: Any) -> Any:
        """Turn a PIL image, array, tensor or waveform into the raw signal that `decode` returns.

        Raises `DecodeError` if the value is empty, or this modality does not support its shape or type.
        """

    @abstractmethod
    def transform(self, raw: Any, rng: torch.Generator | None = None) -> Tensor:
        """Turn the raw signal into a float32 tensor (C, T, H, W). Augment it only if a generator is given."""

    def load(self, value: Any) -> Any:
        """Return the raw signal of a path, http(s) address, bytes or in-memory value; for errors see `preprocess`."""
        return self.decode(fetch(value)) if is_source(value) else self.from_memory(value)

    def windows(self, source: Any, seconds: float) -> Iterator[tuple[float | None, float | None, Any]]:
        """Yield the start and the end in seconds and the raw signal of each window of a file.

        Both are None for what is not cut: pictures, and clips of one window (see `spans`). For errors see `decode`.
        """
        yield None, None, self.load(source)

    def picture(self, raw: Any) -> tuple[Tensor, str]:
        """Return a picture of the raw signal, (3, H, W) bytes, and a caption that explains the colours or is empty.

        By default, show the encoder's input (its middle frame) from the minimum (black) to the maximum (white).
        """
        from ._pictures import stretched, to_bytes

        x = self.transform(raw)  # (C, T, H, W)
        shown, low, high = stretched(x[:3, x.shape[1] // 2])
        return to_bytes(shown if len(shown) == 3 else shown[:1]), f"{low:.3g} (black) to {high:.3g} (white)"

    def preprocess(self, value: Any, rng: torch.Generator | None = None) -> Tensor:
        """Return the encoder's input (C, T, H, W) for a path, http(s) address, bytes or in-memory value.

        Without `rng` (evaluation), the result is bitwise the same every time. Raises `DecodeError` if `value` cannot be
        used, and `UserError` if `transform` does not return a tensor of `input_shape`.
        """
        x, shape = self.transform(self.load(value), rng), self.input_shape
        if not isinstance(x, Tensor) or x.ndim != 4 or tuple(x.shape) != shape:
            wanted = "input_shape should be a tuple (C, T, H, W), and transform should return a tensor of that shape"
            raise UserError(f"{type(self).__module__}: {wanted}; they are {shape} and {describe(x)}")
        return x


def modality_names() -> list[str]:
    """List the modalities in this folder, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def modality_class(name: str) -> type[Modality]:
    """Return the class of a modality: `depth` is `Depth` in `depth.py`, `my_package.imu` is `Imu` in that module.

    Raises `UserError` if there is no such modality, or its module lacks a usable class.
    """
    folder, _, short = name.rpartition(".")
    if bool(folder) == (short in modality_names()):
        known = ", ".join(modality_names())
        raise UserError(f"unknown modality {name!r}; choose from {known}, or name a module as in my_package.imu")
    path = f"{folder or __name__}.{short}"
    try:
        module = importlib.import_module(path)
    except (ModuleNotFoundError, TypeError) as error:  # TypeError: a dataclass that is not frozen
        raise UserError(f"cannot import {path}: {error}; see docs/new_modality.md") from error
    wanted, where = short.title().replace("_", ""), module.__file__
    kind: Any = getattr(module, wanted, None)
    if not (isinstance(kind, type) and issubclass(kind, Modality) and "__dataclass_fields__" in vars(kind)):
        raise UserError(f"{where} should define class {wanted}(Modality), spelled so, with @dataclass(frozen=True)")
    usable = isinstance(kind.extensions, tuple) and kind.extensions and not kind.extensions[0].startswith(".")
    if lacking := [*sorted(kind.__abstractmethods__), *([] if usable else [f"extensions = ('{short}.npy',)"])]:
        raise UserError(f"{where} should define {', '.join(lacking)} in class {wanted}")
    return kind


def modality_name(modality: Modality) -> str:
    """Return a modality's name on the command line, which is its file name unless its class has another."""
    return modality.name or type(modality).__module__.rpartition(".")[2]


def with_options(modality: Modality, options: Mapping[str, Any]) -> Modality:
    """Return the modality with the values of those `options` that it has."""
    return replace(modality, **{name: value for name, value in options.items() if hasattr(modality, name)})


def spans(length: float, window: float) -> list[tuple[float | None, float | None]]:
    """Return the start and the end of each window of a clip in seconds, or one (None, None) if it is not cut.

    What remains at the end is a window if it is at least half of one, or else joins the last. `window` 0 cuts nothing.
    """
    count = int(length / window + 0.5) if window else 1
    if count < 2:
        return [(None, None)]
    return [(i * window, length if i == count - 1 else (i + 1) * window) for i in range(count)]


def check_options(options: Any, *positive: str) -> None:
    """Raise `UserError` if a field in `positive` is not above 0, or a `Literal` field has an unknown value."""
    for name, kind in get_type_hints(type(options)).items():
        value, choices = getattr(options, name), get_args(kind) if get_origin(kind) is Literal else ()
        if (name in positive and not value > 0) or (choices and value not in choices):
            advice = f"choose from {', '.join(choices)}" if choices else "set it above 0"
            raise UserError(f"--{name.replace('_', '-')} is {value!r}; {advice}")


def to_tensor(array: np.ndarray | Tensor) -> Tensor:
    """Copy a NumPy array of any byte order to a tensor, or raise `DecodeError`. Return tensors unchanged."""
    if isinstance(array, Tensor):
        return array
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise DecodeError(array, f"arrays of {array.dtype} are not supported") from error
