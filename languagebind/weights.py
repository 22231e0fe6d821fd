"""Weights from files and from open_clip, brought to the published parameter names, loaded strictly.

Names follow the published checkpoints: `vision_model.…`, `visual_projection.weight`, `text_model.…`,
`text_projection.weight`, `logit_scale`.
"""

import difflib
import logging
import pickle
import re
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UserError, first_line
from .lora import merge_lora

log = logging.getLogger(__name__)

State = dict[str, Tensor]

# open_clip's names inside a block -> ours. Its packed in_proj is split apart from these.
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
VISION_NAMES = {
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
TEXT_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # OpenCLIP's names

# What else is in an open_clip tower: the projection has its own place, the mask is made anew.
UNNAMED = ("proj", "text_projection", "attn_mask")


class WeightsError(UserError):
    """Weights and model do not fit; the message lists the keys."""


def load_strict(module: nn.Module, state: State, what: str, allow_partial: bool = False, assign: bool = False) -> None:
    """Load `state` into `module`; every key must be there, once, in the right shape.

    Args:
        what: how the report calls the module.
        allow_partial: load what fits and say what does not, in place of refusing.
        assign: make the tensors of `state` the module's own, in place of copying them.

    Raises:
        WeightsError: keys are missing, left over or of another shape.
    """
    own = module.state_dict()
    shapes = [f"{k}: {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in own if _misfit(state, own, k)]
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "left over": sorted(state.keys() - own.keys()),
        "of another shape": shapes,
    }
    report = "\n".join(_listing(kind, keys) for kind, keys in problems.items() if keys)
    if report and not allow_partial:
        raise WeightsError(f"the weights do not fit {what}:\n{report}")
    if report:
        log.warning("loaded %s only in part:\n%s", what, report)
    fitting = {key: value for key, value in state.items() if key in own and not _misfit(state, own, key)}
    module.load_state_dict(fitting, strict=not report, assign=assign)


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """A type of weights by any of its names (`float16`, `torch.float16`, `fp16`); None, that of the file, for `auto`.

    Raises:
        UserError: it is none, or holds no fractions.
    """
    if name is None or name == "auto":
        return None
    found = getattr(torch, DTYPES.get(name, name.removeprefix("torch.")), None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {name!r}: give float32, bfloat16 or float16, or torch's own")
    return found


def read_state(path: str | Path) -> State:
    """The tensors of a `.safetensors`, `.bin`, `.pt` or `.pth` file, by our names. Never runs pickled code.

    Adapters in a checkpoint of this library are merged: it says how they are scaled. Where it holds a moving average of
    the weights, these are that average.

    Raises:
        UserError: the file is missing, damaged, or holds something other than tensors.
    """
    content = read_file(path)
    alpha = None
    if isinstance(content, dict) and "text_fingerprint" in content:
        alpha = content["config"]["model"]["tuning"]["lora_alpha"]
        content = content["model"] | content.get("ema", {})
    state = published_names(tensors_of(content, path))
    return state if alpha is None else merge_lora(state, alpha)


def read_file(path: str | Path) -> Any:
    """What a `.safetensors`, `.bin`, `.pt` or `.pth` file holds, left on the disk until it is used where that can be.

    Raises:
        UserError: the file is missing, damaged, or holds something other than tensors and plain values.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of PyTorch before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        raise UserError(f"{path} {unreadable(error)}") from error


def tensors_of(content: Any, path: str | Path) -> State:
    """The state dict in what a file holds: it itself, or that of a training checkpoint, ours or the original's.

    Raises:
        UserError: there is none.
    """
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"{path} holds no state dict of tensors")
    return content


def unreadable(error: Exception) -> str:
    """Why a file of weights cannot be read, without torch's advice to run what may be in it."""
    if isinstance(error, pickle.UnpicklingError):
        return "holds something other than tensors and plain values, which is never loaded"
    return f"is damaged, or no file of weights: {first_line(error)}"


def published_names(state: State) -> State:
    """Bring the names of DDP, PEFT, Hugging Face and open_clip to the published ones; drop `position_ids`."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if "visual.conv1.weight" in state:
        state = _from_open_clip(state)
    state = {key.replace("encoder.base_model.model.", "encoder."): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


def open_clip_model(name: str, pretrained: str | None, cache_dir: str | None = None) -> nn.Module:
    """An open_clip model with its pretrained weights, on the CPU in float32.

    Raises:
        UserError: open_clip knows no such model or tag, or the file does not fit it.
    """
    import open_clip

    try:
        return open_clip.create_model(name, pretrained, cache_dir=cache_dir, require_pretrained=True).eval()
    except (RuntimeError, ValueError, OSError) as error:
        models = open_clip.list_models()
        if ":" not in name and name not in models:
            near = difflib.get_close_matches(name, models, n=3)
            hint = f", near are {', '.join(near)}" if near else ""
            raise UserError(f"open_clip has no model {name}: it is not among open_clip.list_models(){hint}") from error
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"tags for it: {', '.join(tags)}" if tags else "no tags are known for it"
        reason = first_line(error)
        raise UserError(f"open_clip cannot load {name} with weights {pretrained}: {reason} ({known})") from error


def init_encoder(model: nn.Module, state: State, allow_partial: bool = False) -> None:
    """Start the encoder and projection of a `DualEncoder` from the vision weights of a CLIP.

    Positions are resized to the encoder's grid; attention over frames starts as a copy of attention over tokens; a
    3-D patch embedding and a class token per frame start as copies of the 2-D ones.

    Raises:
        WeightsError: the weights do not fit.
    """
    state = {key: value for key, value in state.items() if key.startswith(("vision_model.", "visual_projection."))}
    own = model.state_dict()
    for key, fit in (
        ("vision_model.embeddings.position_embedding.weight", _resize_positions(model.vision_model.embeddings.grid)),
        ("vision_model.embeddings.patch_embedding.weight", lambda x, like: x.unsqueeze(2) if like.ndim > x.ndim else x),
        ("vision_model.embeddings.class_embedding", lambda x, like: x.expand_as(like) if like.ndim > x.ndim else x),
    ):
        if key in state:
            state[key] = fit(state[key], own[key])
    for key, value in own.items():
        if "temporal" in key and key not in state:
            spatial = key.replace("temporal_attn", "self_attn").replace("temporal_layer_norm1", "layer_norm1")
            # The embedding of the frame's place has no spatial twin: it keeps its random start.
            state[key] = state.get(spatial, value)
    encoder = nn.ModuleDict({"vision_model": model.vision_model, "visual_projection": model.visual_projection})
    load_strict(encoder, state, "the encoder", allow_partial)


def interpolate_frames(state: State, num_frames: int) -> State:
    """The embeddings of frames, and class tokens where each frame has its own, for another number of frames.

    Raises:
        UserError: the encoder has no attention over frames, or the number is none of frames.
    """
    if not any(key.endswith("temporal_embedding") for key in state):
        raise UserError(f"num_frames {num_frames}: this encoder has no attention over frames")
    if not isinstance(num_frames, Integral) or num_frames < 2:  # one frame has nothing to attend to
        raise UserError(f"num_frames {num_frames!r}: give a whole number from 2 on, or none for the checkpoint's")
    state = dict(state)
    for key, value in state.items():
        if key.endswith("temporal_embedding") or (key.endswith("class_embedding") and value.ndim == 2):
            rows = value.reshape(1, *value.shape[-2:]).transpose(1, 2).float()  # (1, D, T)
            rows = F.interpolate(rows, num_frames, mode="linear", align_corners=True).transpose(1, 2)
            state[key] = rows.reshape(*value.shape[:-2], num_frames, value.shape[-1]).to(value.dtype)
    return state


def clip_text_state(state: State) -> State:
    """The text tower of an open_clip CLIP by our names; `text_projection.weight` is (D, width)."""
    state = {key: value for key, value in state.items() if not key.startswith(("visual.", "logit_"))}
    renamed = _rename_tower(state, TEXT_NAMES, "text_model.encoder.layers.")
    return renamed | {"text_projection.weight": state["text_projection"].T.contiguous()}


def _from_open_clip(state: State) -> State:
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    renamed = _rename_tower(visual, VISION_NAMES, "vision_model.encoder.layers.")
    renamed["visual_projection.weight"] = visual["proj"].T.contiguous()
    text = {key.removeprefix("text."): value for key, value in state.items()}
    if "text_projection" in text and "token_embedding.weight" in text:
        renamed |= clip_text_state(text)
    return renamed | {key: state[key] for key in ("logit_scale",) if key in state}


def _rename_tower(state: State, names: dict[str, str], layers: str) -> State:
    renamed = {names[key]: value for key, value in state.items() if key in names}
    for key, value in state.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)_?(weight|bias)", key)
        if not match:
            if key not in names and key not in UNNAMED:
                renamed[f"{layers.partition('.')[0]}.{key}"] = value  # for the strict load to find
            continue
        block, name, kind = f"{layers}{match[1]}.", match[2].rstrip("._"), match[3]
        if name == "attn.in_proj":
            for projection, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{block}self_attn.{projection}_proj.{kind}"] = part.clone()
        else:
            renamed[f"{block}{BLOCK_NAMES.get(name, name)}.{kind}"] = value
    return renamed


def _resize_positions(grid: tuple[int, int]):
    def resize(positions: Tensor, like: Tensor) -> Tensor:
        """(1 + N, D) of a square grid to (1 + rows * columns, D); the class token's position stays."""
        if positions.shape == like.shape:
            return positions
        side = int((len(positions) - 1) ** 0.5)
        if side * side != len(positions) - 1:
            return positions  # no square grid: the strict load reports the two shapes
        square = positions[1:].float().T.reshape(1, -1, side, side)
        # The original's choice; another interpolation gives another starting point.
        square = F.interpolate(square, grid, mode="bicubic", align_corners=False, antialias=True)
        return torch.cat([positions[:1], square.flatten(2)[0].T.to(positions.dtype)])

    return resize


def _misfit(state: State, own: State, key: str) -> bool:
    return key in state and state[key].shape != own[key].shape


def _listing(kind: str, keys: list[str], most: int = 20) -> str:
    rest = [f"  ... and {len(keys) - most} more"] if len(keys) > most else []
    return "\n".join([f"{len(keys)} {kind}:", *(f"  {key}" for key in keys[:most]), *rest])
