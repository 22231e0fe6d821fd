"""What `evaluate` needs of a model, and models that are not of this library brought to it.

A model is named by a specification:

    a training checkpoint, a run's folder, a folder in the published layout, or a hub id
    open_clip:NAME/TAG         an open_clip model; TAG is a pretrained tag or a file of weights (NAME//abs/file.pt)
    open_clip:local-dir:FOLDER and open_clip:hf-hub:ORG/NAME, which bring their weights along
    MODULE:FUNCTION            a Python callable, called once without arguments, that returns an `External`
    NAME=...                   any of these, with a name for its results
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

from ..config import UserError, first_line
from ..hub.checkpoint import checkpoint_name, latest_checkpoint
from ..hub.encoders import load_model
from ..modalities import Modality, modality_class, modality_name, modality_names
from ..text import TextConfig, encode_text, fingerprint, open_clip_text
from ..weights import open_clip_model

log = logging.getLogger(__name__)

OPEN_CLIP = "open_clip:"
NAMED = re.compile(r"([\w.-]+)=(.+)")
CALLABLE = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
BRINGS_WEIGHTS = ("local-dir:", "hf-hub:")
LOGIT_SCALE = math.log(100)  # CLIP's, where training ends
MAX_LOGIT_SCALE = 20.0  # no model's; its exponential times a cosine is a number still


class Model(Protocol):
    """What `evaluate` needs of a model; `DualEncoder` has it. Features may have any norm and any float type."""

    logit_scale: Tensor
    """scalar, log-space; its device is the model's"""
    training: bool

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        """Whatever `encode_text` takes, on the CPU; each value has `.to(device)`."""

    def encode_text(self, tokens: dict[str, Any]) -> Tensor:
        """Of N texts, (N, D)."""

    def encode(self, inputs: Any) -> Tensor:
        """(B, C, T, H, W) -> (B, D); of a list of B files where the model has a true `takes_files`."""

    def text_fingerprint(self) -> str:
        """The same for the same text tower, and for no other."""


class External(Protocol):
    """What a callable named as MODULE:FUNCTION returns. Features are tensors or arrays, of any norm.

    It has one of `encode(batch)`, (B, C, T, H, W) -> (B, D), of what its modality makes of B files, and
    `encode_files(list)`, of B files as they are: each a Path, bytes (from a shard), or a list of these (frames).
    It may have `logit_scale`, log-space (else ln 100), and `fingerprint`, a text that names its text tower's weights
    (else the specification itself). A torch module is moved to the device and put into evaluation mode.
    """

    modality: str | Modality
    """what it reads: the name of a modality, with its default options, or one with others"""

    def encode_text(self, texts: list[str]) -> Any:
        """Of N texts, (N, D)."""


def named(spec: str) -> tuple[str, str]:
    """The name that a specification has in results, and the specification without it."""
    match = NAMED.fullmatch(spec) if not Path(spec).exists() else None
    return match.groups() if match else (model_name(spec), spec)


def model_name(spec: str) -> str:
    """A short name for a specification, for the names of result files."""
    if spec.startswith(OPEN_CLIP):
        name, tag = _open_clip_parts(spec)
        if tag is None:
            return f"open_clip-{Path(name.partition(':')[2]).name}"
        return f"open_clip-{name}-{Path(tag).stem if '/' in tag or Path(tag).is_file() else tag}"
    return "-".join(_callable_parts(spec) or (checkpoint_name(spec),))


def reads_any(spec: str) -> bool:
    """Whether what the model reads is for the user to say: to open_clip, all that becomes pictures is alike."""
    return spec.startswith(OPEN_CLIP)


def checkpoint_of(spec: str) -> str:
    """What a specification means now: of a run's folder, the last checkpoint in it."""
    path = Path(spec)
    if not path.exists():
        return spec
    return str((latest_checkpoint(path / "checkpoints") or path).resolve())


