"""Load encoders from any checkpoint, and encode files, in-memory objects and texts into one space."""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..config import UserError, at_least
from ..modalities import Modality, modality_name
from ..model import DualEncoder, same_text
from ..text import ClipText, Tokenizer, clip_tokens
from ..weights import WeightsError, dtype_of, load_strict
from .checkpoint import is_training_checkpoint, load_checkpoint

TEXT = "text"


def load(
    *sources: str | Path | Mapping[str, str | Path],
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    compile: bool = False,  # noqa: A002 - the usual name
    num_frames: int | None = None,
    cache_dir: str | Path | None = None,
) -> "Encoders":
    """Load encoders that share a text tower, one per modality.

    Args:
        sources: training checkpoints, folders of runs, folders in the published layout, hub ids, or names from
            `list_models()`; or a mapping from modalities to such sources.
        device: device of the models.
        dtype: dtype of weights and computation (`float16`, `torch.float16`, ...); by default the dtype of the files.
            Features are always float32.
        compile: compile the encoders with `torch.compile`.
        num_frames: frames per clip, for encoders with temporal attention; by default as in training, otherwise
            temporal embeddings are interpolated.
        cache_dir: folder for downloads; by default the cache of the Hugging Face hub.

    Raises:
        UserError: a source cannot be used, two have the same modality, or their text towers differ.
    """
    dtype = dtype_of(dtype)
    wanted: list[tuple[str | None, str | Path]] = []
    for source in sources:
        if not isinstance(source, (str, os.PathLike, Mapping)):
            raise UserError(f"pass load() paths or hub ids, as in load('a', 'b'), or one mapping, not {source!r}")
        wanted += source.items() if isinstance(source, Mapping) else [(None, source)]
    encoders: dict[str, tuple[DualEncoder, Modality]] = {}
    for expected, source in wanted:
        first = next(iter(encoders.values()))[0] if encoders else None
        model, modality = load_model(source, "cpu", first, expected, num_frames, cache_dir)
        name = modality_name(modality)
        if name in encoders:
            raise UserError(f"{source} is a second checkpoint for {name}: pass load() one checkpoint per modality")
        encoders[name] = model, modality
    if not encoders:
        raise UserError("pass load() at least one checkpoint")
    for model, _ in encoders.values():  # only now: text towers are compared in the dtypes of the files
        model.to(device=device, dtype=dtype)
        if compile:
            model.vision_model.compile()
    return Encoders(encoders)


