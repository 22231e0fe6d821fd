"""Processors and tokenizers with the original's names and interface."""

import threading
from collections.abc import Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import Compose
from transformers import BatchEncoding, CLIPTokenizer

from ..config import UserError, first_line
from ..modalities import Modality, is_source, modality_name
from ..modalities._images import ImageModality, as_tensor
from ..text import bundled_vocabulary, is_clip_tokens
from .checkpoint import checkpoint_tokens, is_training_checkpoint
from .config import CONFIGS, LanguageBindConfig, read_config
from .files import HUB_OPTIONS, find_file, repository

CONTEXT_LENGTH = 77
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
LOCK = threading.RLock()  # a call sets padding and truncation in the tokenizer itself


class LanguageBindTokenizer(CLIPTokenizer):
    """CLIP's tokenizer, from a checkpoint's files, or if there are none, with the vocabulary that open_clip carries."""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # options by name only
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> "LanguageBindTokenizer":
        """Return the tokenizer of a folder, a hub id, or a checkpoint of our training.

        Raises:
            UserError: it does not exist or is damaged, or the text tower is not CLIP's.
        """
        name = repository(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        kwargs.setdefault("model_max_length", CONTEXT_LENGTH)
        if any(find_file(name, file, **hub) for file in TOKENIZER_FILES):
            try:
                return super().from_pretrained(name, *args, **kwargs)
            except Exception as error:  # tokenizers raises its errors as bare Exceptions
                raise UserError(f"the tokenizer's files in {name} cannot be used: {first_line(error)}") from error
        trained = is_training_checkpoint(Path(name) / (hub.get("subfolder") or ""))
        if trained and not is_clip_tokens(checkpoint_tokens(name)):
            raise UserError(f"{name} has another text tower than CLIP's: languagebind.get_tokenizer gives its tokens")
        vocab, merges = bundled_vocabulary()
        options = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
        return cls(vocab=vocab, merges=merges, **options)  # type: ignore[arg-type]  # it takes pairs, too

    def __call__(self, text: Any = None, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        """As in transformers, after repairing broken Unicode like the original. Threads may share a tokenizer.

        Raises:
            TypeError: an input is not a text.
            UserError: the list is empty.
        """
        if isinstance(text, (list, tuple)) and not len(text):
            raise UserError("there are no texts to tokenize")
        with LOCK:
            return super().__call__(_mend(text), _mend(text_pair), *args, **kwargs)

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> list[int]:
        """As in transformers, after the same repair."""
        with LOCK:
            return super().encode(_mend(text), _mend(text_pair), *args, **kwargs)


def _mend(text: Any) -> Any:
    import ftfy

    if text is None or isinstance(text, str):
        return text and ftfy.fix_text(text)
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"a tokenizer takes a text or a list of texts, not {text!r}")
    return type(text)(_mend(t) for t in text)


class Processor:
    """Turns files and texts into a model's inputs.

    Args:
        config: the model's config, `model.config`.
        tokenizer: for texts.

    Attributes:
        transform: a `Compose` from the original's in-memory form to (C, T, H, W), or (C, H, W) without frames. The
            forms are PIL images, (C, T, H, W) clips of 0..255, (waveform, rate), and depth maps in millimetres.
    """

    config_class = LanguageBindConfig

    def __init__(self, config: LanguageBindConfig, tokenizer: Any = None, **kwargs: Any):
        self.config, self.tokenizer = config, tokenizer
        self.modality = config.modality
        self.transform = transform_of(self.modality)

    def image_processor(self, item: Any) -> Tensor:
        """A path, URL, bytes or any in-memory form of the modality -> (C, T, H, W), or (C, H, W) without frames.

        Raises:
            DecodeError: the item cannot be used.
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
        """Return `input_ids` and `attention_mask` of texts, and `pixel_values` of one item or a list of items.

        Raises:
            UserError: there is nothing to process, or `context_length` is too long.
            DecodeError: an item cannot be used.
        """
        if images is None and text is None:
            raise UserError("give texts, images, or both")
        encoding: BatchEncoding | dict[str, Tensor] = {}
        if text is not None:
            longest = self.config.text.max_position_embeddings
            if context_length > longest:
                raise UserError(f"context_length {context_length}: the text tower takes {longest} tokens at most")
            encoding = self.tokenizer(
                text, max_length=context_length, padding="max_length", truncation=True,
                return_tensors=return_tensors, **kwargs,
            )  # fmt: skip
        if images is not None:
            items = images if isinstance(images, (list, tuple)) and not _is_one(images) else [images]
            encoding["pixel_values"] = torch.stack([self.image_processor(item) for item in items])
        return encoding

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchEncoding | dict[str, Tensor]:
        """Return `{"pixel_values": (B, …)}`."""
        return self(images, return_tensors=return_tensors)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "Processor":
        """Return the processor of a checkpoint, with its tokenizer."""
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        config, _ = read_config(name, cls.config_class, **hub)
        return cls(config, LanguageBindTokenizer.from_pretrained(name, **hub))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the config and the tokenizer's files."""
        self.config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def _is_one(value: Sequence[Any]) -> bool:
    """Whether a sequence is one item: (waveform, rate)."""
    return len(value) == 2 and isinstance(value[0], (np.ndarray, Tensor)) and isinstance(value[1], Real)


def transform_of(modality: Modality) -> Compose:
    """Return the original's transform of a modality."""
    kinds = {"video": transform_clip, "depth": transform_millimetres}
    return Compose([partial(kinds.get(modality_name(modality), transform_item), modality)])


def transform_item(modality: Modality, item: Any) -> Tensor:
    """Preprocess any form of an item."""
    return without_frames(modality.preprocess(item))


def transform_clip(modality: ImageModality, clip: Any) -> Tensor:
    """(C, T, H, W) of 0..255 -> (C, T, H, W), with all frames."""
    return modality.fit(torch.as_tensor(clip).transpose(0, 1).float() / 255, None, mode="bilinear")


def transform_millimetres(modality: Modality, depth: Any) -> Tensor:
    """Preprocess a depth map whose floats are millimetres, as OpenCV reads a depth PNG."""
    depth = depth if is_source(depth) else as_tensor(depth)
    if isinstance(depth, Tensor) and depth.is_floating_point():
        depth = depth / 1000
    return without_frames(modality.preprocess(depth))


def without_frames(x: Tensor) -> Tensor:
    """(C, 1, H, W) -> (C, H, W), for the classes without frames."""
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
