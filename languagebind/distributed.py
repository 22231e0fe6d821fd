"""One process or many: ranks under torchrun, the collectives that training and evaluation share, precision."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from .config import UserError, first_line

# Evaluation and checkpointing keep ranks apart for minutes on slow storage; a dead rank should still end the run.
TIMEOUT = timedelta(minutes=30)

Precision = Literal["amp_bf16", "amp", "fp32"]


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
    """Join the process group that torchrun or srun set up (NCCL on GPUs, gloo on CPUs); a lone process needs none.

    Args:
        device: as in torch; by default this rank's GPU, or the CPU where there is none.

    Raises:
        UserError: there is no such device; or srun started several tasks without MASTER_ADDR.
    """
    _take_over_slurm()
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {device}: {first_line(error)}") from error
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch finds no GPU here")
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", target.index or 0)))
        torch.cuda.set_device(target)
    elif target.type != "cpu":
        try:
            torch.empty(1, device=target).cpu()
        except (RuntimeError, AssertionError, ImportError) as error:
            raise UserError(f"--device {device} cannot be used here: {first_line(error)[:200]}") from error
    if "RANK" not in os.environ:
        return Process(0, 1, target)
    backend = "nccl" if target.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=target if backend == "nccl" else None)
    return Process(dist.get_rank(), dist.get_world_size(), target)


def _take_over_slurm() -> None:
    """torchrun's variables, where srun started the tasks and not torchrun."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) == 1 or "SLURM_PROCID" not in os.environ:
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(
            "srun started several tasks: set MASTER_ADDR to the first node, as in scripts/slurm.sh, or start one task a"
            " node with torchrun in it"
        )
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
    }
    os.environ.setdefault("MASTER_PORT", "29500")


@contextmanager
def joined(device: str | None = None) -> Iterator[Process]:
    """`init_process`, and `close_process` at the end; the first rank alone says how far all are."""
    process = init_process(device)
    if not process.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        yield process
    finally:
        close_process()


def close_process() -> None:
    """Leave the process group, if there is one."""
    if world_size() > 1 or (dist.is_available() and dist.is_initialized()):
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 for a lone one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor of every rank; the same bits on each."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def gather_objects(value: Any) -> list[Any]:
    """A picklable value of every rank, in rank order, on each."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of some flags is set on at least one rank; the same on each."""
    return mean_over_ranks(torch.tensor([float(flag) for flag in flags], device=device)).gt(0).tolist()


def fail_together(failure: str | None, device: torch.device) -> None:
    """Nothing where no rank has a failure; otherwise all of them stop, with the first rank's.

    Without a failure this costs one small reduction, so that it can be called at each step.

    Raises:
        UserError: on every rank, if one has a failure.
    """
    if on_any_rank([failure is not None], device)[0]:
        raise UserError(next(message for message in gather_objects(failure) if message))


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone or does not answer."""
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, kinds) or any(sign in str(error) for sign in signs)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """bfloat16, float16 (amp) or, for fp32, nothing."""
    dtype = torch.float16 if precision == "amp" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
