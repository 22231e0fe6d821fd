"""Weights from files and from open_clip, renamed to the published parameter names and loaded strictly.

These are `vision_model.…`, `visual_projection.weight`, `text_model.…`, `text_projection.weight` and `logit_scale`.
"""

import difflib
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UserError, at_least, first_line
from .files import POINTER, is_pointer
from .lora import merge_lora

log = logging.getLogger(__name__)

State = dict[str, Tensor]

# Part of an open_clip parameter name -> part of the published name. The packed in_proj is split separately.
TOWER_NAMES = {
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    "conv1.": "embeddings.patch_embedding.",
    "class_embedding": "embeddings.class_embedding",
    "token_embedding.": "embeddings.token_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "ln_final.": "final_layer_norm.",
}
# The projections are renamed separately, and the mask is not a weight
UNNAMED = ("proj", "text_projection", "attn_mask")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|_orig_mod\.")  # of DDP, DataParallel and torch.compile

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # OpenCLIP's names


class WeightsError(UserError):
    """Weights do not fit the model; the message lists the keys."""


def load_strict(module: nn.Module, state: State, what: str, allow_partial: bool = False, assign: bool = False) -> None:
    """Load `state` into `module`, which must have exactly the same keys and shapes; `what` names it in messages.

    `allow_partial`: load the weights that fit and log the others. `assign`: use the tensors themselves, not copies.
    Raises `WeightsError` if keys are missing or unexpected, or shapes differ.
    """
    own = module.state_dict()
    misfits = [key for key in own if key in state and state[key].shape != own[key].shape]
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [f"{k}: {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in misfits],
    }
    report = "\n".join(_listing(kind, keys) for kind, keys in problems.items() if keys)
    if report and not allow_partial:
        raise WeightsError(f"the weights do not fit {what}:\n{report}")
    if report:
        log.warning("loaded %s only in part:\n%s", what, report)
    fitting = {key: value for key, value in state.items() if key in own and key not in misfits}
    module.load_state_dict(fitting, strict=not report, assign=assign)


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of a name (`float16`, `torch.float16`, `fp16`), or None for `auto`: keep the file's dtype."""
    if name is None or name == "auto":
        return None
    found = getattr(torch, DTYPES.get(name, name.removeprefix("torch.")), None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {name!r} is not a floating-point type; use float32, bfloat16 or float16")
    return found


def read_state(path: str | Path) -> State:
    """Return the tensors of a `.safetensors`, `.bin`, `.pt` or `.pth` file, or of an export, under the published names.

    Adapters in this library's checkpoints are merged, and the moving average, if any, replaces the weights. Pickled
    code never runs. Raises `UserError` if the file is missing or damaged, or contains anything but tensors.
    """
    content = read_file(Path(path, "model.safetensors") if Path(path).is_dir() else path)
    if isinstance(content, dict) and "text_fingerprint" in content:
        state = published_names(content["model"] | content.get("ema", {}))
        return merge_lora(state, content["config"]["model"]["tuning"]["lora_alpha"])
    return published_names(tensors_of(content, path))


def read_file(path: str | Path) -> Any:
    """Return the content of a `.safetensors`, `.bin`, `.pt` or `.pth` file, memory-mapped if the format allows it.

    Raises `UserError` if the file is missing or damaged, or contains anything but tensors and plain values.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of PyTorch before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds of errors for damaged files
        raise unreadable(path, error) from error


def tensors_of(content: Any, path: str | Path) -> State:
    """Return the state dict in a file's content, which may be under `model` or `state_dict`, or raise `UserError`."""
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not content or not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"{path} does not contain a state dict of tensors; of a run of several modalities, export one")
    return content