def load(
    spec: str, device: torch.device, modality: str | None = None, num_frames: int | None = None
) -> tuple[Model, Modality]:
    """The model of a specification, ready for evaluation, and how its inputs are read.

    Args:
        spec: as in the module's docstring.
        device: where to put the model.
        modality: what an open_clip model is to read; of other models, what they should read, None for anything.
        num_frames: of clips, in place of what the model was trained with.

    Raises:
        UserError: it cannot be used, or is of another modality.
    """
    if not spec.startswith(OPEN_CLIP) and not _callable_parts(spec):
        return load_model(spec, device, modality=modality, num_frames=num_frames)
    make = _open_clip if spec.startswith(OPEN_CLIP) else _external
    model, kind = make(spec, device, modality)
    if num_frames is None:
        return model, kind
    if not hasattr(kind, "num_frames"):
        raise UserError(f"{spec} reads {modality_name(kind)}, which has no frames: leave out --num-frames")
    return model, replace(kind, num_frames=num_frames)


class Unmoved(list):
    """A batch that is no tensor: it stays as and where it is."""

    def to(self, *_: Any, **__: Any) -> "Unmoved":
        return self

    def flatten(self, *_: Any) -> "Unmoved":
        return self


class OpenClipModel(nn.Module):
    """An open_clip model on (B, 3, T, H, W): a clip's features are the mean of its frames' unit-norm features."""

    def __init__(self, model: nn.Module, config: TextConfig):
        super().__init__()
        self.text_model, self.text_projection, _ = open_clip_text(model, config)
        self.model = model
        self.register_buffer("logit_scale", model.logit_scale.detach().float().clone())
        for name, value in zip(("shift", "scale"), _pixel_change(model.visual.preprocess_cfg), strict=True):
            self.register_buffer(name, value)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return self.text_model.tokenizer(texts)

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        return encode_text(self.text_model, self.text_projection, tokens)

    def encode(self, inputs: Tensor) -> Tensor:
        frames = inputs.transpose(1, 2)  # (B, T, 3, H, W)
        features = self.model.encode_image(frames.flatten(0, 1) * self.scale + self.shift)
        return F.normalize(features.float(), dim=-1).unflatten(0, frames.shape[:2]).mean(dim=1)

    def text_fingerprint(self) -> str:
        return fingerprint(self.text_model, self.text_projection)


class ExternalModel(nn.Module):
    """An `External` as a `Model`; checks the shapes of what it gives."""

    def __init__(self, external: Any, spec: str):
        super().__init__()
        self.external, self.spec, self.embed_dim = external, spec, None
        self.takes_files = not callable(getattr(external, "encode", None))
        found = getattr(external, "logit_scale", LOGIT_SCALE)
        try:
            scale = torch.as_tensor(found, dtype=torch.float32).detach().clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{spec}: logit_scale should be one number, not {found!r}") from error
        if scale.numel() != 1 or not bool((scale.abs() <= MAX_LOGIT_SCALE).all()):
            raise UserError(f"{spec}: logit_scale should be one number, the logarithm of the scale (CLIP's is ln 100,"
                            f" {LOGIT_SCALE:.2f}), not {scale.tolist()}")  # fmt: skip
        self.register_buffer("logit_scale", scale.reshape(()))
        # Without either, other weights behind the same name could not be told apart
        self.known = isinstance(external, nn.Module) or hasattr(external, "fingerprint")

    def tokenize(self, texts: list[str]) -> dict[str, Unmoved]:
        return {"texts": Unmoved(texts)}

    def encode_text(self, tokens: dict[str, Unmoved]) -> Tensor:
        return self._checked("encode_text", list(tokens["texts"]))

    def encode(self, inputs: Tensor | Unmoved) -> Tensor:
        return self._checked("encode_files", list(inputs)) if self.takes_files else self._checked("encode", inputs)

    def text_fingerprint(self) -> str:
        return str(getattr(self.external, "fingerprint", self.spec))

    def extra_repr(self) -> str:
        return f"{self.spec}, {self.text_fingerprint()}"

    def _checked(self, method: str, inputs: list | Tensor) -> Tensor:
        found = getattr(self.external, method)(inputs)
        try:
            features = torch.as_tensor(found, device=self.logit_scale.device).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.spec}: {method} gives no tensor or array: {first_line(error)}") from error
        if features.layout != torch.strided or features.is_complex() or features.dtype == torch.bool:
            kind = f"{features.dtype}, {features.layout}"
            raise UserError(f"{self.spec}: {method} gives a tensor of {kind}: plain numbers are expected")
        if features.ndim != 2 or len(features) != len(inputs) or not features.shape[1]:
            shape = tuple(features.shape)
            raise UserError(f"{self.spec}: {method} gives {shape}, expected ({len(inputs)}, D), a row for each input")
        if self.embed_dim not in (None, features.shape[1]):
            dims = f"{features.shape[1]} dimensions, other features have {self.embed_dim}"
            raise UserError(f"{self.spec}: {method} gives {dims}: inputs and texts should share one space")
        self.embed_dim = features.shape[1]
        return features


