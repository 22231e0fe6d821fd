"""The interface of the models that `evaluate` takes, and adapters for models from outside this library.

A specification names a model:

    a training checkpoint, a run's folder, a folder in the published layout, or a hub id
    open_clip:NAME/TAG         an open_clip model; TAG is a pretrained tag or a file of weights (NAME//abs/file.pt)
    open_clip:local-dir:FOLDER or open_clip:hf-hub:ORG/NAME, which come with weights
    imagebind:FILE             ImageBind's published weights
    clip4clip:FILE             a checkpoint of CLIP4Clip, pytorch_model.bin.N
    MODULE:FUNCTION            a Python function without arguments that returns a model for `ExternalModel`
    NAME=...                   any of these, with a name for the model's results
"""

import importlib
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip4clip import CLIP4CLIP
from ..config import UserError
from ..hub.checkpoint import checkpoint_name, latest_checkpoint
from ..hub.encoders import load_model
from ..hub.imagebind import IMAGEBIND
from ..modalities import Modality, modality_class, modality_name, modality_names
from ..modalities._images import MEAN, STD
from ..text import TextConfig, encode_text, fingerprint, open_clip_text
from ..timm_tower import image_options
from ..weights import open_clip_model

log = logging.getLogger(__name__)

OPEN_CLIP = "open_clip:"
NAMED = re.compile(r"([\w.-]+)=(.+)")
CALLABLE = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
LOGIT_SCALE = math.log(100)  # CLIP's, at the end of training
MAX_LOGIT_SCALE = 20.0  # larger than in any real model; its exponential times a cosine is still finite


class Model(Protocol):
    """The methods of a module that `evaluate` calls. `DualEncoder` has them. Features may have any norm and dtype."""

    logit_scale: Tensor  # scalar in log space, on the model's device

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        """Return the tokens for `encode_text`, as tensors on the CPU or as lists, which stay where they are."""

    def encode_text(self, tokens: dict[str, Any]) -> Tensor:
        """Return the features (N, D) of N texts."""

    def encode(self, inputs: Any) -> Tensor:
        """Return the features (B, D) of inputs (B, C, T, H, W), or of a list of B files if `takes_files` is true."""

    def text_fingerprint(self) -> str:
        """Return a string that is unique to the text tower's weights."""


def split_name(spec: str) -> tuple[str, str]:
    """Split NAME=SPEC into the model's name in results and the specification. The default name is `model_name`."""
    match = NAMED.fullmatch(spec) if not Path(spec).exists() else None
    return (match[1], match[2]) if match else (model_name(spec), spec)


def model_name(spec: str) -> str:
    """Return a short name for the model of a specification, for use in the names of result files."""
    if spec.startswith(OPEN_CLIP):
        name, tag = _open_clip_parts(spec)
        if tag is None:
            return f"open_clip-{Path(name.partition(':')[2]).name}"
        return f"open_clip-{name}-{Path(tag).stem if '/' in tag or Path(tag).is_file() else tag}"
    return "-".join(callable_parts(spec) or (checkpoint_name(spec),))


def checkpoint_of(spec: str) -> str:
    """Return the path of the checkpoint: the last one for a run's folder. Other specifications are returned as is."""
    path = Path(spec.removeprefix(CLIP4CLIP))
    return str((latest_checkpoint(path / "checkpoints") or path).resolve()) if path.exists() else spec


def load_eval_model(
    spec: str,
    device: torch.device,
    modality: str | None = None,
    num_frames: int | None = None,
    default_modality: str | None = None,
) -> tuple[Any, Modality]:
    """Return the `Model` of a specification, in eval mode, and its modality.

    An open_clip model or ImageBind is used with the `modality`, or else with `default_modality`; other models must have
    the `modality`, if one is given. `num_frames` replaces the model's own number of frames per clip.

    Raises `UserError` if the model cannot be loaded, or has another modality.
    """
    model: nn.Module
    kind: Any
    if spec.startswith(OPEN_CLIP):
        model, kind = _load_open_clip(spec, modality or default_modality)
    elif parts := callable_parts(spec):
        model, kind = _load_external(spec, *parts)
    else:
        asked = modality or (default_modality if spec.startswith(IMAGEBIND) else None)
        return load_model(spec, device, modality=asked, num_frames=num_frames)
    if modality not in (None, modality_name(kind)):
        raise UserError(f"{spec} is for {modality_name(kind)}, not {modality}")
    if num_frames is not None:
        if not hasattr(kind, "num_frames"):
            raise UserError(f"{spec} reads {modality_name(kind)}, which has no frames: leave out --num-frames")
        kind = replace(kind, num_frames=num_frames)
    return model.eval().to(device), kind


class OpenClipModel(nn.Module):
    """An open_clip model for inputs (B, 3, T, H, W). It averages the unit-norm features of a clip's frames."""

    def __init__(self, model: Any, config: TextConfig):
        super().__init__()
        self.text_model, self.text_projection, _ = open_clip_text(model, config)
        self.model, self.tokenize = model, self.text_model.tokenizer
        own = hasattr(model.visual, "trunk")  # then the modality has the model's preprocessing
        shift, scale = _pixel_change({"mean": MEAN, "std": STD} if own else model.visual.preprocess_cfg)
        self.logit_scale = nn.Buffer(model.logit_scale.detach().float().clone())
        self.shift, self.scale = nn.Buffer(shift), nn.Buffer(scale)

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        return encode_text(self.text_model, self.text_projection, tokens)

    def encode(self, inputs: Tensor) -> Tensor:
        frames = inputs.transpose(1, 2)  # (B, T, 3, H, W)
        features = self.model.encode_image(frames.flatten(0, 1) * self.scale + self.shift)
        return F.normalize(features.float(), dim=-1).unflatten(0, frames.shape[:2]).mean(dim=1)

    def text_fingerprint(self) -> str:
        return fingerprint(self.text_model, self.text_projection)


