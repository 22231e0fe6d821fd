"""Which parameters train. The text tower never does; positions and patch embedding only in full tuning.

| mode    | in the encoder's blocks                                             | beside them                         |
|---------|---------------------------------------------------------------------|-------------------------------------|
| lora    | adapters; over frames also the temporal embedding and its norm      | class token, post norm, projection  |
| partial | attention over frames (all of it), else attention over tokens       | class token, post norm, projection  |
| full    | everything                                                          | everything                          |
| head    | nothing                                                             | post norm, projection               |

The logit scale trains in each, unless `learn_temperature` is off. `partial` is what the original calls full tuning.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .config import UserError, at_least
from .lora import inject_lora

HEAD = ("vision_model.post_layernorm.", "visual_projection.")
BESIDE_BLOCKS = ("vision_model.embeddings.class_embedding", *HEAD)


@dataclass(frozen=True)
class TuningConfig:
    """Which parameters train."""

    tuning: Literal["lora", "partial", "full", "head"] = "lora"
    """adapters, attention alone (the original's "full"), the whole encoder, or the projection alone"""
    lora_rank: int = 16
    """inner size of an adapter"""
    lora_alpha: float = 16.0
    """adapters are scaled by lora_alpha / lora_rank"""
    lora_dropout: float = 0.0
    """share of an adapter's inputs zeroed in training"""
    learn_temperature: bool = True
    """train the logit scale"""

    def __post_init__(self):
        at_least(1, lora_rank=self.lora_rank)
        at_least(0, lora_alpha=self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is a share in [0, 1), got {self.lora_dropout}")


def apply_tuning(model: nn.Module, config: TuningConfig) -> None:
    """Inject adapters if asked for, and set `requires_grad` on every parameter of a `DualEncoder`."""
    if config.tuning == "lora":
        inject_lora(model.vision_model.encoder, config.lora_rank, config.lora_alpha, config.lora_dropout)
    temporal = any("temporal" in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(name, config, temporal))


def _trains(name: str, config: TuningConfig, temporal: bool) -> bool:
    if name in ("logit_scale", "logit_bias"):
        return config.learn_temperature
    if not name.startswith(("vision_model.", "visual_projection.")):
        return False  # the text tower
    if config.tuning in ("full", "head"):
        return config.tuning == "full" or name.startswith(HEAD)
    if name.startswith(BESIDE_BLOCKS):
        return True
    if config.tuning == "lora":
        return "lora_" in name or "temporal_embedding" in name or "temporal_layer_norm1" in name
    return "temporal" in name if temporal else "self_attn" in name