class Encoders:
    """Encoders of one or more modalities with a shared text tower; `load` returns them."""

    def __init__(self, encoders: dict[str, tuple[DualEncoder, Modality]]):
        self.encoders = encoders

    @property
    def modalities(self) -> list[str]:
        """Return the names of the loaded modalities, without text."""
        return sorted(self.encoders)

    @torch.no_grad()
    def encode(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        normalize: bool = True,
        to: Literal["torch", "numpy"] = "torch",
        truncate_dim: int | None = None,
        progress: bool = False,
        **inputs: Iterable[Any],
    ) -> Tensor | np.ndarray | dict[str, Tensor | np.ndarray]:
        """Return features (N, D) for one list, as in `encode(depth=[...])`, or a dictionary by modality for several.

        Args:
            batch_size: inputs per batch.
            num_workers: threads that read and decode; 0 uses the calling thread.
            normalize: scale features to unit norm.
            to: type of the features: tensors on the model's device, or arrays. Both are float32.
            truncate_dim: number of leading dimensions to keep, before normalisation.
            progress: show a progress bar.
            inputs: a list of paths, URLs, bytes or in-memory objects per modality (see its class); `text` for texts.

        Raises:
            DecodeError: an item cannot be decoded.
            ValueError: no list is given, a modality is not loaded, or an option is out of range.
            TypeError: a single item is given instead of a list.
        """
        if not inputs:
            raise ValueError(f"pass encode() one list per modality: {', '.join(self.modalities)} or text")
        at_least(1, batch_size=batch_size, truncate_dim=truncate_dim)
        at_least(0, num_workers=num_workers)
        if to not in ("torch", "numpy"):
            raise ValueError(f"to should be 'torch' or 'numpy', not {to!r}")
        found = {}
        for name, items in inputs.items():
            model = self.model(name)
            if isinstance(items, (str, bytes, os.PathLike)) or not isinstance(items, Iterable):
                raise TypeError(f"pass encode() a list, {name}=[...], not a single {type(items).__name__}")
            items = list(items)
            parts = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
            batches = self._texts(parts) if name == TEXT else self._inputs(name, parts, num_workers)
            shown = tqdm(batches, total=len(parts), desc=name, unit="batch", disable=not progress)
            empty = torch.empty(0, model.embed_dim, device=model.logit_scale.device)
            x = torch.cat([empty, *shown])[:, :truncate_dim]
            x = F.normalize(x, dim=-1) if normalize else x
            found[name] = x.cpu().numpy() if to == "numpy" else x
        return found if len(found) > 1 else next(iter(found.values()))

    def similarity(self, a: Tensor | np.ndarray, b: Tensor | np.ndarray, calibrated: str | None = None) -> Tensor:
        """Return the cosine similarities (N, M) of features `a` (N, D) and `b` (M, D).

        Args:
            calibrated: the modality whose logit scale multiplies the similarities; a softmax over texts then gives
                the probabilities that the encoder was trained to predict.
        """
        a, b = (F.normalize(torch.as_tensor(x).float(), dim=-1) for x in (a, b))
        scale = 1.0 if calibrated is None else self.model(calibrated).logit_scale.float().exp()
        return scale * a @ b.to(a.device).T

    def model(self, name: str) -> DualEncoder:
        """Return the model of a modality; for `text`, any model, since all share the text tower."""
        if name == TEXT:
            return next(iter(self.encoders.values()))[0]
        if name not in self.encoders:
            hint = ": use 'infrared' for thermal images" if name == "thermal" else ""
            raise ValueError(f"no encoder for {name!r} is loaded, only {self.modalities} and text{hint}")
        return self.encoders[name][0]

    def _texts(self, parts: list[list[str]]) -> Iterator[Tensor]:
        """Yield unnormalised float32 features (B, D) of each part."""
        model = self.model(TEXT)
        for part in parts:
            tokens = {key: value.to(model.logit_scale.device) for key, value in model.tokenize(part).items()}
            yield model.project_text(tokens).float()

    def _inputs(self, name: str, parts: list[list[Any]], num_workers: int) -> Iterator[Tensor]:
        """Yield unnormalised float32 features (B, D) of each part, while threads read the next part."""
        model, modality = self.encoders[name]
        with ThreadPoolExecutor(num_workers) if num_workers else nullcontext() as pool:
            start = map if pool is None else pool.map
            reading: Iterator[Iterable[Tensor]] = (start(modality.preprocess, part) for part in parts)
            for items, _ in pairwise(chain(reading, [()])):  # the pool already reads the next part
                yield model.project(torch.stack(list(items)).to(model.logit_scale.device)).float()


def load_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    like: DualEncoder | None = None,
    modality: str | None = None,
    num_frames: int | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[DualEncoder, Modality]:
    """Return the model, in evaluation mode, and the modality of one source; for other arguments see `load`.

    Args:
        like: a loaded model with the same text tower; the new model shares that tower.
        modality: the expected modality.

    Raises:
        UserError: the checkpoint cannot be used, or is for another modality.
        WeightsError: the weights do not fit, or the text tower differs from that of `like`.
    """
    if is_training_checkpoint(source):
        model, found = load_checkpoint(source, device, like, num_frames)
    else:
        model, found = _load_published(source, like, num_frames=num_frames, cache_dir=cache_dir)
    if modality not in (None, modality_name(found)):
        hint = " (called thermal in the original code)" if modality == "thermal" else ""
        raise UserError(f"{source} is for {modality_name(found)}{hint}, not {modality}")
    return model.to(device), found


def _load_published(source: str | Path, like: DualEncoder | None, **options: Any) -> tuple[DualEncoder, Modality]:
    from .config import read_pretrained  # needs transformers, unlike our own checkpoints

    config, state, _ = read_pretrained(source, **options)
    with torch.device("meta"):
        tower = ClipText(config.text.sizes, Tokenizer(clip_tokens(config.text.max_position_embeddings)))
        projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        text = tower, projection, config.projection_dim
        model = DualEncoder(config.vision.input_shape, config.vision.sizes, text)
    load_strict(model, state, str(source), assign=True)
    if like is not None:
        if not same_text(model, like):
            raise WeightsError(f"the text tower of {source} differs from the one loaded before: load it separately")
        model.text_model, model.text_projection = like.text_model, like.text_projection
    return model.eval().requires_grad_(False), config.modality
