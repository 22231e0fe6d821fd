"""Processors and tokenizers with the names and interface of the original LanguageBind code."""

import threading
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchEncoding, CLIPTokenizer

from ..clip_text import CONTEXT_LENGTH
from ..config import UserError, first_line
from ..modalities import Modality
from ..modalities._images import MEAN, STD
from ..text import bundled_vocabulary, clip_tokens, is_clip_tokens
from . import transforms
from .checkpoint import checkpoint_tokens, is_training_checkpoint
from .config import CONFIGS, KIND_OF, LanguageBindConfig, LanguageBindTextConfig, modality_of, read_config, subclasses
from .files import HUB_OPTIONS, find_file, pin

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
LOCK = threading.RLock()  # each call changes the tokenizer's padding and truncation


class LanguageBindTokenizer(CLIPTokenizer):
    """CLIP's tokenizer, with the vocabulary of a checkpoint or, by default, of open_clip."""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # options by name only
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> "LanguageBindTokenizer":
        """Return the tokenizer of a folder, a hub id, or a training checkpoint.

        Raises `UserError` if the source does not exist or is damaged, or its text tower is not CLIP's.
        """
        name, hub = pin(pretrained_model_name_or_path, TOKENIZER_FILES, **kwargs)
        options = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
        if any(find_file(name, file, **hub) for file in TOKENIZER_FILES):
            try:
                found = super().from_pretrained(name, *args, **hub, **options)
            except Exception as error:  # tokenizers raises bare Exceptions
                raise UserError(f"cannot read the tokenizer files of {name}: {first_line(error)}") from error
            if found.model_max_length > 1e9:  # the files do not say
                found.model_max_length = CONTEXT_LENGTH
            return found
        encode: Any = clip_tokens(CONTEXT_LENGTH)
        if is_training_checkpoint(name, hub.get("subfolder")) and not is_clip_tokens(encode := checkpoint_tokens(name)):
            raise UserError(f"the text tower of {name} is not CLIP's: use languagebind.get_tokenizer")
        options.setdefault("model_max_length", encode.context_length)
        vocab, merges = bundled_vocabulary()
        return cls(vocab=vocab, merges=merges, **options)  # type: ignore[arg-type]  # it also takes pairs

    def __call__(self, text: Any = None, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Tokenize as transformers does, after repairing broken Unicode as the original code did. Thread-safe."""
        if isinstance(text, (list, tuple)) and not len(text):
            raise UserError("there are no texts to tokenize: the list is empty")
        with LOCK:
            return super().__call__(_mend(text), _mend(text_pair), *args, **kwargs)

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> list[int]:
        """Return token ids as transformers does, after repairing broken Unicode."""
        with LOCK:
            return super().encode(_mend(text), _mend(text_pair), *args, **kwargs)


def _mend(text: Any) -> Any:
    import ftfy

    if text is None or isinstance(text, str):
        return text and ftfy.fix_text(text)
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"pass the tokenizer a text or a list of texts, not {text!r}")
    return type(text)(_mend(t) for t in text)


class Processor:
    """Converts files and texts to model inputs.

    Args:
        config: the config of the model, `model.config`, or any object with a `vision_config`. A later change of
            `vision_config.num_frames` or `vision_config.video_decode_backend` takes effect.
        tokenizer: tokenizer, only needed for texts.

    Attributes:
        transform: the transform of the modality, e.g. `get_video_transform(config)`. It may be replaced.
        image_mean, image_std, size, crop_size: of pictures and videos, as in CLIP's image processor.
    """

    config_class = LanguageBindConfig

    def __init__(self, config: Any, tokenizer: Any = None, **kwargs: Any):
        self.config, self.tokenizer = config, tokenizer
        self.kind = KIND_OF[self.config_class.modality_name]
        self.transform = getattr(transforms, f"get_{self.kind}_transform")(config)
        side = getattr(self.modality, "image_size", None)
        if side is not None:
            self.image_mean, self.image_std = MEAN, STD
            self.size, self.crop_size = {"shortest_edge": side}, {"height": side, "width": side}

    @property
    def modality(self) -> Modality:
        """Return the preprocessing that the config describes now."""
        return modality_of(self.config_class.modality_name, self.config.vision_config)

    def image_processor(self, item: Any, transform: Callable | None = None, **options: Any) -> Any:
        """Preprocess a path, URL, bytes, in-memory object or list of frames to (C, T, H, W), or (C, H, W) for a still.

        `options` are those of `load_and_transform_video`, for videos alone, and by default the config's.
        """
        given = {name: value for name, value in options.items() if value is not None}
        load_and_transform = getattr(transforms, f"load_and_transform_{self.kind}")
        transform = self.transform if transform is None else transform
        return load_and_transform(item, transform, **self._video_options() | given)

    def _video_options(self) -> dict[str, Any]:
        if not hasattr(self.modality, "num_frames"):
            return {}
        backend = getattr(self.config.vision_config, "video_decode_backend", "decord")
        return {"video_decode_backend": backend, "num_frames": self.modality.num_frames}

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        context_length: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchEncoding | dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` of texts, and `pixel_values` of one item or a list of items.

        Texts have 77 tokens by default, or as many as the tokenizer allows if that is less.

        Raises `UserError` without input or if `context_length` is too long, `DecodeError` if an item cannot be decoded.
        """
        if images is None and text is None:
            raise UserError("pass texts, images, or both")
        encoding: BatchEncoding | dict[str, Tensor] = {}
        if text is not None:
            longest = getattr(self.config, "text_config", LanguageBindTextConfig).max_position_embeddings
            context_length = context_length or min(CONTEXT_LENGTH, self.tokenizer.model_max_length)
            if context_length > longest:
                raise UserError(f"context_length {context_length} exceeds the text tower's limit of {longest} tokens")
            options = {"max_length": context_length, "padding": "max_length", "truncation": True, **kwargs}
            encoding = self.tokenizer(text, return_tensors=return_tensors, **options)
        if images is not None:
            items = [images] if self._is_item(images) else images
            inputs = [self.image_processor(item, self.transform, **self._video_options()) for item in items]
            encoding["pixel_values"] = torch.stack([x["video"] if isinstance(x, Mapping) else x for x in inputs])
        return encoding

    def _is_item(self, value: Any) -> bool:
        """Return whether this is one item, such as a (waveform, rate) pair or a clip's pictures, and not a list."""
        if not isinstance(value, (list, tuple)):
            return True
        if hasattr(self.modality, "num_frames"):
            return all(isinstance(x, Image.Image) or len(getattr(x, "shape", ())) == 3 for x in value)
        return len(value) == 2 and isinstance(value[0], (np.ndarray, Tensor)) and isinstance(value[1], Real)

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchEncoding | dict[str, Tensor]:
        """Return a dictionary with the batch `pixel_values` (B, …)."""
        return self(images, return_tensors=return_tensors)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "Processor":
        """Return the processor of a checkpoint, including the tokenizer."""
        name, hub = pin(pretrained_model_name_or_path, **kwargs)
        config, _ = read_config(name, cls.config_class, **hub)
        return cls(config, LanguageBindTokenizer.from_pretrained(name, **hub))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the config and the tokenizer files."""
        self.config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


PROCESSORS = subclasses(Processor, "Processor", config_class=CONFIGS)
TOKENIZERS = subclasses(LanguageBindTokenizer, "Tokenizer")
