"""Small checkpoints in CLIP4Clip's layout, and what its paper says of its heads, one clip at a time."""

from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

WIDTH = 64
VISION = {"image_size": 32, "layers": 2, "width": WIDTH, "patch_size": 16, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 1, "layers": 5}


def write_clip4clip(path: Path, head: str, blocks: int = 2) -> tuple[open_clip.CLIP, dict[str, Tensor]]:
    """Write `pytorch_model.bin.N` with random weights; return its CLIP, and the head's weights under its names."""
    torch.manual_seed(len(head))
    clip = open_clip.CLIP(embed_dim=WIDTH, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).eval()
    for name, parameter in clip.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "ln" in name and "weight" in name else 0.0, 0.1)
    if head == "tightTransf":
        weights = {"cross.embeddings.position_embeddings.weight": torch.randn(77, WIDTH) / 4}
        for name, shape in {"cross.pooler.ln_pool": (WIDTH,), "cross.pooler.dense": (WIDTH, WIDTH),
                            "similarity_dense": (1, WIDTH)}.items():  # fmt: skip
            weights |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    else:
        weights = {} if head == "meanP" else {"frame_position_embeddings.weight": torch.randn(77, WIDTH) / 4}
    if head == "seqLSTM":
        weights |= {f"lstm_visual.{key}": x for key, x in nn.LSTM(WIDTH, WIDTH).state_dict().items()}
    prefix = {"seqTransf": "transformerClip", "tightTransf": "cross.transformer"}.get(head)
    if prefix:
        for number in range(blocks):
            for key, value in clip.transformer.resblocks[number].state_dict().items():
                noise = torch.randn_like(value) / 8
                weights[f"{prefix}.resblocks.{number}.{key}"] = noise + (1 if key.endswith("ln_1.weight") else 0)
    own = {f"clip.{key}": x for key, x in clip.state_dict().items() if key != "attn_mask"}
    half = {key: x.half() if key.endswith(("_proj", "fc.weight")) else x for key, x in own.items()}  # as its files are
    clip.load_state_dict({key.removeprefix("clip."): x.float() for key, x in half.items()}, strict=False)
    torch.save(half | weights, path)
    return clip, weights


def clip_feature(frames: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The feature (D,) of one clip by the paper, for its projected frames (T, D) and the head's weights."""
    mixed = frames
    if "lstm_visual.weight_ih_l0" in weights:
        mixed = frames + lstm(frames, *(weights[f"lstm_visual.{key}_l0"] for key in LSTM))
    elif weights:
        mixed = frames + transformer(frames + weights["frame_position_embeddings.weight"][: len(frames)], weights)
    unit = torch.stack([frame / frame.norm() for frame in mixed])
    mean = unit.sum(dim=0) / len(unit)
    return mean / mean.norm()


LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def lstm(frames: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    hidden, cell, found = torch.zeros_like(frames[0]), torch.zeros_like(frames[0]), []
    for frame in frames:
        gates = weight_ih @ frame + bias_ih + weight_hh @ hidden + bias_hh
        into, forget, new, out = gates.chunk(4)
        cell = cell / (1 + torch.exp(-forget)) + torch.tanh(new) / (1 + torch.exp(-into))
        hidden = torch.tanh(cell) / (1 + torch.exp(-out))
        found.append(hidden)
    return torch.stack(found)


def pair_score(text: Tensor, frames: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The score of a projected text (D,) and the frames (T, D) of a clip by tightTransf."""
    tokens = torch.cat([text[None], frames])
    tokens = tokens + weights["cross.embeddings.position_embeddings.weight"][: len(tokens)]
    x = transformer(tokens, weights, "cross.transformer")[:1]
    x = norm(x, weights["cross.pooler.ln_pool.weight"], weights["cross.pooler.ln_pool.bias"])
    x = x @ weights["cross.pooler.dense.weight"].T + weights["cross.pooler.dense.bias"]
    x = x / (1 + torch.exp(-1.702 * x))
    return (x @ weights["similarity_dense.weight"].T + weights["similarity_dense.bias"]).squeeze()


def transformer(x: Tensor, weights: dict[str, Tensor], name: str = "transformerClip") -> Tensor:
    number = 0
    while f"{name}.resblocks.{number}.ln_1.weight" in weights:
        prefix = f"{name}.resblocks.{number}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        y = norm(x, own["ln_1.weight"], own["ln_1.bias"])
        q, k, v = (y @ own["attn.in_proj_weight"].T + own["attn.in_proj_bias"]).chunk(3, dim=1)
        size = 64  # of a head
        heads = [
            torch.softmax(q[:, a : a + size] @ k[:, a : a + size].T / size**0.5, dim=1) @ v[:, a : a + size]
            for a in range(0, q.shape[1], size)
        ]
        x = x + torch.cat(heads, dim=1) @ own["attn.out_proj.weight"].T + own["attn.out_proj.bias"]
        y = norm(x, own["ln_2.weight"], own["ln_2.bias"]) @ own["mlp.c_fc.weight"].T + own["mlp.c_fc.bias"]
        x = x + (y / (1 + torch.exp(-1.702 * y))) @ own["mlp.c_proj.weight"].T + own["mlp.c_proj.bias"]
        number += 1
    return x


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    return weight * centred / (centred.square().mean(dim=1, keepdim=True) + 1e-12).sqrt() + bias
