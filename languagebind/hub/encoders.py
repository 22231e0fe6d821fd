"""Encode files, or what is in memory, of any modality, and texts, into one space."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..config import UserError
from ..modalities import Modality, modality_name
from ..modalities._fetch import fetch
from ..model import DualEncoder
from ..weights import dtype_of
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
    """Load encoders, one a modality, that share a text tower.

    Args:
        sources: training checkpoints or the folders of runs, folders in the published layout, hub ids, or names of
            `list_models()`; or a mapping from modality to one of these.
        device: where the models go.
        dtype: of weights and arithmetic (`float16` or `torch.float16`, ...); by default that of the files. Features
            are float32 all the same.
        compile: run the encoders through `torch.compile`.
        num_frames: of clips, in place of what the encoder was trained with; temporal embeddings are interpolated.
            For encoders with attention over frames alone.
        cache_dir: where downloads are kept; by default where the Hugging Face hub keeps them.

    Raises:
        UserError: a source cannot be used, two are of one modality, or their text towers do not go together.
    """
    dtype, wanted = dtype_of(dtype), []
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
    for model, _ in encoders.values():  # only now: the text towers were compared as they are in the files
        model.to(device=device, dtype=dtype)
        if compile:
            model.vision_model.compile()
    return Encoders(encoders)


class Encoders:
    """Encoders of one or more modalities around one text tower; `load` makes them."""

    def __init__(self, encoders: dict[str, tuple[DualEncoder, Modality]]):
        self.encoders = encoders

    @property
    def modalities(self) -> list[str]:
        """Those that can be encoded, beside text."""
        return sorted(self.encoders)

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
        """Features (N, D) of a list: `encode(depth=[...])`, `encode(text=[...])`. Of several lists, by their names.

        Args:
            batch_size: inputs encoded at once.
            num_workers: threads that read and decode.
            normalize: give unit norm; otherwise what the projection gives.
            to: tensors on the model's device, or arrays; float32 either way.
            truncate_dim: keep the first so many dimensions, before normalising.
            progress: show a bar.
            inputs: by modality, paths, URLs, bytes or in-memory forms (its class says which); texts under `text`.

        Raises:
            DecodeError: an item cannot be used.
            ValueError: no list, a modality that is not loaded, or an option out of its range.
            TypeError: one item in place of a list, or a text that is none.
        """
        if not inputs:
            raise ValueError(f"encode takes lists by modality: {', '.join(self.modalities)} or text")
        _check_count(1, batch_size=batch_size, truncate_dim=1 if truncate_dim is None else truncate_dim)
        _check_count(0, num_workers=num_workers)
        if to not in ("torch", "numpy"):
            raise ValueError(f"to should be 'torch' or 'numpy', not {to!r}")
        found = {}
        for name, items in inputs.items():
            items = self._checked(name, items)
            batches = self._features(name, items, batch_size, num_workers)
            if progress:
                batches = tqdm(batches, total=-(-len(items) // batch_size), desc=name, unit="batch")
            model = self._model(name)
            empty = torch.empty(0, model.embed_dim, device=model.logit_scale.device)
            x = torch.cat([empty, *batches])[:, :truncate_dim]
            x = F.normalize(x, dim=-1) if normalize else x
            found[name] = x.cpu().numpy() if to == "numpy" else x
        return found if len(found) > 1 else next(iter(found.values()))

    def similarity(self, a: Tensor | np.ndarray, b: Tensor | np.ndarray, calibrated: str | None = None) -> Tensor:
        """Cosine of each of `a` (N, D) and each of `b` (M, D), (N, M).

        Args:
            calibrated: a modality, whose logit scale multiplies the cosines: a softmax over texts then gives the
                probabilities that its training aimed at.
        """
        a, b = (F.normalize(torch.as_tensor(x).float(), dim=-1) for x in (a, b))
        scale = 1.0 if calibrated is None else self._model(calibrated).logit_scale.float().exp()
        return scale * a @ b.to(a.device).T

    def _model(self, name: str) -> DualEncoder:
        if name == TEXT:
            return next(iter(self.encoders.values()))[0]
        if name not in self.encoders:
            hint = ": the original's thermal is infrared here" if name == "thermal" else ""
            raise ValueError(f"no encoder for {name!r} is loaded, only {self.modalities} and text{hint}")
        return self.encoders[name][0]

    def _checked(self, name: str, items: Any) -> list[Any]:
        self._model(name)
        if isinstance(items, (str, bytes, os.PathLike)) or not isinstance(items, Iterable):
            raise TypeError(f"encode takes a list: {name}=[...], not one {type(items).__name__}")
        items = list(items)
        if name == TEXT and not all(isinstance(item, str) for item in items):
            raise TypeError("texts should be strings")
        return items

    def _features(self, name: str, items: list[Any], batch_size: int, num_workers: int) -> Iterator[Tensor]:
        """(B, D), projected, float32, a batch at a time; the next one is read while this one is encoded."""
        model = self._model(name)
        weight = model.visual_projection.weight
        parts = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        if name == TEXT:
            for part in parts:
                tokens = {key: value.to(weight.device) for key, value in model.tokenize(part).items()}
                with torch.inference_mode():
                    yield model.project_text(tokens).float()
            return
        modality = self.encoders[name][1]
        with ThreadPoolExecutor(num_workers) if num_workers else nullcontext() as pool:
            for batch in _read(parts, lambda item: modality.preprocess(fetch(item)), pool):
                inputs = torch.stack(batch).to(weight.device)
                with torch.inference_mode():
                    yield model.project(inputs).float()


def _check_count(least: int, **options: int) -> None:
    for name, value in options.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} should be a whole number, at least {least}, not {value!r}")


def _read(parts: list[list[Any]], read: Callable[[Any], Tensor], pool: ThreadPoolExecutor | None) -> Iterator[list]:
    """What `read` makes of each part; with a pool, the next part is under way while the caller works on one."""
    if pool is None:
        yield from ([read(item) for item in part] for part in parts)
        return
    waiting: deque[list[Future]] = deque()
    for part in parts:
        waiting.append([pool.submit(read, item) for item in part])
        if len(waiting) > 1:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]


def load_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    like: DualEncoder | None = None,
    modality: str | None = None,
    num_frames: int | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[DualEncoder, Modality]:
    """The model and the modality of a checkpoint of our training, or of a published one.

    Args:
        source: a file that training wrote, a run's folder, a folder in the published layout, or a hub id; of
            `LanguageBind`'s own models the name alone.
        device: where to put the model.
        like: a model whose text tower this one is to share.
        modality: what it should be.
        num_frames: as for `load_checkpoint`.
        cache_dir: where downloads are kept.

    Raises:
        UserError: it cannot be used, or is of another modality.
    """
    if is_training_checkpoint(source):
        model, found = load_checkpoint(source, device, like, num_frames)
    else:
        from .published import load_published

        model, found = load_published(source, device, like, num_frames, cache_dir)
    if modality not in (None, modality_name(found)):
        hint = " (the original's thermal)" if modality == "thermal" else ""
        raise UserError(f"{source} is for {modality_name(found)}{hint}, not {modality}")
    return model, found
