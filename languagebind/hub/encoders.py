"""Load encoders of any kind of checkpoint, and encode files, objects in memory and texts into one space."""

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
    compile: bool = False,  # noqa: A002 - as it is called everywhere
    num_frames: int | None = None,
    cache_dir: str | Path | None = None,
) -> "Encoders":
    """Load encoders that share a text tower, one for each modality.

    Args:
        sources: training checkpoints or the folders of runs, folders in the published layout, hub ids, or names of
            `list_models()`; or a mapping from modality to one of these.
        device: where to put the models.
        dtype: dtype of weights and arithmetic (`float16`, `torch.float16`, ...), by default the files' own. Features
            are always float32.
        compile: run the encoders through `torch.compile`.
        num_frames: frames of a clip, if not as in training; temporal embeddings are interpolated. Only for encoders
            with attention over frames.
        cache_dir: where downloads are kept; by default the cache of the Hugging Face hub.

    Raises:
        UserError: a source cannot be used, two have the same modality, or their text towers differ.
    """
    dtype = dtype_of(dtype)
    wanted: list[tuple[str | None, str | Path]] = []
    for source in sources:
        if not isinstance(source, (str, os.PathLike, Mapping)):
            raise UserError(f"load takes paths and hub ids, load('a', 'b'), or one mapping, not {source!r}")
        wanted += source.items() if isinstance(source, Mapping) else [(None, source)]
    encoders: dict[str, tuple[DualEncoder, Modality]] = {}
    for expected, source in wanted:
        first = next(iter(encoders.values()))[0] if encoders else None
        model, modality = load_model(source, "cpu", first, expected, num_frames, cache_dir)
        name = modality_name(modality)
        if name in encoders:
            raise UserError(f"{source} is a second checkpoint for {name}")
        encoders[name] = model, modality
    if not encoders:
        raise UserError("give load() at least one checkpoint")
    for model, _ in encoders.values():  # only now: text towers are compared in their files' dtypes
        model.to(device=device, dtype=dtype)
        if compile:
            model.vision_model.compile()
    return Encoders(encoders)


class Encoders:
    """Encoders of one or more modalities with one text tower, made by `load`."""

    def __init__(self, encoders: dict[str, tuple[DualEncoder, Modality]]):
        self.encoders = encoders

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities that can be encoded, besides text."""
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
        """Return the features (N, D) of a list, `encode(depth=[...])`, or of several lists in a dictionary by name.

        Args:
            batch_size: inputs encoded at once.
            num_workers: threads that read and decode.
            normalize: scale features to unit norm.
            to: return tensors on the model's device, or arrays; always float32.
            truncate_dim: keep only the first dimensions, before normalising.
            progress: show a progress bar.
            inputs: paths, URLs, bytes or in-memory forms (see the modality's class) by modality; texts as `text`.

        Raises:
            DecodeError: an item cannot be used.
            ValueError: no list is given, a modality is not loaded, or an option is out of range.
            TypeError: a single item is given instead of a list.
        """
        if not inputs:
            raise ValueError(f"encode takes lists by modality: {', '.join(self.modalities)} or text")
        at_least(1, batch_size=batch_size, truncate_dim=truncate_dim)
        at_least(0, num_workers=num_workers)
        if to not in ("torch", "numpy"):
            raise ValueError(f"to should be 'torch' or 'numpy', not {to!r}")
        found = {}
        for name, items in inputs.items():
            model = self.model(name)
            if isinstance(items, (str, bytes, os.PathLike)) or not isinstance(items, Iterable):
                raise TypeError(f"encode takes a list: {name}=[...], not one {type(items).__name__}")
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
        """Return the cosines (N, M) of features `a` (N, D) and `b` (M, D).

        Args:
            calibrated: multiply by this modality's logit scale, so that a softmax over texts gives the probabilities
                that the encoder was trained for.
        """
        a, b = (F.normalize(torch.as_tensor(x).float(), dim=-1) for x in (a, b))
        scale = 1.0 if calibrated is None else self.model(calibrated).logit_scale.float().exp()
        return scale * a @ b.to(a.device).T

    def model(self, name: str) -> DualEncoder:
        """Return the model of a modality; for `text`, one of those that share the text tower."""
        if name == TEXT:
            return next(iter(self.encoders.values()))[0]
        if name not in self.encoders:
            hint = ": the original's thermal is infrared here" if name == "thermal" else ""
            raise ValueError(f"no encoder for {name!r} is loaded, only {self.modalities} and text{hint}")
        return self.encoders[name][0]

    def _texts(self, parts: list[list[str]]) -> Iterator[Tensor]:
        """Yield features (B, D), not normalised, float32, for each part."""
        model = self.model(TEXT)
        for part in parts:
            tokens = {key: value.to(model.logit_scale.device) for key, value in model.tokenize(part).items()}
            yield model.project_text(tokens).float()

    def _inputs(self, name: str, parts: list[list[Any]], num_workers: int) -> Iterator[Tensor]:
        """Yield features (B, D), not normalised, float32, for each part; threads read the next one meanwhile."""
        model, modality = self.encoders[name]
        with ThreadPoolExecutor(num_workers) if num_workers else nullcontext() as pool:
            start = map if pool is None else pool.map
            reading: Iterator[Iterable[Tensor]] = (start(modality.preprocess, part) for part in parts)
            for items, _ in pairwise(chain(reading, [()])):  # a pool is already reading the next part
                yield model.project(torch.stack(list(items)).to(model.logit_scale.device)).float()


def load_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    like: DualEncoder | None = None,
    modality: str | None = None,
    num_frames: int | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[DualEncoder, Modality]:
    """Return the model and the modality of one of the sources of `load`, in evaluation mode; arguments as there.

    Args:
        like: a model whose text tower this one shares.
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
        hint = " (the original's thermal)" if modality == "thermal" else ""
        raise UserError(f"{source} is for {modality_name(found)}{hint}, not {modality}")
    return model.to(device), found


def _load_published(source: str | Path, like: DualEncoder | None, **options: Any) -> tuple[DualEncoder, Modality]:
    from .config import read_pretrained  # needs transformers, which our own checkpoints do not

    config, state, _ = read_pretrained(source, **options)
    with torch.device("meta"):
        tower = ClipText(config.text.sizes, Tokenizer(clip_tokens(config.text.max_position_embeddings)))
        projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        text = tower, projection, config.projection_dim
        model = DualEncoder(config.vision.input_shape, config.vision.sizes, text)
    load_strict(model, state, str(source), assign=True)
    if like is not None:
        if not same_text(model, like):
            raise WeightsError(f"{source} has another text tower than those before it: load it separately")
        model.text_model, model.text_projection = like.text_model, like.text_projection
    return model.eval().requires_grad_(False), config.modality