class ExternalModel(nn.Module):
    """An adapter that turns the object that a MODULE:FUNCTION returns into a `Model`.

    The object has `encode_text(texts)` -> (N, D), and `encode(batch)`, (B, C, T, H, W) -> (B, D), or
    `encode_files(list)` -> (B, D), with features in tensors or arrays of any norm. A file in the list is a Path, bytes
    (from a shard), or a list of these (frames). `modality` is the name of one with default options, or a `Modality`.
    The object may also have `logit_scale` in log space (default: ln 100) and `fingerprint`, a string that names the
    text tower's weights (default: the specification).
    """

    def __init__(self, external: Any, spec: str):
        super().__init__()
        self.external, self.spec = external, spec
        self.takes_files = not callable(getattr(external, "encode", None))
        scale = torch.as_tensor(getattr(external, "logit_scale", LOGIT_SCALE), dtype=torch.float32).detach().clone()
        if scale.numel() != 1 or not scale.abs() <= MAX_LOGIT_SCALE:
            expected = f"one number, the logarithm of the scale (CLIP's is ln 100, {LOGIT_SCALE:.2f})"
            raise UserError(f"{spec}: logit_scale should be {expected}, not {scale.tolist()}")
        self.logit_scale = nn.Buffer(scale.reshape(()))
        # Otherwise nothing distinguishes different weights behind the same name
        self.known = isinstance(external, nn.Module) or hasattr(external, "fingerprint")

    def tokenize(self, texts: list[str]) -> dict[str, list[str]]:
        return {"texts": texts}

    def encode_text(self, tokens: dict[str, list[str]]) -> Tensor:
        return self._features("encode_text", tokens["texts"])

    def encode(self, inputs: Tensor | list[Any]) -> Tensor:
        return self._features("encode_files" if self.takes_files else "encode", inputs)

    def text_fingerprint(self) -> str:
        return str(getattr(self.external, "fingerprint", self.spec))

    def extra_repr(self) -> str:
        return f"{self.spec}, {self.text_fingerprint()}"

    def _features(self, method: str, inputs: Tensor | list[Any]) -> Tensor:
        features = torch.as_tensor(getattr(self.external, method)(inputs), device=self.logit_scale.device).detach()
        if features.ndim != 2 or len(features) != len(inputs) or features.is_complex():
            shape = tuple(features.shape)
            raise UserError(f"{self.spec}: {method} returns {shape}, expected ({len(inputs)}, D): a row for each input")
        return features


def _load_open_clip(spec: str, modality: str | None) -> tuple[OpenClipModel, Modality]:
    name, tag = _open_clip_parts(spec)
    kind: Any = _modality(f"{spec} needs --modality", modality)
    model = OpenClipModel(open_clip_model(name, tag), TextConfig(name, tag))
    size = model.model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width or kind.input_shape[0] != 3 or not hasattr(kind, "image_size"):
        raise UserError(f"{spec} reads pictures of {height} x {width} pixels, which {modality} does not provide")
    if hasattr(model.model.visual, "trunk"):
        return model, replace(kind, **image_options(height, model.model.visual.preprocess_cfg))
    return model, replace(kind, image_size=height)


def _open_clip_parts(spec: str) -> tuple[str, str | None]:
    name, slash, tag = spec.removeprefix(OPEN_CLIP).partition("/")
    if name.startswith(("local-dir:", "hf-hub:")):
        return name + slash + tag, None
    if not name or not tag:
        raise UserError(f"{spec}: name an open_clip model and its weights: {OPEN_CLIP}ViT-B-32/TAG or .../FILE")
    return name, tag


def _pixel_change(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the shift and scale that turn CLIP's pixel normalisation into the model's own, (3, 1, 1) each."""
    for key, usual in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if config.get(key, usual) != usual:
            log.warning("the model was trained with %s %r, but pictures are resized with %r", key, config[key], usual)
    values = torch.tensor([MEAN, STD, config["mean"], config["std"]], dtype=torch.float64)
    mean, std, own_mean, own_std = values[..., None, None]
    return ((mean - own_mean) / own_std).float(), (std / own_std).float()


def callable_parts(spec: str) -> tuple[str, str] | None:
    """Return the two parts of MODULE:FUNCTION, or None for another specification."""
    match = CALLABLE.fullmatch(spec) if not (Path(spec).exists() or spec.startswith((CLIP4CLIP, IMAGEBIND))) else None
    return (match[1], match[2]) if match else None


def call_named(spec: str, module: str, function: str) -> Any:
    """Return what the function of a MODULE:FUNCTION returns, or None if the module has no such function."""
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{spec}: {module} cannot be imported: {error} (put its folder on PYTHONPATH)") from error
    for name in function.split("."):
        found = getattr(found, name, None)
    return found() if callable(found) else None


def _load_external(spec: str, module: str, function: str) -> tuple[ExternalModel, Modality]:
    external = call_named(spec, module, function)
    text, *inputs = (callable(getattr(external, name, None)) for name in ("encode_text", "encode", "encode_files"))
    if not (text and any(inputs)):
        raise UserError(f"{spec} should return an object with encode_text, and with encode or encode_files")
    return ExternalModel(external, spec), _modality(spec, getattr(external, "modality", None))


def _modality(where: str, modality: Any) -> Modality:
    if isinstance(modality, Modality):
        return modality
    if modality not in modality_names():
        raise UserError(f"{where}: the modality should be one of {', '.join(modality_names())}, not {modality!r}")
    return modality_class(modality)()