def _open_clip(spec: str, device: torch.device, modality: str | None) -> tuple[Model, Modality]:
    name, tag = _open_clip_parts(spec)
    if modality is None:
        raise UserError(f"{spec}: say what it reads with --modality ({', '.join(modality_names())})")
    kind = _modality(spec, modality)
    model = OpenClipModel(open_clip_model(name, tag), TextConfig(name, tag)).eval()
    size = model.model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width or kind.input_shape[0] != 3 or not hasattr(kind, "image_size"):
        raise UserError(f"{spec} takes pictures of {height} x {width} pixels, which {modality} does not give")
    return model.to(device), replace(kind, image_size=height)


def _open_clip_parts(spec: str) -> tuple[str, str | None]:
    name = spec.removeprefix(OPEN_CLIP)
    if name.startswith(BRINGS_WEIGHTS):
        return name, None
    name, _, tag = name.partition("/")
    if not name or not tag:
        raise UserError(f"{spec}: name an open_clip model with its weights, {OPEN_CLIP}ViT-B-32/TAG or .../FILE")
    return name, tag


def _pixel_change(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and scale, (3, 1, 1) each, from pixels with CLIP's normalisation to those with the model's own."""
    from ..modalities._images import MEAN, STD

    for key, usual in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if config.get(key, usual) != usual:
            log.warning("the model was made with %s %r, pictures are fitted with %r", key, config[key], usual)
    mean, std, own_mean, own_std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD, config["mean"], config["std"])
    )
    return ((mean - own_mean) / own_std).float(), (std / own_std).float()


def _callable_parts(spec: str) -> tuple[str, str] | None:
    return match.groups() if (match := CALLABLE.fullmatch(spec)) and not Path(spec).exists() else None


def _external(spec: str, device: torch.device, modality: str | None) -> tuple[Model, Modality]:
    module, function = _callable_parts(spec)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{spec}: {module} needs the module {error.name}, which is not installed") from error
        raise UserError(f"{spec}: there is no module {error.name} (its folder should be in PYTHONPATH)") from error
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(f"{spec}: {module} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    for name in function.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        raise UserError(f"{spec}: {module} has no function {function}")
    try:
        external = found()
    except Exception as error:  # whatever the user's function does
        raise UserError(f"{spec}: {function}() fails: {type(error).__name__}: {first_line(error)}") from error
    text, *inputs = (callable(getattr(external, name, None)) for name in ("encode_text", "encode", "encode_files"))
    if not (text and any(inputs)):
        raise UserError(f"{spec}: what it returns should have encode_text, and encode or encode_files")
    kind = _modality(spec, getattr(external, "modality", None))
    if modality not in (None, modality_name(kind)):
        raise UserError(f"{spec} is for {modality_name(kind)}, not {modality}")
    return ExternalModel(external, spec).eval().to(device), kind


def _modality(spec: str, modality: Any) -> Modality:
    if isinstance(modality, Modality):
        return modality
    if modality not in modality_names():
        raise UserError(f"{spec}: the modality {modality!r} is none of {', '.join(modality_names())}")
    return modality_class(modality)()
