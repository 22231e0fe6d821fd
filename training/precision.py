"""Choose the precision of a run with `--precision auto`."""

import logging
import time
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from languagebind.distributed import Precision, Process, autocast, on_main

from .params import TrainConfig

log = logging.getLogger(__name__)


def settle_precision(config: TrainConfig, process: Process, checkpoint: dict[str, Any] | None) -> TrainConfig:
    """Return the options with a precision in place of auto: the checkpoint's to resume from, or else the faster one."""
    if config.optim.precision != "auto":
        return config
    found = checkpoint["config"].get("optim", {}).get("precision") if checkpoint else None
    why, encoder = "as in the run that it resumes", config.model.encoder
    if found is None:
        found, why = on_main(process, lambda: faster_precision(process.device, encoder.width, encoder.mlp_dim))
    log.info("precision %s, %s", found, why)
    return replace(config, optim=replace(config.optim, precision=found))


def faster_precision(device: torch.device, width: int, mlp_dim: int) -> tuple[Precision, str]:
    """Return amp_bf16 or fp32, and the reason, for a model with blocks of these sizes."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("amp_bf16", "which this GPU has") if able else ("fp32", "because this GPU has no bfloat16; or try amp")
    times = [(product_time(width, mlp_dim, "amp_bf16"), product_time(width, mlp_dim, "fp32")) for _ in range(3)]
    bf16, fp32 = map(min, zip(*times, strict=True))
    why = f"because a product of the model's size takes {1e3 * bf16:.2g} ms in bfloat16, {1e3 * fp32:.2g} ms in float32"
    return ("amp_bf16" if bf16 <= 0.8 * fp32 else "fp32"), why  # the products are only a part of a step


def product_time(width: int, mlp_dim: int, precision: Precision) -> float:
    """Return the seconds of a matrix product on the CPU, with its casts and gradients, for 256 tokens."""
    x, weight = (torch.ones(rows, width, requires_grad=True) for rows in (256, mlp_dim))
    begin = time.perf_counter()
    with autocast(x.device, precision):
        product = F.linear(x, weight)
    product.backward(product.detach())
    return time.perf_counter() - begin