def unreadable(path: str | Path, error: Exception) -> UserError:
    """Return the error for an unreadable weights file, without torch's advice to run the code in the file."""
    if isinstance(error, OSError):
        return UserError(f"cannot read {path}: {error.strerror or error}")
    if is_pointer(path):
        return UserError(f"cannot read {path}: {POINTER}")
    if isinstance(error, pickle.UnpicklingError):
        return UserError(f"{path} contains something other than tensors and plain values; save only a state dict")
    return UserError(f"{path} is damaged or is not a weights file: {first_line(error)}")


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Update a `hashlib` hash with the name, dtype, shape and values of a tensor."""
    tensor = tensor.detach().to("cpu", copy=True).contiguous()  # FSDP cannot free memory that NumPy has seen
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)


def published_names(state: State) -> State:
    """Rename the keys of wrappers, PEFT, Hugging Face and open_clip to the published names; drop `position_ids`."""
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    if "visual.conv1.weight" in state:
        state = _from_open_clip(state)
    elif any(f"{prefix}blocks.0.norm1.weight" in state for prefix in ("visual.trunk.", "")):
        state = _from_timm(state)
    state = {key.replace("encoder.base_model.model.", "encoder."): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


def open_clip_model(
    name: str, pretrained: str | None, cache_dir: str | None = None, sizes_only: bool = False
) -> nn.Module:
    """Return an open_clip model with its pretrained weights, on the CPU in float32.

    With `sizes_only`, it is on the meta device, without weights. Raises `UserError` if open_clip does not know the
    model or tag, or the file does not fit the model.
    """
    import open_clip

    options = {"load_weights": False, "pretrained_text": False} if sizes_only else {"require_pretrained": True}
    device = torch.device("meta" if sizes_only else "cpu")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING if sizes_only else disabled)  # open_clip warns that the weights are random
    try:
        with device:
            tag = None if ":" in name else pretrained  # a folder or repository comes with its weights
            return open_clip.create_model(name, tag, device=device, cache_dir=cache_dir, **options).eval()
    except (RuntimeError, ValueError, OSError) as error:
        models, reason = open_clip.list_models(), first_line(error)
        tags = open_clip.list_pretrained_tags_by_model(name)
        hint = f"known tags: {', '.join(tags) or 'none'}"
        if pretrained in tags:
            hint = "the tag is right, but its weights are not in the cache and could not be downloaded"
        if ":" not in name and name not in models:
            reason, near = "there is no such model", difflib.get_close_matches(name, models, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise UserError(f"open_clip cannot load {name} with weights {pretrained}: {reason} ({hint})") from error
    finally:
        logging.disable(disabled)


def openai_clip(state: State, sizes_only: bool = False) -> nn.Module:
    """Return an open_clip model in float32 with a CLIP's weights under OpenAI's names, or with its sizes only."""
    import open_clip

    device = torch.device("meta" if sizes_only else "cpu")
    state = {key: value.to(device).float() for key, value in state.items()}
    with device:
        model = open_clip.model.build_model_from_openai_state_dict(dict(state)).float()  # rounds to float16 itself
    model.load_state_dict(state, strict=False)  # it was strict itself; OpenAI's files have sizes beside the weights
    return model


def open_clip_pixels(name: str, pretrained: str | None) -> dict[str, Any]:
    """Return the preprocessing that open_clip records for a tag, or else for the model's first tag, if any."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    return open_clip.get_pretrained_cfg(name, pretrained if pretrained in tags else next(iter(tags), ""))


def init_encoder(vision_model: Any, visual_projection: nn.Module, state: State, allow_partial: bool = False) -> None:
    """Initialise a vision encoder and its projection from another model's vision weights, such as CLIP's.

    Positions are resized to the encoder's grid. Attention over frames starts as a copy of the attention over tokens. A
    3-D patch embedding and class tokens per frame start as copies of the 2-D embedding and the single class token.
    """
    encoder = nn.ModuleDict({"vision_model": vision_model, "visual_projection": visual_projection})
    state = {key: value for key, value in state.items() if key.startswith(("vision_model.", "visual_projection."))}
    for key, own in encoder.state_dict().items():
        if key not in state and "temporal" in key:
            spatial = key.replace("temporal_attn", "self_attn").replace("temporal_layer_norm1", "layer_norm1")
            # The frame embedding has no spatial counterpart and stays random
            state[key] = state.get(spatial, own)
        elif key.endswith("position_embedding.weight") and key in state:
            state[key] = resize_positions(state[key], len(own), vision_model.embeddings.grid)
        elif key.endswith("patch_embedding.weight") and key in state and own.ndim > state[key].ndim:
            state[key] = state[key].unsqueeze(2)
        elif key.endswith("class_embedding") and key in state and own.ndim > state[key].ndim:
            state[key] = state[key].expand_as(own)
        elif key.endswith("trunk.pos_embed") and key in state:
            state[key] = resize_positions(state[key][0], len(own[0]), vision_model.trunk.patch_embed.grid_size)[None]
        elif key == "visual_projection.bias" and key not in state:
            state[key] = own  # open_clip's projections may lack it
    load_strict(encoder, state, "the encoder", allow_partial)


