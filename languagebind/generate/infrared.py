"""Translate frames to infrared with a model of the user's; none comes with this library."""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import rgb_to_grayscale

from ..config import UserError, at_least, digest, first_line
from ..distributed import own_device
from ..weights import read_file
from .models import FrameStep, encoded, file_sha256
from .steps import Entry, Failed

CONTRACT = "pictures (B, 3, H, W) in 0..1 to (B, 1 or 3, H, W)"
ALIKE = 0.98  # absolute correlation with the luminance of the frames from which a clip gets a note
GREY, INVERTED = "like grey", "like inverted grey"
NO_DATASET = 1000  # ThermalGen's class for the style of no dataset


@dataclass(frozen=True)
class InfraredOptions:
    """Infrared pictures of the frames: JPEG, from the minimum (black) to the maximum (white) of each clip."""

    model: str
    """FILE.pt2, made by torch.export; MODULE:FUNCTION, a function without arguments that returns a model; or, with
    --checkout, srgb-tir:FILE or thermalgen:NAME. The model turns (B, 3, H, W) in 0..1 into (B, 1 or 3, H, W)"""
    checkout: Path | None = None
    """folder with a clone of sRGB-TIR or ThermalGen"""
    size: int | None = None
    """short side of the model's input; None: that of the frames. Results always have the size of the frames"""
    multiple: int = 16
    """the sides of the model's input are rounded to multiples of this number"""
    device: str | None = None
    """device to use; None: a GPU if there is one. Under torchrun, each rank uses its own"""

    def __post_init__(self):
        at_least(1, size=self.size, multiple=self.multiple)


