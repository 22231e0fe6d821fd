"""What spreads a training over ranks: DDP, FSDP2 and DeepSpeed's ZeRO behind one interface."""

import torch.distributed as dist

from languagebind.config import UserError
from languagebind.distributed import Process
from languagebind.model import DualEncoder

from ..optim import OptimConfig
from .base import Engine, EngineConfig
from .fsdp import Fsdp


def check_engine(config: EngineConfig, optim: OptimConfig) -> None:
    """Refuse what an engine cannot do.

    Raises:
        UserError: with what to do instead.
    """
    if config.engine == "ddp":
        return
    if optim.precision == "amp":
        raise UserError(f"--engine {config.engine} has no loss scaling: use --precision amp_bf16")
    if optim.optimizer != "adamw" and (config.engine == "deepspeed" or optim.optimizer == "adamw8bit"):
        # ZeRO steps flat parts of many parameters, where an optimizer that looks at shapes is another one
        raise UserError(f"--optimizer {optim.optimizer} cannot step divided parameters: use --engine ddp, or adamw")
    if config.engine == "deepspeed" and optim.ema_decay is not None:
        raise UserError("--ema-decay works with --engine ddp and fsdp")


def make_engine(model: DualEncoder, optim: OptimConfig, process: Process, config: EngineConfig) -> Engine:
    """The engine that the config names, around a model with its weights in it.

    Raises:
        UserError: there is one process alone, and nothing to divide the model over.
    """
    if config.engine == "ddp":
        return Engine(model, optim, process, config)
    if not dist.is_initialized():
        raise UserError(f"--engine {config.engine} divides a model over ranks: start it with torchrun")
    if config.engine == "fsdp":
        return Fsdp(model, optim, process, config)
    from .deepspeed import DeepSpeed

    return DeepSpeed(model, optim, process, config)
