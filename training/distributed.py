"""One process or many: ranks under torchrun, and the few collectives that training needs."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from languagebind.config import UserError

# Evaluation and checkpointing keep ranks apart for minutes on slow storage; a dead rank should still end the run.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Process:
    """Which process of how many this is, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_process(device: str | None = None) -> Process:
    """Join the process group that torchrun set up (NCCL on GPUs, gloo on CPUs); a lone process needs none."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if "RANK" not in os.environ:
        return Process(0, 1, target)
    backend = "nccl" if target.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=target if backend == "nccl" else None)
    return Process(dist.get_rank(), dist.get_world_size(), target)


def close_process() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor of every rank; the same bits on each."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather_objects(value: Any) -> list[Any]:
    """A picklable value of every rank, in rank order, on each."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_every_rank(failure: str | None) -> str | None:
    """The first rank's failure, so that all of them stop together; None if there is none."""
    return next((message for message in gather_objects(failure) if message), None)