class Infrared(FrameStep):
    """Infrared pictures as JPEG files, with a note on clips that are little but the grey of the frames.

    Black and white are the extremes of a clip, not of each picture as in VIDAL-10M, so that a thing keeps its
    brightness from frame to frame; and not 0 and 1, because models have different ranges.
    """

    name = "infrared"

    def __init__(self, root: Path, options: InfraredOptions):
        super().__init__(root)
        self.options = options

    def record(self) -> dict[str, Any]:
        from ..eval.cache import weights_digest

        options = self.options
        model = load_model(options.model, options.checkout, torch.device("cpu"))  # a worker's copy may be on a GPU
        weights = weights_digest(model) if isinstance(model, nn.Module) else getattr(model, "fingerprint", None)
        if options.model.endswith(".pt2"):
            weights = file_sha256(Path(options.model))  # of its code, too
        own = {name: getattr(options, name) for name in ("model", "size", "multiple")}
        return own | {"weights_sha256": weights, "torch": torch.__version__}

    def make(self, entry: Entry, frames: Tensor) -> tuple[list[bytes], tuple[str, ...]] | Failed:
        made = self.translate(frames, seed=int(digest(entry.id)[:12], 16))
        low, high = made.aminmax()
        if not -torch.inf < low < high < torch.inf:
            return Failed("no picture", f"{entry.id}: the model's output is NaN, infinite or the same everywhere")
        made = F.interpolate((made - low) / (high - low), frames.shape[-2:], mode="bicubic").clamp(0, 1)
        alike = correlation(*(rgb_to_grayscale(clip) for clip in (frames / 255, made)))
        notes = () if abs(alike) < ALIKE else (GREY if alike > 0 else INVERTED,)
        return [encoded(each, "JPEG", quality=95) for each in made.mul(255).round().to(torch.uint8)], notes

    @torch.no_grad()
    def translate(self, frames: Tensor, seed: int) -> Tensor:
        """Return the model's output (T, 1 or 3, h, w), on the CPU, for frames (T, 3, H, W) in bytes.

        The seed is for models that draw random numbers.
        """
        model, device = self._loaded
        unit, short = self.options.multiple, min(frames.shape[-2:])
        sides = [side * (self.options.size or short) / short for side in frames.shape[-2:]]
        size = [max(1, round(side / unit)) * unit for side in sides]
        x = F.interpolate(frames.to(device) / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        name, shape = self.options.model, tuple(x.shape)
        torch.manual_seed(seed)
        try:
            made = torch.as_tensor(model(x)).float().cpu()
        except (RuntimeError, AssertionError) as error:
            advice = "export it with dynamic batch, height and width, and see --size and --multiple"
            raise UserError(f"{name} fails for pictures {shape}: {first_line(error)} ({advice})") from error
        if made.ndim != 4 or len(made) != len(x) or made.shape[1] not in (1, 3):
            raise UserError(f"{name} turns {shape} into {tuple(made.shape)}; it should turn {CONTRACT}")
        return made

    @cached_property
    def _loaded(self) -> tuple[Callable[[Tensor], Any], torch.device]:
        device = own_device(self.options.device)
        return load_model(self.options.model, self.options.checkout, device), device


def load_model(name: str, checkout: Path | None, device: torch.device) -> Callable[[Tensor], Any]:
    """Return the model that `InfraredOptions.model` names. Raises `UserError` if it cannot be loaded."""
    if name.endswith(".pt2"):
        from torch.export.passes import move_to_device_pass

        try:
            return move_to_device_pass(torch.export.load(name), device).module()
        except Exception as error:  # torch raises many kinds of errors for damaged files
            raise UserError(f"cannot read {name} as a file of torch.export: {first_line(error)}") from error
    from ..eval.models import call_named, callable_parts

    kind, _, rest = name.partition(":")
    parts = callable_parts(name) if kind not in ADAPTERS else None
    model = call_named(name, *parts) if parts else kind in ADAPTERS and ADAPTERS[kind](checkout, rest)
    if not callable(model):
        raise UserError(f"{name} should be a .pt2 file, or a MODULE:FUNCTION that returns a model: {CONTRACT}")
    return model.requires_grad_(False).eval().to(device) if isinstance(model, nn.Module) else model


class SrgbTir(nn.Module):
    """sRGB-TIR (arXiv 2301.12689), with one random style for each clip."""

    def __init__(self, checkout: Path | None, file: str):
        import yaml

        super().__init__()
        generator, state = _import(checkout, "networks").AdaINGen, read_file(file)
        config = yaml.safe_load(Path(checkout or "", "configs/tir2rgb_folder.yaml").read_text(encoding="utf-8"))
        self.style_dim = config["gen"]["style_dim"]
        self.infrared, self.rgb = (generator(config[f"input_dim_{side}"], config["gen"]) for side in "ab")
        self.infrared.load_state_dict(state["a"])
        self.rgb.load_state_dict(state["b"])

    def forward(self, x: Tensor) -> Tensor:
        style = torch.randn(1, self.style_dim, 1, 1).to(x.device).expand(len(x), -1, -1, -1)
        return self.infrared.decode(self.rgb.encode(x * 2 - 1)[0], style)


class ThermalGen(nn.Module):
    """ThermalGen (arXiv 2509.24878), in the style of no dataset."""

    def __init__(self, checkout: Path | None, name: str):
        super().__init__()
        self.network = _import(checkout, "thermalgen_demo").ThermalGenSIT.from_pretrained(name, strict=True)

    def forward(self, x: Tensor) -> Tensor:
        classes = torch.full((len(x),), NO_DATASET, device=x.device)
        return self.network(x * 2 - 1, classes).clamp(-1, 1)


ADAPTERS: Mapping[str, Callable[[Path | None, str], nn.Module]] = {"srgb-tir": SrgbTir, "thermalgen": ThermalGen}


def _import(checkout: Path | None, module: str) -> Any:
    sys.path.insert(0, str(Path(checkout or "").absolute()))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"--checkout {checkout}: {error}; it should be a clone, with its packages installed") from error


def correlation(x: Tensor, y: Tensor) -> float:
    """Return the correlation of two clips (T, 1, H, W) within their frames, 0 if one of them is flat."""
    centred = [(clip - clip.mean((1, 2, 3), keepdim=True)).flatten().double() for clip in (x, y)]
    return torch.corrcoef(torch.stack(centred))[0, 1].nan_to_num().item()


def warning(report: Mapping[str, Any]) -> str | None:
    """Return a warning if a report counts clips that are little but grey, or None."""
    grey, inverted = (report["notes"].get(note, {}).get("count", 0) for note in (GREY, INVERTED))
    if not (alike := grey + inverted):
        return None
    share = f"{alike} of {report['made']} clips ({alike / report['made']:.0%}) are the grey of the frames"
    return f"{share}, {inverted} of them inverted, rather than infrared: look at them, or use another model"
