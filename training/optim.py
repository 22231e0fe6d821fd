"""Build the optimizer with its parameter groups, and set learning rates."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from languagebind.config import UserError, at_least, first_line, package
from languagebind.distributed import Precision
from languagebind.tuning import BLOCK, HEAD

# Parameters without weight decay, as in the original LanguageBind code; and those that timm excludes. 1-D parameters
# have none either.
NO_DECAY = ("bias", "logit_scale", "class_embedding", "patch_embed", "_token", "pos_embed")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    epochs: int = 1
    """passes over the training data"""
    accum_freq: int = 1
    """micro-batches per step, combined into one contrastive batch (GradCache: one extra forward pass)"""
    optimizer: str = "adamw"
    """adamw, adamw8bit (from bitsandbytes), or timm/NAME"""
    lr: float = 5e-4
    """peak learning rate"""
    coef_lr: float = 1.0
    """factor on the learning rate of all parameters except LoRA adapters and a temporal head"""
    layer_decay: float = 1.0
    """factor on the learning rate for each block below the head"""
    beta1: float = 0.9
    """beta1 of Adam"""
    beta2: float = 0.98
    """beta2 of Adam"""
    eps: float = 1e-6
    """epsilon of Adam"""
    wd: float = 0.2
    """weight decay"""
    warmup: int = 2000
    """steps of linear warmup"""
    lr_scheduler: Literal["cosine", "const"] = "cosine"
    """learning rate schedule after warmup"""
    grad_clip_norm: float | None = None
    """maximum global gradient norm; by default no clipping"""
    ema_decay: float | None = None
    """decay of a moving average of the weights, e.g. 0.9999; evaluation and loading then use the average"""
    loss: Literal["clip", "siglip"] = "clip"
    """softmax over the batch (clip), or sigmoid per pair (siglip, with --init-logit-bias -10 --init-temperature 0.1)"""
    matryoshka: tuple[int, ...] = ()
    """numbers of leading dimensions whose losses are averaged, such as 768 512 256 128; the largest is all of them"""
    precision: Literal["auto", Precision] = "auto"
    """autocast to bfloat16 (amp_bf16), autocast to float16 with loss scaling (amp), or no autocast (fp32);
    auto: amp_bf16 on GPUs that have bfloat16 and on CPUs where it is faster, else fp32"""

    def __post_init__(self):
        at_least(1, epochs=self.epochs, accum_freq=self.accum_freq)
        at_least(1, matryoshka=min(self.matryoshka, default=1))
        at_least(0, lr=self.lr, coef_lr=self.coef_lr, wd=self.wd, warmup=self.warmup)
        at_least(1e-30, eps=self.eps, grad_clip_norm=self.grad_clip_norm, layer_decay=self.layer_decay)
        if self.layer_decay > 1:
            raise UserError(f"layer_decay should be in (0, 1], got {self.layer_decay}")
        for name, share in (("beta1", self.beta1), ("beta2", self.beta2), ("ema_decay", self.ema_decay or 0)):
            if not 0 <= share < 1:
                raise UserError(f"{name} should be in [0, 1), got {share}")


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Return an optimizer with a parameter group, and its `base_lr`, per learning rate and weight decay."""
    blocks = 1 + max((int(match[1]) for match in map(BLOCK.search, parameters) if match), default=-1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        lr = config.lr if "lora_" in name or name.startswith("temporal_head.") else config.lr * config.coef_lr
        decays = parameter.ndim >= 2 and not any(word in name for word in NO_DECAY)
        lr *= config.layer_decay ** _blocks_above(name, blocks)
        groups.setdefault((lr, config.wd if decays else 0.0), []).append(parameter)
    options = [{"params": own, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), own in groups.items()]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    if config.optimizer == "adamw8bit":
        optim = package("bitsandbytes.optim", "--optimizer adamw8bit", "bitsandbytes")
        return optim.AdamW8bit(options, lr=config.lr, betas=betas, eps=config.eps)
    return _timm_optimizer(options, config)


def _timm_optimizer(options: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    known = [f"timm/{name}" for name in map(str, list_optimizers()) if not get_optimizer_info(name).second_order]
    if config.optimizer not in known:
        raise UserError(f"--optimizer {config.optimizer}: expected one of adamw, adamw8bit, {', '.join(known)}")
    name, common = config.optimizer.removeprefix("timm/"), {"lr": config.lr, "weight_decay": config.wd}
    own = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    try:
        try:
            return create_optimizer_v2(options, opt=name, **common, **own)  # type: ignore[arg-type]  # timm's kwargs
        except (TypeError, IndexError, ValueError):  # some optimizers have no eps, or not two betas
            return create_optimizer_v2(options, opt=name, **common)  # type: ignore[arg-type]
    except Exception as error:  # a missing package or GPU may raise any type
        raise UserError(f"--optimizer {config.optimizer} cannot be made here: {first_line(error)}") from error


def _blocks_above(name: str, blocks: int) -> int:
    """Return the number of layers from a parameter to the head, for --layer-decay; 0 after the last block."""
    if block := BLOCK.search(name):
        return blocks - int(block[1])
    return blocks + 1 if name.startswith("vision_model.") and not HEAD.match(name) else 0


def set_lr(optimizers: Iterable[torch.optim.Optimizer], config: OptimConfig, step: int, total_steps: int) -> None:
    """Set the learning rate of each group to its `base_lr` times the schedule's factor. Steps count from 0."""
    factor = 1.0
    if step < config.warmup:
        factor = (step + 1) / config.warmup
    elif config.lr_scheduler == "cosine":  # falls to 0 at `total_steps`
        done = min(1.0, (step - config.warmup) / max(1, total_steps - config.warmup))
        factor = 0.5 * (1 + math.cos(math.pi * done))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
