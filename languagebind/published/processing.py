"""The original's processors and tokenizers."""

from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import Compose
from transformers import BatchEncoding, CLIPTokenizer

from ..modalities import Modality, modality_name
from ..text import bundled_vocabulary
from .config import CONFIGS, LanguageBindConfig
from .files import HUB_OPTIONS, find_file, repository

CONTEXT_LENGTH = 77
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


class LanguageBindTokenizer(CLIPTokenizer):
    """CLIP's tokenizer, of a checkpoint's files, or where it has none, of the vocabulary that comes with open_clip."""

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> "LanguageBindTokenizer":
        name, hub = repository(name), {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        kwargs.setdefault("model_max_length", CONTEXT_LENGTH)
        if any(find_file(name, file, **hub) for file in TOKENIZER_FILES):
            return super().from_pretrained(name, *args, **kwargs)
        vocab, merges = bundled_vocabulary()
        return cls(vocab=vocab, merges=merges, **{k: v for k, v in kwargs.items() if k not in HUB_OPTIONS})

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        """As in transformers; broken Unicode is mended first, as the original's tokenizer did."""
        return super().__call__(_mend(text), *args, **kwargs)


def _mend(text: Any) -> Any:
    import ftfy

    return ftfy.fix_text(text) if isinstance(text, str) else [_mend(t) for t in text] if text is not None else None


class Processor:
    """Files and texts to what a model takes.

    Args:
        config: the model's config, `model.config`.
        tokenizer: for texts.

    Attributes:
        transform: a `Compose` from the in-memory form that the original's took to (C, T, H, W), or (C, H, W) without
            frames: PIL images, (C, T, H, W) clips of 0..255, (waveform, rate), and depth maps in millimetres.
    """

    config_class = LanguageBindConfig

    def __init__(self, config: LanguageBindConfig, tokenizer: Any = None, **kwargs: Any):
        self.config, self.tokenizer = config, tokenizer
        self.modality = config.modality
        self.transform = transform_of(self.modality)

    def image_processor(self, item: Any) -> Tensor:
        """A path, bytes or an in-memory form, of any of the modality's kinds, to what `transform` gives.

        Raises:
            DecodeError: it cannot be used.
        """
        return without_frames(self.modality.preprocess(item))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        context_length: int = CONTEXT_LENGTH,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchEncoding | dict[str, Tensor]:
        """`input_ids` and `attention_mask` of texts, `pixel_values` of one item or a list of them."""
        if images is None and text is None:
            raise ValueError("give texts, images, or both")
        encoding = None
        if text is not None:
            if self.tokenizer is None:
                raise ValueError("this processor was made without a tokenizer")
            encoding = self.tokenizer(
                text, max_length=context_length, padding="max_length", truncation=True,
                return_tensors=return_tensors, **kwargs,
            )  # fmt: skip
        if images is None:
            return encoding
        items = images if isinstance(images, (list, tuple)) and not _is_one(images) else [images]
        pixel_values = torch.stack([self.image_processor(item) for item in items])
        if encoding is None:
            return {"pixel_values": pixel_values}
        encoding["pixel_values"] = pixel_values
        return encoding

    def preprocess(self, images: Any, return_tensors: str | None = None) -> dict[str, Tensor]:
        """`{"pixel_values": (B, …)}`."""
        return self(images, return_tensors=return_tensors)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> "Processor":
        """The processor of a checkpoint, with its tokenizer."""
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        config = cls.config_class.from_pretrained(name, **hub)
        return cls(config, LanguageBindTokenizer.from_pretrained(name, **hub))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the config and the tokenizer's files, which are all that it was made of."""
        self.config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def _is_one(value: Sequence[Any]) -> bool:
    """Whether a sequence is one item: (waveform, rate)."""
    return len(value) == 2 and isinstance(value[0], (np.ndarray, Tensor)) and isinstance(value[1], Integral)


def transform_of(modality: Modality) -> Compose:
    """The original's transform of a modality."""
    kinds = {"video": clip_transform, "depth": millimetre_transform}
    step: Callable[[Any], Tensor] = kinds.get(modality_name(modality), modality_transform)(modality)
    return Compose([step])


def modality_transform(modality: Modality) -> Callable[[Any], Tensor]:
    return lambda item: without_frames(modality.preprocess(item))


def clip_transform(modality: Any) -> Callable[[Tensor], Tensor]:
    """(C, T, H, W) of 0..255, all of its frames."""
    return lambda clip: modality.fit(torch.as_tensor(clip).transpose(0, 1).float() / 255, None, mode="bilinear")


def millimetre_transform(modality: Any) -> Callable[[Any], Tensor]:
    """Floats are millimetres, as OpenCV's reading of a depth PNG gives them."""

    def transform(depth: Any) -> Tensor:
        depth = torch.from_numpy(depth) if isinstance(depth, np.ndarray) else depth
        if isinstance(depth, Tensor) and depth.is_floating_point():
            depth = depth / 1000
        return without_frames(modality.preprocess(depth))

    return transform


def without_frames(x: Tensor) -> Tensor:
    """(C, 1, H, W) to (C, H, W), as the classes without frames take it."""
    return x[:, 0] if x.shape[1] == 1 else x


class LanguageBindVideoProcessor(Processor):
    config_class = CONFIGS["video"]


class LanguageBindAudioProcessor(Processor):
    config_class = CONFIGS["audio"]


class LanguageBindDepthProcessor(Processor):
    config_class = CONFIGS["depth"]


class LanguageBindThermalProcessor(Processor):
    config_class = CONFIGS["thermal"]


class LanguageBindImageProcessor(Processor):
    config_class = CONFIGS["image"]


class LanguageBindVideoTokenizer(LanguageBindTokenizer):
    pass


class LanguageBindAudioTokenizer(LanguageBindTokenizer):
    pass


class LanguageBindDepthTokenizer(LanguageBindTokenizer):
    pass


class LanguageBindThermalTokenizer(LanguageBindTokenizer):
    pass


class LanguageBindImageTokenizer(LanguageBindTokenizer):
    pass


PROCESSORS = {
    "video": LanguageBindVideoProcessor,
    "audio": LanguageBindAudioProcessor,
    "depth": LanguageBindDepthProcessor,
    "thermal": LanguageBindThermalProcessor,
    "image": LanguageBindImageProcessor,
}
TOKENIZERS = {
    "video": LanguageBindVideoTokenizer,
    "audio": LanguageBindAudioTokenizer,
    "depth": LanguageBindDepthTokenizer,
    "thermal": LanguageBindThermalTokenizer,
    "image": LanguageBindImageTokenizer,
}
