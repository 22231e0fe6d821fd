"""Load encoders from any checkpoint, and encode files, in-memory objects and texts into one space."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..clip4clip import CLIP4CLIP
from ..config import UserError, at_least, first_line
from ..dense import Mode, score_maps
from ..modalities import READING, Modality, modality_name, with_options
from ..model import DualEncoder, same_text
from ..remote import is_url
from ..temporal import PairHead
from ..text import ClipText, Tokenizer, clip_tokens, probe_tokens
from ..weights import WeightsError, dtype_of, load_strict
from .checkpoint import build_checkpoint, is_training_checkpoint, load_clip4clip, read_checkpoint, read_parts
from .files import HUB_OPTIONS
from .imagebind import IMAGEBIND, load_imagebind

log = logging.getLogger(__name__)

TEXT = "text"


def load(
    *sources: str | Path | Mapping[str, str | Path],
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    compile: bool = False,  # noqa: A002 - the usual name
    num_frames: int | None = None,
    **hub: Any,
) -> "Encoders":
    """Load encoders, one per modality. Equal text towers are loaded once; different ones stay beside each other.

    Args:
        sources: training checkpoints, folders of runs, folders in the published layout, hub ids, names from
            `list_models()`, `clip4clip:FILE`, or `imagebind:FILE` for all its modalities; or a mapping from modalities
            to such sources.
        device: device of the models.
        dtype: dtype of the weights (`float16`, `torch.float16`, ...); by default as in the files. Features are float32.
        compile: compile the encoders with `torch.compile`.
        num_frames: frames per clip; by default as in training. Temporal embeddings are interpolated.
        hub: options of the Hugging Face hub: cache_dir, force_download, local_files_only, revision, subfolder, token;
            and of reading: max_seconds and max_pixels (limits), exif, video_backend.

    Raises `UserError` if a source cannot be used, or two have the same modality.
    """
    dtype = dtype_of(dtype)
    try:  # before models are read
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used here: {first_line(error)}") from error
    wanted: list[tuple[str | None, str | Path]] = []
    for source in sources:
        if not isinstance(source, (str, os.PathLike, Mapping)):
            raise UserError(f"pass load() paths or hub ids, as in load('a', 'b'), or one mapping, not {source!r}")
        wanted += source.items() if isinstance(source, Mapping) else [(None, source)]
    encoders: dict[str, tuple[DualEncoder, Modality]] = {}
    towers: dict[int, DualEncoder] = {}  # a model for each text tower
    for expected, source in wanted:
        for model, modality in _load_all(source, towers.values(), expected, num_frames, **hub):
            towers.setdefault(id(model.text_model), model)
            name = modality_name(modality)
            if isinstance(getattr(model, "temporal_head", None), PairHead):
                raise UserError(f"{source} scores pairs and has no embedding: use it with languagebind eval")
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
    """Encoders of one or more modalities; `load` returns them. Models with equal text towers hold the same one."""

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
        of: str | None = None,
        **inputs: Any,
    ) -> Tensor | np.ndarray | dict[str, Tensor | np.ndarray]:
        """Return features (N, D) for one list, as in `encode(depth=[...])`, or a dictionary by modality for several.

        Args:
            batch_size: inputs per batch.
            num_workers: threads that read and decode; 0 uses the calling thread.
            normalize: scale features to unit norm.
            to: type of the features: tensors on the model's device, or arrays. Both are float32.
            truncate_dim: number of leading dimensions to keep, before normalisation.
            progress: show a progress bar.
            of: the modality whose text tower encodes `text`. By default, the tower of the modalities in the same call,
                and without any the tower that most loaded modalities share (in a tie, the first loaded).
            inputs: a list of paths, URLs, bytes or in-memory objects per modality (see its class), or of texts for
                `text`; and options of reading, as in `load`.

        Raises `DecodeError` if an item cannot be decoded, `TypeError` if an item is given instead of a list, and
        `ValueError` if a modality is not loaded, an option is out of range, or the text towers in the call differ.
        """
        reading = {name: inputs.pop(name) for name in READING if name in inputs}
        if not inputs:
            raise ValueError(f"pass encode() one list per modality: {', '.join(self.modalities)} or text")
        at_least(1, batch_size=batch_size, truncate_dim=truncate_dim)
        at_least(0, num_workers=num_workers)
        if to not in ("torch", "numpy"):
            raise ValueError(f"to should be 'torch' or 'numpy', not {to!r}")
        found = {}
        for name, items in inputs.items():
            model = self._text_side(of, inputs) if name == TEXT else self.model(name)
            parts = _split(name, items, batch_size)
            batches = _texts(model, parts) if name == TEXT else self._inputs(name, parts, num_workers, reading)
            shown = tqdm(batches, total=len(parts), desc=name, unit="batch", disable=not progress)
            empty = torch.empty(0, model.embed_dim, device=model.logit_scale.device)
            if truncate_dim is not None and truncate_dim > model.embed_dim:
                raise ValueError(f"truncate_dim should be at most {model.embed_dim} for {name}, got {truncate_dim}")
            x = torch.cat([empty, *shown])[:, :truncate_dim]
            x = F.normalize(x, dim=-1) if normalize else x
            found[name] = x.cpu().numpy() if to == "numpy" else x
        return found if len(found) > 1 else next(iter(found.values()))

    @torch.no_grad()
    def encode_dense(self, batch_size: int = 16, mode: Mode = "qq", **inputs: Any) -> Tensor:
        """Return features (N, T, h, w, D) of the patches of one list: unit norm, float32, comparable with texts'.

        For audio, h is frequency and w is time. `image_size`, or `target_length` for audio, sets another size than in
        training. For `mode` see `dense_tower`.
        """
        name, items, modality = self._one_list(inputs)
        model = self.model(name)
        parts = (torch.stack([*map(modality.preprocess, part)]) for part in _split(name, items, batch_size))
        return torch.cat([model.encode_dense(x.to(model.logit_scale.device), mode) for x in parts])

    @torch.no_grad()
    def segment(self, text: Sequence[str | Sequence[str]], mode: Mode = "qq", **inputs: Any) -> list[Tensor]:
        """Return each pixel's class, an index into `text`: a map (H, W), int64, for each input; (T, H, W) for clips.

        `text` has a prompt for each class, or several, whose features are averaged. A larger `image_size` than that of
        training is covered by windows of that size.
        """
        name, items, modality = self._one_list(inputs)
        window = getattr(self.encoders[name][1], "image_size", None)
        prompts = [[own] if isinstance(own, str) else own for (own,) in _split(TEXT, text, 1)]
        if not prompts or not all(prompts):
            raise ValueError("pass segment() a list of classes, text=[...], and at least one prompt for each")
        x: Any = self.encode(text=chain(*prompts), of=name)
        classes = F.normalize(torch.stack([own.mean(dim=0) for own in x.split([*map(len, prompts)])]), dim=-1)  # (K, D)

        def score(windows: Tensor) -> Tensor:
            return self.model(name).encode_dense(windows.to(classes.device), mode) @ classes.T

        maps = (score_maps(score, modality, modality.load(item), window) for (item,) in _split(name, items, 1))
        return [each.argmax(dim=1).squeeze(0) for each in maps]

    def _one_list(self, inputs: dict[str, Any]) -> tuple[str, Any, Modality]:
        """Return the name of the one modality in `inputs`, its list, and the modality with the options in `inputs`."""
        options = {name: inputs.pop(name) for name in (*READING, "image_size", "target_length") if name in inputs}
        if len(inputs) != 1 or not inputs.keys() <= self.encoders.keys():
            raise ValueError(f"pass one list of a modality: {', '.join(self.modalities)}")
        ((name, items),) = inputs.items()
        return name, items, with_options(self.encoders[name][1], options)

    def similarity(self, a: Tensor | np.ndarray, b: Tensor | np.ndarray, calibrated: str | None = None) -> Tensor:
        """Return the cosine similarities (N, M) of features `a` (N, D) and `b` (M, D).

        Texts should be encoded for the modality that they are compared with: see `of` in `encode`. The logit scale of
        the modality `calibrated` multiplies the similarities; a softmax over texts then gives the probabilities that
        the encoder was trained to predict.
        """
        a, b = (F.normalize(torch.as_tensor(x).float(), dim=-1) for x in (a, b))
        scale = 1.0 if calibrated is None else self.model(calibrated).logit_scale.float().exp()
        return scale * a @ b.to(a.device).T

    def model(self, name: str) -> DualEncoder:
        """Return the model of a modality; for `text`, the first with the text tower that most modalities share."""
        if name == TEXT:
            return self._usual
        if name not in self.encoders:
            hint = ": use 'infrared' for thermal images" if name == "thermal" else ""
            raise ValueError(f"no encoder for {name!r} is loaded, only {self.modalities} and text{hint}")
        return self.encoders[name][0]

    def _text_side(self, of: str | None, names: Iterable[str]) -> DualEncoder:
        """Return the model that encodes texts for `of`, or else for the modalities in `names`."""
        models = {name: self.model(name) for name in ([of] if of else names) if name != TEXT}
        if len({id(model.text_model) for model in models.values()}) > 1:
            advice = f"choose one, as in of={next(iter(models))!r}"
            raise ValueError(f"the text towers of {', '.join(models)} differ: {advice}, and encode texts once for each")
        return next(iter(models.values()), None) or self._usual

    @cached_property
    def _usual(self) -> DualEncoder:
        """The first model with the text tower that most modalities share; a warning names the other modalities."""
        towers = {name: id(model.text_model) for name, (model, _) in self.encoders.items()}
        usual = max(towers.values(), key=list(towers.values()).count)  # in a tie, of the first loaded
        share = [name for name in towers if towers[name] == usual]
        if others := [name for name in towers if name not in share]:
            message = "the text towers differ: texts are encoded with that of %s; to compare texts with %s, add of=%r"
            log.warning(message, ", ".join(share), " or ".join(others), others[0])
        return self.encoders[share[0]][0]

    def _inputs(self, name: str, parts: list[list[Any]], num_workers: int, options: dict[str, Any]) -> Iterator[Tensor]:
        """Yield unnormalised float32 features (B, D) of each part, while threads read the next part."""
        model, modality = self.encoders[name][0], with_options(self.encoders[name][1], options)
        with ThreadPoolExecutor(num_workers) if num_workers else nullcontext() as pool:
            start = map if pool is None else pool.map
            reading: Iterator[Iterable[Tensor]] = (start(modality.preprocess, part) for part in parts)
            for items, _ in pairwise(chain(reading, [()])):  # the pool already reads the next part
                yield model.project(torch.stack(list(items)).to(model.logit_scale.device)).float()


def _split(name: str, items: Any, size: int) -> list[list[Any]]:
    if isinstance(items, (str, bytes, os.PathLike)) or not isinstance(items, Iterable):
        raise TypeError(f"pass encode() a list, {name}=[...], not a single {type(items).__name__}")
    items = list(items)
    return [items[start : start + size] for start in range(0, len(items), size)]


def load_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    like: DualEncoder | Iterable[DualEncoder] = (),
    modality: str | None = None,
    num_frames: int | None = None,
    **hub: Any,
) -> tuple[DualEncoder, Modality]:
    """Return the model, in evaluation mode, and the modality of one source; for other arguments see `load`.

    Args:
        like: a loaded model with the same text tower, which the new model shares; or several, of which it shares the
            tower of any that has the same one.
        modality: the expected modality; `imagebind:FILE` needs it.

    Raises `UserError` if the checkpoint cannot be used, or is for another modality. Raises `WeightsError` if the
    weights do not fit, or the text tower differs from that of the one model `like`.
    """
    (model, found), *others = _load_all(source, like, modality, num_frames, **hub)
    if others:
        raise UserError(f"{source} has several modalities: name one (--modality; of a partner --anchor-modality)")
    return model.to(device), found


def _load_all(
    source: str | Path, like: DualEncoder | Iterable[DualEncoder], modality: str | None, frames: int | None, **hub: Any
) -> list[tuple[DualEncoder, Modality]]:
    """Return the models of one source, on the CPU, with their modalities; for the arguments see `load_model`."""
    reading = {name: hub.pop(name) for name in READING if name in hub}
    if unknown := hub.keys() - set(HUB_OPTIONS):
        raise TypeError(f"unexpected option {min(unknown)!r}")
    logs = Path(source).parent
    absent = logs.name and not is_url(source) and not Path(source).exists()
    if absent and (runs := sorted(path.parent.name for path in logs.glob("*/checkpoints"))):  # not an id on the hub
        raise UserError(f"no run {source}; {logs} holds {', '.join(runs)}")
    loaded = [like] if isinstance(like, DualEncoder) else [*like]
    if str(source).startswith(IMAGEBIND):
        every = load_imagebind(source, modality, frames)
    elif str(source).startswith(CLIP4CLIP):
        every = [load_clip4clip(str(source), frames)]
    elif is_training_checkpoint(source, hub.get("subfolder")):
        every, known = [], {model.text_fingerprint(): model for model in loaded}
        for part in [read_checkpoint(source, modality)] if modality else read_parts(source).values():
            every.append(build_checkpoint(part, source, known.get(part["text_fingerprint"]), frames))
            known.setdefault(part["text_fingerprint"], every[-1][0])
    else:
        every = [_load_published(source, num_frames=frames, **hub)]
    one, kind = every[0]
    tokens = probe_tokens(one.text_model)  # of two models with equal towers, one may cut texts earlier
    alike = [x for x in loaded if all(map(torch.equal, tokens, probe_tokens(x.text_model)))]
    same = next((x for x in alike if x.text_model is one.text_model or same_text(one, x)), None)
    if same is not None:
        for model, _ in every:
            model.text_model, model.text_projection = same.text_model, same.text_projection
    if isinstance(like, DualEncoder) and same is None:
        raise WeightsError(f"the text tower of {source} differs from the one loaded before: load it separately")
    name = modality_name(kind)
    if modality not in (None, name):
        hint = ": write infrared for thermal images" if (modality, name) == ("thermal", "infrared") else ""
        raise UserError(f"{source} is for {name}, not {modality}{hint}")
    return [(model, with_options(found, reading)) for model, found in every]


def _load_published(source: str | Path, **options: Any) -> tuple[DualEncoder, Modality]:
    from .config import read_pretrained  # needs transformers, unlike our own checkpoints

    config, state, _ = read_pretrained(source, **options)
    with torch.device("meta"):
        sizes, length = config.text.sizes, config.text.context_length
        tower = ClipText(sizes, Tokenizer(clip_tokens(length or sizes.context_length)))
        projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        model = DualEncoder(config.vision.input_shape, config.vision.sizes, (tower, projection, config.projection_dim))
    load_strict(model, state, str(source), assign=True)
    model.trained_with = tuple(config.trained_with)
    return model.eval().requires_grad_(False), config.modality


def _texts(model: DualEncoder, parts: list[list[str]]) -> Iterator[Tensor]:
    """Yield unnormalised float32 features (B, D) of each part."""
    for part in parts:
        tokens = {key: value.to(model.logit_scale.device) for key, value in model.tokenize(part).items()}
        yield model.project_text(tokens).float()
