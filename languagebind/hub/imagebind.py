"""ImageBind (arXiv 2305.05665): its published checkpoint, `imagebind:FILE`, as models of this library.

This follows the paper and the names and shapes in `imagebind_huge.pth`. Only the depth and width of each tower and the
size of the shared space are read from the weights. Shapes: B batch, L tokens, W width.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip_text import CONTEXT_LENGTH
from ..config import UserError
from ..modalities import Modality, modality_class
from ..modalities._fbank import log_mel
from ..model import DualEncoder
from ..text import Tokenizer, clip_tokens
from ..transformer import Mlp
from ..weights import State, WeightsError, load_strict, read_file, tensors_of

IMAGEBIND = "imagebind:"
TOWERS = {"audio": "audio", "depth": "depth", "image": "vision", "infrared": "thermal", "video": "vision"}
NUM_HEADS = {"vision": 16, "text": 16, "audio": 12, "depth": 8, "thermal": 12}
POSITIONS = {"vision": 257, "audio": 229, "depth": 197, "thermal": 197}  # of the patches and the class token
NAMES = (  # in the file, without the name of the tower -> here
    (r"preprocessors\.\w+_stem\.proj(\.1)?\.", "patches."),
    (r"preprocessors\.\w+_stem\.norm_layer\.", "patch_norm."),
    (r"preprocessors\.(pos_embedding_helper\.)?pos_embed", "positions"),
    (r"trunks\.pre_transformer_layer\.0\.", "pre_norm."),
    (r"heads\.(proj\.)?0\.", "head.norm."),
    (r"heads\.(2|proj\.1)\.", "head.projection."),
    (r"postprocessors\.1\.", "head."),
    (r"(preprocessors|trunks)\.", ""),
)
Norm = partial(nn.LayerNorm, eps=1e-6)


class Block(nn.Module):
    """Attention, with `bias_kv` also to a learned key and value, and an MLP, (B, L, W) -> (B, L, W)."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, bias_kv: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads, add_bias_kv=bias_kv, batch_first=True)
        self.norm_1, self.norm_2 = Norm(width), Norm(width)
        self.mlp = Mlp(width, mlp_dim, "gelu")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.norm_2(x))


class Head(nn.Module):
    """Projects a token into the shared space, (B, W) -> (B, D), where its norm is the tower's scale."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.norm, self.projection = Norm(width), nn.Linear(width, embed_dim, bias=False)
        self.log_logit_scale = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.projection(self.norm(x)), dim=-1) * self.log_logit_scale.exp()


class VisionTower(nn.Module):
    """A vision transformer from views (B, C, T, H, W) to features (B, D).

    As in CLIP, a norm precedes the blocks of the vision tower; in the others, it normalises the patches alone.
    """

    def __init__(self, name: str, width: int, blocks: list[Block], head: Head):
        super().__init__()
        from_clip = name == "vision"
        channels, patch = (3, (2, 14, 14)) if from_clip else (1, (1, 16, 16))
        self.patches = nn.Conv3d(channels, width, patch, (1, 10, 10) if name == "audio" else patch, bias=False)
        self.blocks, self.head = nn.Sequential(*blocks), head
        self.patch_norm = nn.Identity() if from_clip else nn.LayerNorm(width)
        self.pre_norm = Norm(width) if from_clip else nn.Identity()
        self.cls_token, self.positions = (nn.Parameter(torch.zeros(1, n, width)) for n in (1, POSITIONS[name]))

    def forward(self, view: Tensor) -> Tensor:
        x = self.patch_norm(self.patches(view).flatten(2).transpose(1, 2))  # (B, L - 1, W)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.blocks(self.pre_norm(x))[:, 0])


class TextTower(nn.Module):
    """CLIP's text transformer from token ids (B, L) to features (B, D)."""

    def __init__(self, width: int, blocks: list[Block], head: Head):
        super().__init__()
        self.tokenizer = Tokenizer(clip_tokens(CONTEXT_LENGTH))
        self.token_embedding = nn.Embedding(49408, width)
        self.blocks, self.head = nn.ModuleList(blocks), head
        self.positions = nn.Parameter(torch.zeros(1, CONTEXT_LENGTH, width))

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.token_embedding(input_ids) + self.positions[:, :length]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, later)
        # The end of the text has the largest id
        return self.head(x[torch.arange(len(x), device=x.device), input_ids.argmax(dim=1)])


