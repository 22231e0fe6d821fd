"""Choose the parameters to train. Only full tuning trains position and patch embeddings.

The text tower is frozen unless `tune_text` is on, which trains all of it. A temporal head always trains.

"Class token" includes registers, and "post norm" attention pooling, in timm's models.

| mode    | in the encoder's blocks                                             | elsewhere in the encoder            |
|---------|---------------------------------------------------------------------|-------------------------------------|
| lora    | adapters; with frames, also the temporal embedding and its norm     | class token, post norm, projection  |
| partial | attention over frames (all of it), else attention over tokens       | class token, post norm, projection  |
| full    | everything                                                          | everything                          |
| head    | nothing                                                             | post norm, projection               |

The logit scale trains in every mode unless `learn_temperature` is off. The original code calls `partial` full tuning.
"""

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .config import UserError, at_least
from .lora import inject_lora

# Names of the parts of our own ViT and of timm's models, which begin with `trunk.`
HEAD = re.compile(r"(vision_model\.(post_layernorm|trunk\.(norm|fc_norm|attn_pool))|visual_projection)\.")
CLASS_TOKEN = re.compile(r"vision_model\.(embeddings\.class_embedding|trunk\.(cls|reg|dist)_token)")
BLOCK = re.compile(r"vision_model\.(?:encoder\.layers|trunk\.blocks)\.(\d+)\.")
ATTENTION = re.compile(BLOCK.pattern + r".*attn\.")


@dataclass(frozen=True)
class TuningConfig:
    """Which parameters train."""

    tuning: Literal["lora", "partial", "full", "head"] = "lora"
    """parts to train: LoRA adapters, attention ("full" in the original code), the whole encoder, or the projection"""
    lora_rank: int = 16
    """rank of the LoRA adapters"""
    lora_alpha: float = 16.0
    """scale of the LoRA adapters, divided by lora_rank"""
    lora_dropout: float = 0.0
    """dropout on the inputs of LoRA adapters"""
    tune_text: bool = False
    """train the text tower, too; its features are then not cached, and checkpoints hold it"""
    learn_temperature: bool = True
    """train the logit scale"""

    def __post_init__(self):
        at_least(1, lora_rank=self.lora_rank)
        at_least(0, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout)


def apply_tuning(model: nn.Module, config: TuningConfig) -> None:
    """Inject adapters for LoRA tuning, and set `requires_grad` on every parameter of a `DualEncoder`."""
    if config.tuning in ("lora", "partial") and not any(ATTENTION.match(name) for name, _ in model.named_parameters()):
        raise UserError(f"--tuning {config.tuning} finds no attention weights in this tower; use full or head")
    if config.tuning == "lora":
        inject_lora(model.get_submodule("vision_model"), config.lora_rank, config.lora_alpha, config.lora_dropout)
    temporal = any("temporal_attn" in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(name, config, temporal))


def _trains(name: str, config: TuningConfig, temporal: bool) -> bool:
    if name in ("logit_scale", "logit_bias"):
        return config.learn_temperature
    if name.startswith(("text_model.", "text_projection.")):
        return config.tune_text
    if name.startswith("temporal_head."):
        return True
    if config.tuning in ("full", "head"):
        return config.tuning == "full" or HEAD.match(name) is not None
    if HEAD.match(name) or CLASS_TOKEN.match(name):
        return True
    if config.tuning == "lora":
        return "lora_" in name or "temporal_embedding" in name or "temporal_layer_norm1" in name
    return "temporal" in name if temporal else ATTENTION.match(name) is not None
