"""Translate frames to infrared with a model of the user's; none comes with this library."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import rgb_to_grayscale

from ..config import UserError, at_least, digest, first_line
from ..data.shards import file_sha256
from ..distributed import own_device
from ..eval.cache import weights_digest
from ..eval.models import call_named, callable_parts
from ..weights import read_file
from .models import ONE_CALL, FrameStep
from .steps import Entry, Unmade

CONTRACT = "pictures (B, 3, H, W) in 0..1 to (B, 1 or 3, H, W)"
ALIKE = 0.98  # absolute correlation with the luminance of its frames from which a clip gets a note


@dataclass(frozen=True)
class InfraredOptions:
    """Infrared pictures of the frames: JPEG, from the minimum (black) to the maximum (white) of each clip."""

    model: str
    """FILE.pt2, made by torch.export; MODULE:FUNCTION, a function without arguments that returns a torch module; or,
    with a clone of sRGB-TIR or ThermalGen on PYTHONPATH, srgb-tir:FILE or thermalgen:NAME"""
    size: int | None = None
    """short side of the model's input; None: that of the frames. Results have the size of the frames"""
    multiple: int = 16
    """the sides of the model's input are rounded to multiples of this number"""
    device: str | None = None
    """None: a GPU if there is one"""

    def __post_init__(self):
        at_least(1, size=self.size, multiple=self.multiple)


class Infrared(FrameStep):
    """Infrared pictures as JPEG files, with a note if a clip is just the grey of its frames."""

    name = "infrared"

    def record(self) -> dict[str, Any]:
        facts = {name: getattr(self.options, name) for name in ("model", "size", "multiple")}
        model = load_model(self.options.model, torch.device("cpu"))  # GPUs are for workers
        weights = file_sha256(facts["model"]) if facts["model"].endswith(".pt2") else weights_digest(model)
        return facts | {"weights_sha256": weights, "torch": torch.__version__}

    def pictures(self, entry: Entry, frames: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        made = self.translate(frames, seed=int(digest(entry.id)[:12], 16))
        low, high = made.aminmax()  # of the clip, so that a temperature keeps its brightness; models differ in range
        if not -torch.inf < low < high < torch.inf:
            raise Unmade("no picture", f"{entry.id}: the model's output is NaN, infinite or the same everywhere")
        made = (made - low).mul(255 / (high - low)).round().to(torch.uint8)
        made = F.interpolate(made, frames.shape[-2:], mode="bicubic", antialias=True)
        greys = [rgb_to_grayscale(clip[..., ::4, ::4].double()) for clip in (frames, made)]  # one pixel in 16 is enough
        centred = torch.stack([(grey - grey.mean((1, 2, 3), keepdim=True)).flatten() for grey in greys])
        alike = torch.corrcoef(centred)[0, 1]  # NaN for frames of one colour each
        notes = {"just the grey of the frames": alike >= ALIKE, "just the inverted grey of the frames": alike <= -ALIKE}
        return made, tuple(note for note, applies in notes.items() if applies)

    @torch.no_grad()
    def translate(self, frames: Tensor, seed: int) -> Tensor:
        """Return the model's output (T, 1 or 3, h, w) for frames (T, 3, H, W) in bytes; some models are random."""
        name, unit, short = self.options.model, self.options.multiple, min(frames.shape[-2:])
        scale = (self.options.size or short) / short
        size = [max(1, round(side * scale / unit)) * unit for side in frames.shape[-2:]]
        x = F.interpolate(frames, size, mode="bicubic", antialias=True) / 255  # of bytes, it is five times as fast
        try:
            with ONE_CALL:
                model, device = self._loaded
                torch.manual_seed(seed)
                made = model(x.to(device)).float().cpu()
        except (RuntimeError, AssertionError) as error:
            advice = "export it with dynamic batch, height and width, and see --size and --multiple"
            raise UserError(f"{name} fails for pictures {tuple(x.shape)}: {first_line(error)} ({advice})") from error
        if made.ndim != 4 or len(made) != len(x) or made.shape[1] not in (1, 3):
            raise UserError(f"{name} turns {tuple(x.shape)} into {tuple(made.shape)}; it should turn {CONTRACT}")
        return made

    @cached_property
    def _loaded(self) -> tuple[nn.Module, torch.device]:
        device = own_device(self.options.device)
        return load_model(self.options.model, device), device


def load_model(name: str, device: torch.device) -> nn.Module:
    """Return the model that `InfraredOptions.model` names. Raises `UserError` if it cannot be loaded."""
    from torch.export.passes import move_to_device_pass

    if name.endswith(".pt2"):
        try:
            return move_to_device_pass(torch.export.load(name), device).module()
        except Exception as error:  # torch raises many kinds of errors for damaged files
            raise UserError(f"cannot read {name} as a file of torch.export: {first_line(error)}") from error
    (kind, _, rest), parts = name.partition(":"), callable_parts(name)
    adapters = {"srgb-tir": SrgbTir, "thermalgen": ThermalGen}
    try:
        model = adapters[kind](rest) if kind in adapters else call_named(name, *parts) if parts else None
    except ModuleNotFoundError as error:
        raise UserError(f"{name}: {error}; put the clone on PYTHONPATH, and install its packages") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} should be a .pt2 file, or a MODULE:FUNCTION that returns a torch module: {CONTRACT}")
    return model.requires_grad_(False).eval().to(device)


class SrgbTir(nn.Module):
    """sRGB-TIR (arXiv 2301.12689), with one random style for each clip."""

    def __init__(self, file: str):
        import networks  # type: ignore[import-not-found]  # of the clone
        import yaml

        super().__init__()
        path = Path(networks.__file__).with_name("configs") / "tir2rgb_folder.yaml"
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        state, self.style_dim = read_file(file), config["gen"]["style_dim"]
        self.infrared, self.rgb = (networks.AdaINGen(config[f"input_dim_{side}"], config["gen"]) for side in "ab")
        self.infrared.load_state_dict(state["a"])
        self.rgb.load_state_dict(state["b"])

    def forward(self, x: Tensor) -> Tensor:
        style = torch.randn(1, self.style_dim, 1, 1).to(x.device).expand(len(x), -1, -1, -1)
        return self.infrared.decode(self.rgb.encode(x * 2 - 1)[0], style)


class ThermalGen(nn.Module):
    """ThermalGen (arXiv 2509.24878), in the style of no dataset, which is class 1000."""

    def __init__(self, name: str):
        from thermalgen_demo import ThermalGenSIT  # type: ignore[import-not-found]  # of the clone

        super().__init__()
        self.network = ThermalGenSIT.from_pretrained(name, strict=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * 2 - 1, torch.full((len(x),), 1000, device=x.device)).clamp(-1, 1)
