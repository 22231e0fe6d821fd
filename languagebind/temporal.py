"""CLIP4Clip's heads (arXiv 2104.08860): from the features of a clip's frames to one feature of the clip.

A head takes frames after the projection into the shared space. Shapes: B batch, T frames, D width of that space.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UserError
from .transformer import QuickGELU
from .weights import State

MAX_FRAMES = 77  # CLIP4Clip has a position for each token of CLIP's texts
HEAD_WIDTH = 64


class MeanHead(nn.Module):
    """Mean of the unit-norm features of the frames."""

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Return the features (B, D) of clips, of any norm, for those of the frames (B, T, D) in the `mask` (B, T)."""
        x = F.normalize(self.mix(frames, mask).float(), dim=-1) * mask.unsqueeze(-1)
        return x.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)

    def mix(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Return features (B, T, D) of the frames in their context."""
        return frames


class LstmHead(MeanHead):
    """An LSTM over the frames, with a residual. Skipped frames come last, so they do not reach the others."""

    def __init__(self, width: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def mix(self, frames: Tensor, mask: Tensor) -> Tensor:
        return frames + self.lstm(frames)[0]


class TransformerHead(MeanHead):
    """A transformer of CLIP's blocks over the frames with positions, and a residual around both."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.positions = nn.Embedding(MAX_FRAMES, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        sizes = (width, width // HEAD_WIDTH, 4 * width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(*sizes, 0.0, QuickGELU(), 1e-12, batch_first=True, norm_first=True)  # no dropout
            for _ in range(depth)
        )

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return tokens (B, L, D) after the blocks, which leave out those that are not in the `mask` (B, L)."""
        x = x + self.positions.weight[: x.shape[1]].to(x.dtype)
        mask = mask | ~mask.any(dim=1, keepdim=True)  # attention to nothing would give NaN
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        return x

    def mix(self, frames: Tensor, mask: Tensor) -> Tensor:
        return frames + self.attend(frames, mask)


class PairHead(TransformerHead):
    """Scores pairs of a text and a clip with a transformer (tightTransf). To find candidates, it is a `MeanHead`."""

    def __init__(self, width: int, depth: int):
        super().__init__(width, depth)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dense, self.activation, self.score = nn.Linear(width, width), QuickGELU(), nn.Linear(width, 1)

    def mix(self, frames: Tensor, mask: Tensor) -> Tensor:
        return frames

    def pairs(self, texts: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """Return the scores (B,) of projected texts (B, D) with frames (B, T, D), of which `mask` (B, T) are real."""
        tokens = torch.cat([texts.unsqueeze(1), frames], dim=1)
        x = self.attend(tokens, F.pad(mask, (1, 0), value=True))[:, 0]
        return self.score(self.activation(self.dense(self.norm(x)))).squeeze(1)


def build_head(name: str | None, width: int, depth: int, num_frames: int) -> MeanHead | None:
    """Return the head called `name`, for clips of `num_frames` frames with features of `width`; None without one."""
    if name in ("transformer", "pairs"):
        most = MAX_FRAMES - (name == "pairs")  # the text has a position, too
        if num_frames > most:
            raise UserError(f"--temporal-head {name} takes at most {most} frames, not {num_frames}")
        return TransformerHead(width, depth) if name == "transformer" else PairHead(width, depth)
    if name == "lstm":
        return LstmHead(width)
    return None if name is None else MeanHead()


def real_frames(inputs: Tensor) -> Tensor:
    """Return a mask (B, T) of inputs (B, C, T, H, W), false for padding frames, which are zeros."""
    return inputs.ne(0).flatten(3).any(dim=3).any(dim=1)


def head_from_text(head: nn.Module, text: State) -> State:
    """Return a transformer head's weights from CLIP's text tower, as CLIP4Clip starts, or {} if they do not fit."""
    found = {}
    for key, value in head.state_dict().items():
        name = f"text_model.encoder.{key.replace('norm', 'layer_norm').replace('linear', 'mlp.fc')}"
        if key == "positions.weight":
            name = "text_model.embeddings.position_embedding.weight"
        names = [name.replace("in_proj_", f"{part}_proj.") for part in "qkv"] if "in_proj_" in name else [name]
        if not text.keys() >= set(names) or sum(len(text[each]) for each in names) != len(value):
            return {}
        found[key] = torch.cat([text[each] for each in names])
    return found
