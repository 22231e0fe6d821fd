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
from .config import CONFIGS, LanguageBindConfig, read_config, subclasses
from .files import HUB_OPTIONS, find_file, repository

CONTEXT_LENGTH = 77
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
LOCK = threading.RLock()  # each call changes the padding and truncation of the tokenizer


class LanguageBindTokenizer(CLIPTokenizer):
    """CLIP's tokenizer, from a checkpoint's files; without them, with the vocabulary that open_clip carries."""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # options by name only
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> "LanguageBindTokenizer":
        """Return the tokenizer of a folder, a hub id, or a training checkpoint.

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
        if is_training_checkpoint(name, hub.get("subfolder")) and not is_clip_tokens(checkpoint_tokens(name)):
            raise UserError(f"{name} has another text tower than CLIP's: languagebind.get_tokenizer gives its tokens")
        vocab, merges = bundled_vocabulary()
        options = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
        return cls(vocab=vocab, merges=merges, **options)  # type: ignore[arg-type]  # it takes pairs, too

    def __call__(self, text: Any = None, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Tokenize as transformers does, after repairing broken Unicode as the original did. Threads may share it.

        Raises:
            TypeError: an input is not a text.
            UserError: the list is empty.
        """
        if isinstance(text, (list, tuple)) and not len(text):
            raise UserError("there are no texts to tokenize")
        with LOCK:
            return super().__call__(_mend(text), _mend(text_pair), *args, **kwargs)

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> list[int]:
        """Tokenize as transformers does, after the same repair."""
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
    """Turns files and texts into the inputs of a model.

    Args:
        config: the model's config, `model.config`.
        tokenizer: needed for texts only.

    Attributes:
        transform: a `Compose` from the original's in-memory form to (C, T, H, W), or (C, H, W) without frames. The
            forms are PIL images, (C, T, H, W) clips of 0..255, (waveform, rate), and depth maps in millimetres.
    """

    config_class = LanguageBindConfig

    def __init__(self, config: LanguageBindConfig, tokenizer: Any = None, **kwargs: Any):
        self.config, self.tokenizer = config, tokenizer
        self.modality = config.modality
        transforms = {"video": transform_clip, "depth": transform_millimetres}
        self.transform = Compose([partial(transforms.get(modality_name(self.modality), preprocess), self.modality)])

    def image_processor(self, item: Any) -> Tensor:
        """Preprocess a path, URL, bytes or any in-memory form to (C, T, H, W), or (C, H, W) without frames."""
        return preprocess(self.modality, item)

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
            options = {"max_length": context_length, "padding": "max_length", "truncation": True, **kwargs}
            encoding = self.tokenizer(text, return_tensors=return_tensors, **options)
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
    """Tell whether a sequence is one item: (waveform, rate)."""
    return len(value) == 2 and isinstance(value[0], (np.ndarray, Tensor)) and isinstance(value[1], Real)


def preprocess(modality: Modality, item: Any) -> Tensor:
    """Preprocess any form of an item to (C, T, H, W), or (C, H, W) without frames."""
    x = modality.preprocess(item)
    return x[:, 0] if x.shape[1] == 1 else x


def transform_clip(modality: ImageModality, clip: Any) -> Tensor:
    """Preprocess a clip (C, T, H, W) of 0..255 to (C, T, H, W), with all its frames."""
    return modality.fit(torch.as_tensor(clip).transpose(0, 1).float() / 255, None, mode="bilinear")


def transform_millimetres(modality: Modality, depth: Any) -> Tensor:
    """Preprocess a depth map whose floats are millimetres, as OpenCV reads a depth PNG."""
    depth = depth if is_source(depth) else as_tensor(depth)
    if isinstance(depth, Tensor) and depth.is_floating_point():
        depth = depth / 1000
    return preprocess(modality, depth)


PROCESSORS = subclasses(Processor, "Processor", config_class=CONFIGS)
TOKENIZERS = subclasses(LanguageBindTokenizer, "Tokenizer")
