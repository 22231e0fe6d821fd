"""Distribute training over ranks with DDP, FSDP2 or DeepSpeed's ZeRO, behind one interface."""

import torch.distributed as dist

from languagebind.config import UserError
from languagebind.distributed import Process
from languagebind.model import DualEncoder

from ..optim import OptimConfig
from .base import Engine, EngineConfig
from .fsdp import Fsdp


def check_engine(config: EngineConfig, optim: OptimConfig) -> None:
    """Raise a `UserError` if the engine does not support the options."""
    if config.engine == "ddp":
        return
    # Neither engine divides adamw8bit; ZeRO flattens parameters, but some optimizers depend on their shapes.
    refused = optim.optimizer == "adamw8bit" or (config.engine == "deepspeed" and optim.optimizer != "adamw")
    unsupported = {
        "--precision amp": optim.precision == "amp",  # neither engine scales the loss
        f"--optimizer {optim.optimizer}": refused,
        "--ema-decay": config.engine == "deepspeed" and optim.ema_decay is not None,
    }
    for option, asked in unsupported.items():
        if asked:
            raise UserError(f"--engine {config.engine} does not support {option}: change it or use --engine ddp")


def make_engine(model: DualEncoder, optim: OptimConfig, process: Process, config: EngineConfig) -> Engine:
    """Return the engine of the config for a model with initial weights."""
    if config.engine == "ddp":
        return Engine(model, optim, process, config)
    if not dist.is_initialized():
        raise UserError(f"--engine {config.engine} shards the model across ranks: start training with torchrun")
    if config.engine == "fsdp":
        return Fsdp(model, optim, process, config)
    from .deepspeed import DeepSpeed

    return DeepSpeed(model, optim, process, config)
