"""The optimizer over the parameters that train, in groups, and the precision that they train in."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from languagebind.config import UserError, at_least, first_line
from languagebind.distributed import Precision

NO_DECAY = ("bias", "logit_scale", "class_embedding", "patch_embedding")  # the original's, beside what is 1-D


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    epochs: int = 1
    """passes over the training data"""
    accum_freq: int = 1
    """batches whose features are scored together as one, at the memory of one and the time of one more forward pass"""
    optimizer: str = "adamw"
    """adamw, adamw8bit (of bitsandbytes), or timm/NAME for one of timm's"""
    lr: float = 5e-4
    """peak learning rate"""
    coef_lr: float = 1.0
    """factor on the learning rate of everything but LoRA adapters"""
    layer_decay: float = 1.0
    """factor on the learning rate for each block below the last"""
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
    ema_decay: float | None = None
    """keep a moving average of the weights, which evaluation and loading then use, such as 0.9999"""
    loss: Literal["clip", "siglip"] = "clip"
    """softmax over the batch, or SigLIP's sigmoid of each pair (with --init-logit-bias -10 --init-temperature 0.1)"""
    precision: Precision = "amp_bf16"
    """autocast to bfloat16, to float16 with loss scaling (amp), or none"""

    def __post_init__(self):
        at_least(1, epochs=self.epochs, accum_freq=self.accum_freq)
        at_least(0, lr=self.lr, coef_lr=self.coef_lr, wd=self.wd, warmup=self.warmup)
        at_least(1e-30, eps=self.eps, grad_clip_norm=self.grad_clip_norm)
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"beta1 and beta2 should be in [0, 1), got {self.beta1} and {self.beta2}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay is a factor in (0, 1], got {self.layer_decay}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay should be in (0, 1), got {self.ema_decay}")


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer with a group for each learning rate and decay; each group keeps its `base_lr`.

    Args:
        parameters: those that train, by their name in the model.

    Raises:
        UserError: there is no such optimizer.
    """
    layers = {name: _layer(name) for name in parameters}
    above = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        lr = config.lr if "lora_" in name else config.lr * config.coef_lr
        decays = parameter.ndim >= 2 and not any(word in name for word in NO_DECAY)
        lr *= config.layer_decay ** (0 if layers[name] is None else above - layers[name])
        groups.setdefault((lr, config.wd if decays else 0.0), []).append(parameter)
    options = [
        {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()
    ]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    if config.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("--optimizer adamw8bit needs the package bitsandbytes: pip install bitsandbytes") from error
        return AdamW8bit(options, lr=config.lr, betas=betas, eps=config.eps)
    library, _, name = config.optimizer.partition("/")
    if library != "timm" or not name:
        raise UserError(f"--optimizer {config.optimizer}: expected adamw, adamw8bit or timm/NAME")
    return _of_timm(name, options, config)


def _of_timm(name: str, options: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    if name not in list_optimizers():
        raise UserError(f"--optimizer timm/{name}: timm has {', '.join(list_optimizers())}")
    if get_optimizer_info(name).second_order:
        raise UserError(f"--optimizer timm/{name} needs second derivatives, which training does not take")
    own = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    try:
        try:
            return create_optimizer_v2(options, opt=name, lr=config.lr, weight_decay=config.wd, **own)
        except (TypeError, IndexError, ValueError):  # not every optimizer has these two, or has two betas
            return create_optimizer_v2(options, opt=name, lr=config.lr, weight_decay=config.wd)
    except Exception as error:  # some need packages or a GPU, and say so with an AssertionError
        raise UserError(f"--optimizer timm/{name} cannot be made here: {first_line(error)}") from error


def _layer(name: str) -> int | None:
    """The block of a parameter, from 1; 0 for what comes before the blocks, None for what comes after."""
    block = re.search(r"vision_model\.encoder\.layers\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if name.startswith(("vision_model.embeddings.", "vision_model.pre_layrnorm.")) else None


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Scale the learning rate of every group from its own base."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss for float16; does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "amp")


def make_schedule(kind: str, warmup: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at each step, counted from 0.

    Args:
        kind: `cosine` falls to 0 at `total_steps`; `const` stays.
        warmup: steps over which the factor rises to 1.
    """

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    after_warmup = {"cosine": cosine, "const": lambda step: 1.0}[kind]
    return lambda step: (step + 1) / warmup if step < warmup else after_warmup(step)