class ImageBind(DualEncoder):
    """One of ImageBind's towers with the text tower, for evaluation.

    `project` and `project_text` return the outputs of ImageBind's heads: their norms are the towers' scales, and those
    of a sample's views are averaged. `logit_scale` is the product of both scales.
    """

    def __init__(self, tower: VisionTower, text: TextTower):
        nn.Module.__init__(self)  # DualEncoder's own would build other towers
        self.vision_model, self.text_model = cast(Any, tower), text
        self.text_projection = nn.Identity()
        self.embed_dim = tower.head.projection.out_features
        self.logit_scale = nn.Parameter((tower.head.log_logit_scale + text.head.log_logit_scale).float())
        if isinstance(tower.pre_norm, nn.Identity):  # all but the vision tower were trained with its features alone
            self.trained_with = ("image", "video")
        self.eval().requires_grad_(False)

    def project(self, inputs: Tensor) -> Tensor:
        patches: Any = self.vision_model.patches
        x, frames = inputs.to(patches.weight.dtype), patches.kernel_size[0]
        x = x.expand(-1, -1, frames, -1, -1) if x.shape[2] == 1 else x  # a picture
        # View by view, so that a video needs no more memory than a picture
        return torch.stack([self.vision_model(view) for view in x.split(frames, dim=2)]).mean(dim=0)


def load_imagebind(
    source: str | Path, modality: str | None = None, num_frames: int | None = None
) -> list[tuple[DualEncoder, Modality]]:
    """Return the models of `imagebind:FILE` and their modalities, one or all, which share towers."""
    if num_frames is not None:
        raise UserError(f"{source} takes frames in its own way: leave out num_frames (--num-frames)")
    if modality not in (None, *TOWERS):
        raise UserError(f"{source} is for {', '.join(TOWERS)}, not {modality}")
    path = str(source).removeprefix(IMAGEBIND)
    states = _split(tensors_of(read_file(path), path), path)
    names = [modality] if modality else list(TOWERS)
    towers: Any = {tower: _build(tower, states, path) for tower in {"text", *(TOWERS[name] for name in names)}}
    return [(ImageBind(towers[TOWERS[name]], towers["text"]), PREPROCESSING[name]()) for name in names]


def _split(content: State, path: str) -> dict[str, State]:
    """Return the weights of each tower under the names here. Raises `UserError` if there are other towers."""
    states: dict[str, State] = {}
    for key, value in content.items():
        part, tower, rest = [*key.removeprefix("modality_").split(".", 2), "", ""][:3]
        name = f"{part}.{rest}"
        for pattern, ours in NAMES:
            name = re.sub(f"^{pattern}", ours, name)
        one_frame = name == "patches.weight" and value.ndim == 4
        value = value.clamp(max=math.log(100)) if name == "head.log_logit_scale" else value
        states.setdefault(tower, {})[name] = value.unsqueeze(2) if one_frame else value
    if states.keys() - {"imu"} != NUM_HEADS.keys():  # motion sensors are left out
        raise UserError(f"{path} is not a checkpoint of ImageBind: its parts are {', '.join(sorted(states)[:9])}")
    states["text"].pop("mask", None)  # a constant
    states["vision"]["head.log_logit_scale"] = torch.zeros(())  # these features have unit norm
    return states


def _build(name: str, states: dict[str, State], path: str) -> nn.Module:
    """Return a tower. Raises `WeightsError` if the names or shapes of its weights are not those of ImageBind."""
    state, depth = states[name], len({key.split(".")[1] for key in states[name] if key.startswith("blocks.")})
    try:
        embed_dim, width = len(states["text"]["head.projection.weight"]), state["positions"].shape[-1]
    except KeyError as error:
        raise WeightsError(f"{path} is not a checkpoint of ImageBind: its {name} tower lacks {error}") from error
    with torch.device("meta"):
        blocks = [Block(width, NUM_HEADS[name], 4 * width, name not in ("vision", "text")) for _ in range(depth)]
        head = Head(width, embed_dim)
        tower: Any = TextTower(width, blocks, head) if name == "text" else VisionTower(name, width, blocks, head)
    load_strict(tower, state, f"ImageBind's {name} tower", assign=True)
    return tower


@dataclass(frozen=True)
class ImageBindAudio(modality_class("audio")):  # type: ignore[misc]
    """Clips, evenly spaced from start to end, as padded mel spectrograms (1, clips, num_mel_bins, target_length)."""

    name: ClassVar = "audio"
    num_mel_bins: int = 128
    target_length: int = 204
    audio_mean: float = -4.268
    audio_std: float = 4.569
    channels: Literal["mix", "first"] = "first"
    clips: int = 3
    clip_seconds: float = 2.0

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (1, self.clips, self.num_mel_bins, self.target_length)

    def transform(self, raw: tuple[Tensor, int], rng: torch.Generator | None = None) -> Tensor:
        waveform, length = self._resample(*raw), int(self.clip_seconds * self.sample_rate)
        starts = np.linspace(0, max(waveform.shape[1] - length, 0), self.clips).astype(int).tolist()
        frames = [self._frames((waveform[:, start : start + length], self.sample_rate)) for start in starts]
        mels = [log_mel(each, self.sample_rate, self.num_mel_bins).T for each in frames]
        x = torch.stack([F.pad(mel, (0, self.target_length - mel.shape[1])) for mel in mels])
        return ((x - self.audio_mean) / (2 * self.audio_std))[None]


