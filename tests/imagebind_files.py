"""Checkpoints in the layout of `imagebind_huge.pth`, of any size, and inputs, the same with any version of PyTorch."""

import math
import zlib

import numpy as np
import torch

# Width and depth of each tower; 48 is a multiple of all numbers of heads
HUGE = {
    "vision": (1280, 32), "text": (1024, 24), "audio": (768, 12), "depth": (384, 12), "thermal": (768, 12),
    "imu": (512, 6),
}  # fmt: skip
SMALL = dict.fromkeys(HUGE, (48, 2))
POSITIONS = {"vision": 257, "text": 77, "audio": 229, "depth": 197, "thermal": 197, "imu": 251}
PATCHES = {"vision": (3, 2, 14, 14), "audio": (1, 16, 16), "depth": (1, 16, 16), "thermal": (1, 16, 16), "imu": (48,)}
SCALES = {"text": 54.0, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
TEXTS = ["a dog runs over the grass", "Two cats sleep on a red sofa, purring!"]
INPUTS = {
    "image": (2, 3, 1, 224, 224), "video": (2, 3, 6, 224, 224), "audio": (2, 1, 3, 128, 204),
    "depth": (2, 1, 1, 224, 224), "infrared": (2, 1, 1, 224, 224),
}  # fmt: skip


def shapes(sizes, embed_dim):
    """The shape of each weight, by name."""
    found = {}
    for tower, (width, depth) in sizes.items():
        start, head, trunk = (f"modality_{part}.{tower}" for part in ("preprocessors", "heads", "trunks"))
        stem = f"{start}.{tower if tower in ('depth', 'imu') else 'rgbt'}_stem"
        norms = [f"{trunk}.blocks.{number}.norm_{k}" for number in range(depth) for k in (1, 2)]
        if tower == "text":
            found |= {f"{start}.mask": (77, 77), f"{start}.token_embedding.weight": (49408, width)}
            found |= {f"{head}.proj.1.weight": (embed_dim, width), f"{start}.pos_embed": (1, 77, width)}
            norms.append(f"{head}.proj.0")
        else:
            helper = "" if tower == "imu" else "pos_embedding_helper."
            found |= {f"{start}.cls_token": (1, 1, width), f"{start}.{helper}pos_embed": (1, POSITIONS[tower], width)}
            found[f"{stem}.proj{'.1' * (tower == 'vision')}.weight"] = (width, *PATCHES[tower])
            found[f"{head}.{3 if tower == 'imu' else 2}.weight"] = (embed_dim, width)
            norms += [f"{head}.0", f"{trunk}.pre_transformer_layer.0" if tower == "vision" else f"{stem}.norm_layer"]
        if tower != "vision":
            found[f"modality_postprocessors.{tower}.1.log_logit_scale"] = ()
        layers = dict.fromkeys(norms, (width,))
        for block in (f"{trunk}.blocks.{number}" for number in range(depth)):
            layers |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
            layers[f"{block}.attn.out_proj"] = (width, width)
            found |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            if tower not in ("vision", "text"):
                found |= {f"{block}.attn.bias_{k}": (1, 1, width) for k in "kv"}
        for name, shape in layers.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def small_state():
    """A checkpoint of 2 blocks in each tower, with features of size 16."""
    state = {}
    for name, shape in shapes(SMALL, 16).items():
        value = noise(name, shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        if name.endswith("log_logit_scale"):
            value = torch.tensor(math.log(SCALES[name.split(".")[1]]))
        elif name.endswith("mask"):
            value = torch.full(shape, -torch.inf).triu(1)
        elif name.endswith("weight") and len(shape) == 1:  # of a norm
            value = value + 1
        state[name] = value
    return state


def noise(name, shape):
    """Random numbers that the name decides."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.tensor(drawn, dtype=torch.float32)
