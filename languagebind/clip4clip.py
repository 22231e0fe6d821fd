"""CLIP4Clip's checkpoints (github.com/ArrowLuo/CLIP4Clip), `clip4clip:FILE`: a CLIP and a head over its frames.

`pytorch_model.bin.N` is a state dict with `clip.` before OpenAI's names of CLIP's weights, beside those of the head.
The file does not name the head (`--sim_header`); its keys tell.
"""

import re
from typing import Any

from torch import nn

from .config import UserError
from .weights import WRAPPERS, State, open_clip_model, openai_clip, read_file, tensors_of

CLIP4CLIP = "clip4clip:"
# Part of the name of a head's parameter -> part of ours
NAMES = {
    r"^transformerClip\.resblocks\.": "layers.",
    r"^frame_position_embeddings\.": "positions.",
    r"^lstm_visual\.": "lstm.",
    r"^cross\.embeddings\.position_embeddings\.": "positions.",
    r"^cross\.transformer\.resblocks\.": "layers.",
    r"^cross\.pooler\.ln_pool\.": "norm.",
    r"^cross\.pooler\.dense\.": "dense.",
    r"^similarity_dense\.": "score.",
    r"\.attn\.": ".self_attn.",
    r"\.ln_": ".norm",
    r"\.mlp\.c_fc\.": ".linear1.",
    r"\.mlp\.c_proj\.": ".linear2.",
}
LSTM = "lstm_visual.weight_ih_l0"  # only in a checkpoint with seqLSTM
# How its frames are read, in training and evaluation
INPUTS = {"num_frames": 12, "frames_per_second": 1.0, "interpolation": "bicubic", "antialias": True}


def clip_model(name: str, pretrained: str | None, cache_dir: str | None = None, sizes_only: bool = False) -> nn.Module:
    """Return the CLIP in a checkpoint of CLIP4Clip, or else an open_clip model; see `open_clip_model`."""
    if not name.startswith(CLIP4CLIP):
        return open_clip_model(name, pretrained, cache_dir, sizes_only)
    try:
        return openai_clip(_read(name)[0], sizes_only)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"the CLIP in {name} cannot be used: {' '.join(str(error).split())}") from error


def read_head(name: str) -> tuple[dict[str, Any], State]:
    """Return the encoder's options for the head of `clip4clip:FILE`, and the head's weights under our names."""
    _, state = _read(name)
    if LSTM in state:
        state.pop("frame_position_embeddings.weight", None)  # in the file, but not used
    found = {}
    for key, value in state.items():
        for theirs, ours in NAMES.items():
            key = re.sub(theirs, ours, key)
        found[f"temporal_head.{key}"] = value.float()
    if blocks := {key.split(".")[2] for key in found if key.startswith("temporal_head.layers.")}:
        kind = "pairs" if "temporal_head.score.weight" in found else "transformer"
        return {"temporal_head": kind, "temporal_head_depth": len(blocks)}, found
    return {"temporal_head": "lstm" if LSTM in state else "mean"}, found


def _read(name: str) -> tuple[State, State]:
    """Return the weights of CLIP and those of the head, under their own names."""
    path = name.removeprefix(CLIP4CLIP)
    state = {WRAPPERS.sub("", key): value for key, value in tensors_of(read_file(path), path).items()}
    if "clip.visual.conv1.weight" not in state:
        raise UserError(f"{path} is not a checkpoint of CLIP4Clip: it lacks clip.visual.conv1.weight")
    if "clip.visual.conv2.weight" in state:
        raise UserError(f"{path} was trained with --linear_patch 3d, which is not supported: use a 2d one")
    clip = {key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")}
    return clip, {key: value for key, value in state.items() if not key.startswith("clip.")}
