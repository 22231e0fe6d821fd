"""Distribute training over ranks with DDP, FSDP2 or DeepSpeed's ZeRO, behind one interface."""

import torch.distributed as dist

from languagebind.config import UserError
from languagebind.distributed import Process
from languagebind.model import DualEncoder

from ..optim import OptimConfig
from .base import Engine, EngineConfig
from .fsdp import Fsdp


def check_engine(config: EngineConfig, optim: OptimConfig) -> None:
    """Raise a `UserError` if an engine does not support these options."""
    if config.engine == "ddp":
        return
    unsupported = {
        "--precision amp": optim.precision == "amp",  # neither scales the loss
        "--optimizer adamw8bit": optim.optimizer == "adamw8bit",
        # ZeRO steps flat parts of many parameters, which changes any optimizer that looks at shapes
        f"--optimizer {optim.optimizer}": config.engine == "deepspeed" and optim.optimizer != "adamw",
        "--ema-decay": config.engine == "deepspeed" and optim.ema_decay is not None,
    }
    for option, asked in unsupported.items():
        if asked:
            raise UserError(f"--engine {config.engine} does not support {option}: use --engine ddp, or another option")


def make_engine(model: DualEncoder, optim: OptimConfig, process: Process, config: EngineConfig) -> Engine:
    """Return the engine that the config names, around a model with its weights."""
    if config.engine == "ddp":
        return Engine(model, optim, process, config)
    if not dist.is_initialized():
        raise UserError(f"--engine {config.engine} divides the model over ranks: start it with torchrun")
    if config.engine == "fsdp":
        return Fsdp(model, optim, process, config)
    from .deepspeed import DeepSpeed

    return DeepSpeed(model, optim, process, config)