ONE_CHANNEL = property(lambda self: (1, 1, self.image_size, self.image_size))


@dataclass(frozen=True)
class ImageBindDepth(modality_class("depth")):  # type: ignore[misc]
    """Depth maps as the disparity of a stereo camera in pixels, `baseline * focal_length / depth`.

    The baseline in metres is Kinect's (0.095 for RealSense and Xtion); the focal length in pixels is NYU Depth v2's.
    """

    name: ClassVar = "depth"
    input_shape = ONE_CHANNEL
    details: ClassVar = {
        "preprocessing": "disparity, as in Omnivore. ImageBind's own is not published: with disparity, users measured"
        " 45 % on NYU v2 (facebookresearch/ImageBind#107; paper: 54 %) and 35 % on SUN RGB-D (#134; paper: 35.1 %)"
    }
    max_depth: float = 50.0
    baseline: float = 0.075
    focal_length: float = 518.857901
    max_disparity: float = 75.0
    image_mean: tuple[float, float, float] = (0.0418,) * 3
    image_std: tuple[float, float, float] = (0.0295,) * 3
    interpolation: Literal["bicubic", "bilinear"] = "bilinear"

    def transform(self, raw: Tensor, rng: torch.Generator | None = None) -> Tensor:
        disparity = self.baseline * self.focal_length / raw.clamp(0.01, self.max_depth or None)
        return self.fit(disparity.clamp(0.01, self.max_disparity)[None, None] / self.max_disparity, None)[:1]


@dataclass(frozen=True)
class ImageBindImage(modality_class("image")):  # type: ignore[misc]
    """RGB pictures, resized with antialiasing; by default, the EXIF orientation is ignored."""

    name: ClassVar = "image"
    antialias: bool = True
    exif: bool = False


@dataclass(frozen=True)
class ImageBindInfrared(modality_class("infrared")):  # type: ignore[misc]
    """Infrared pictures as one grey channel in 0..1."""

    name: ClassVar = "infrared"
    input_shape = ONE_CHANNEL
    details: ClassVar = {
        "preprocessing": "grey, not normalised. ImageBind's own is not published: users measured 62.4 % on LLVIP"
        " without normalisation and 55.2 % with it (facebookresearch/ImageBind#73; paper: 63.4 %)"
    }
    image_mean: tuple[float, float, float] = (0.0,) * 3
    image_std: tuple[float, float, float] = (1.0,) * 3
    antialias: bool = True

    def transform(self, raw: Tensor, rng: torch.Generator | None = None) -> Tensor:
        from torchvision.transforms.functional import rgb_to_grayscale

        return self.fit(rgb_to_grayscale(self._unit_range(raw))[None], None)[:1]


@dataclass(frozen=True)
class ImageBindVideo(modality_class("video")):  # type: ignore[misc]
    """The first and last frame of clips, evenly spaced from start to end, in squares along the longer side.

    `num_frames` is two per clip. Frames in files of their own or in memory have no rate, so these are evenly spaced.
    """

    name: ClassVar = "video"
    num_frames: int = 10
    clip_seconds: float = 2.0
    crops: int = 3

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (3, self.num_frames * self.crops, self.image_size, self.image_size)

    def transform(self, raw: Tensor, rng: torch.Generator | None = None) -> Tensor:
        size, scale, sides = self.image_size, 255 if raw.dtype == torch.uint8 else 1, raw.shape[2:]
        resized = [size * side // min(sides) for side in sides]
        frames = torch.cat([F.interpolate(frame / scale, resized, mode=self.interpolation) for frame in raw.split(1)])
        room, along = max(frames.shape[2:]) - size, 2 if frames.shape[2] > frames.shape[3] else 3
        starts = [math.ceil(room * crop / max(self.crops - 1, 1)) for crop in range(self.crops)]
        squares = torch.stack([frames.narrow(along, start, size) for start in starts])
        clips = squares.unflatten(1, (-1, 2)).transpose(0, 1)  # (clips, crops, 2, 3, size, size)
        return self.fit(clips.flatten(0, 2), None)

    def frame_indices(self, count: int, rate: Fraction | None = None) -> np.ndarray:
        if not rate:
            return super().frame_indices(count)
        clips, seconds = self.num_frames // 2, Fraction(self.clip_seconds)
        last = max(count / rate - seconds, Fraction(0))
        starts = [last * clip / max(clips - 1, 1) for clip in range(clips)]
        ends = [(math.ceil(rate * start), min(math.ceil(rate * (start + seconds)), count) - 1) for start in starts]
        return np.array(ends).flatten()


KINDS: Any = ImageBindAudio, ImageBindDepth, ImageBindImage, ImageBindInfrared, ImageBindVideo
PREPROCESSING = {kind.name: kind for kind in KINDS}
