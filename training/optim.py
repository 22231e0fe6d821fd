"""AdamW over the parameters that train, in groups, and the precision that they train in."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from languagebind.config import UserError, at_least
from languagebind.distributed import Precision

NO_DECAY = ("bias", "logit_scale", "class_embedding", "patch_embedding")  # the original's, beside what is 1-D


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    epochs: int = 1
    """passes over the training data"""
    lr: float = 5e-4
    """peak learning rate"""
    coef_lr: float = 1.0
    """factor on the learning rate of everything but LoRA adapters"""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    wd: float = 0.2
    """weight decay"""
    warmup: int = 2000
    """steps over which the learning rate rises"""
    lr_scheduler: Literal["cosine", "const"] = "cosine"
    """learning rate after warmup"""
    grad_clip_norm: float | None = None
    """clip the norm of all gradients together"""
    loss_chunk_size: int | None = None
    """rows scored at a time in the loss: less memory with a very large batch"""
    precision: Precision = "amp_bf16"
    """autocast to bfloat16, to float16 with loss scaling (amp), or none"""

    def __post_init__(self):
        at_least(1, epochs=self.epochs, loss_chunk_size=self.loss_chunk_size)
        at_least(0, lr=self.lr, coef_lr=self.coef_lr, wd=self.wd, warmup=self.warmup)
        at_least(1e-30, eps=self.eps, grad_clip_norm=self.grad_clip_norm)
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"beta1 and beta2 should be in [0, 1), got {self.beta1} and {self.beta2}")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with a group for each of adapters / other and decayed / not; each group keeps its `base_lr`.

    Raises:
        ValueError: nothing trains.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(word in name for word in NO_DECAY)
            groups.setdefault(("lora_" in name, decays), []).append(parameter)
    if not groups:
        raise ValueError("no parameter trains")
    options = []
    for (is_lora, decays), parameters in groups.items():
        lr = config.lr if is_lora else config.lr * config.coef_lr
        options.append({"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": config.wd if decays else 0.0})
    return torch.optim.AdamW(options, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale the learning rate of every group from its own base."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss for float16; does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "amp")