def interpolate_frames(state: State, num_frames: int) -> State:
    """Resize the frame embeddings, and any class tokens per frame, to another number of frames, at least 2."""
    at_least(2, num_frames=num_frames)  # a single frame has nothing to attend to
    if not any(key.endswith("temporal_embedding") for key in state):
        raise UserError(f"num_frames cannot be {num_frames}: there is no attention over frames and no temporal head")
    state = dict(state)
    for key, value in state.items():
        if key.endswith("temporal_embedding") or (key.endswith("class_embedding") and value.ndim == 2):
            rows = value.reshape(1, *value.shape[-2:]).transpose(1, 2).float()  # (1, D, T)
            rows = F.interpolate(rows, num_frames, mode="linear", align_corners=True).transpose(1, 2)
            state[key] = rows.reshape(*value.shape[:-2], num_frames, value.shape[-1]).to(value.dtype)
    return state


def clip_text_state(state: State) -> State:
    """Rename the text weights of an open_clip CLIP to the published names; transpose the text projection."""
    if "positional_embedding_res" in state:  # Long-CLIP's (arXiv 2403.15378) positions after the first 20
        state = dict(state)
        later = state.pop("positional_embedding_res")[20:]
        state["positional_embedding"] = torch.cat([state["positional_embedding"][:20], later])
    renamed = _rename_tower({key: value for key, value in state.items() if not key.startswith(("visual.", "logit_"))})
    renamed = {f"text_model.{key}": value for key, value in renamed.items()}
    return renamed | {"text_projection.weight": state["text_projection"].T.contiguous()}


def _from_open_clip(state: State) -> State:
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    renamed = {f"vision_model.{key}": value for key, value in _rename_tower(visual).items()}
    renamed["visual_projection.weight"] = visual["proj"].T.contiguous()
    renamed |= _text_from_open_clip(state)
    return renamed | {key: state[key] for key in ("logit_scale",) if key in state}


def _text_from_open_clip(state: State) -> State:
    """Rename the text weights of an open_clip model; return none if they are not those of a CLIP's tower."""
    text = {key.removeprefix("text."): value for key, value in state.items()}
    return clip_text_state(text) if {"text_projection", "token_embedding.weight"} <= text.keys() else {}


def _from_timm(state: State) -> State:
    """Rename a timm model, or an open_clip model with one, in which SigLIP's features have no projection."""
    if "blocks.0.norm1.weight" in state:  # its head is a projection, or a classifier
        state = {f"visual.trunk.{key}": value for key, value in state.items()}
    renamed = {re.sub(r"^visual\.(trunk\.head|head\.proj)\.", "visual_projection.", key): state[key] for key in state}
    renamed = {re.sub(r"^visual\.", "vision_model.", key): value for key, value in renamed.items()}
    if "logit_bias" in state:
        renamed.setdefault("visual_projection.weight", torch.eye(len(state["visual.trunk.blocks.0.norm1.weight"])))
    return renamed | _text_from_open_clip(state)


def _rename_tower(state: State) -> State:
    renamed = {}
    for key, value in state.items():
        name = key
        for theirs, ours in TOWER_NAMES.items():
            name = name.replace(theirs, ours)
        if "in_proj_" in name:
            for projection, part in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("in_proj_", f"{projection}_proj.")] = part.clone()
        elif key not in UNNAMED:
            renamed[name] = value
    return renamed


def resize_positions(positions: Tensor, count: int, grid: tuple[int, int], old: Any = None) -> Tensor:
    """Resize positions (P + N, D) of a grid, by default a square, to (count, D); keep those of P class tokens."""
    prefix = count - grid[0] * grid[1]
    side = int((len(positions) - prefix) ** 0.5)
    if old is None and (len(positions) == count or side * side != len(positions) - prefix):
        return positions  # without a square grid, the strict load reports the two shapes
    pixels = positions[prefix:].float().T.reshape(1, -1, *(old or (side, side)))
    # As in the original LanguageBind code; another interpolation gives other initial weights
    pixels = F.interpolate(pixels, grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([positions[:prefix], pixels.flatten(2)[0].T.to(positions.dtype)])


def _listing(kind: str, keys: list[str], most: int = 20) -> str:
    rest = [f"  ... and {len(keys) - most} more"] if len(keys) > most else []
    return "\n".join([f"{len(keys)} {kind}:", *(f"  {key}" for key in keys[:most]), *rest])
