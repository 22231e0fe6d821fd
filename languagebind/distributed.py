"""Process groups under torchrun or srun, the collectives of training and evaluation, and precision."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist

from .config import UserError, first_line

# Long enough for ranks that wait for evaluation or slow storage, and short enough for a dead rank to end the run.
TIMEOUT = timedelta(minutes=30)

Precision = Literal["amp_bf16", "amp", "fp32"]
T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """The rank of this process, the number of processes, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_process(device: str | None = None, timeout: timedelta = TIMEOUT) -> Process:
    """Join the process group of torchrun or srun (NCCL on GPUs, gloo on CPUs), unless this is the only process."""
    _adopt_slurm_variables()
    target = own_device(device)
    if "RANK" not in os.environ:
        return Process(0, 1, target)
    backend = "nccl" if target.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, device_id=target if backend == "nccl" else None)
    return Process(dist.get_rank(), dist.get_world_size(), target)


def own_device(device: str | None = None) -> torch.device:
    """Return this rank's device: by default its GPU, or else the CPU. Raises `UserError` if it cannot be used."""
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if target.type == "cuda":
            target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", target.index or 0)))
            torch.cuda.set_device(target)
        torch.empty(1, device=target).cpu()
        return target
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device} cannot be used here: {first_line(error)[:200]}") from error


def _adopt_slurm_variables() -> None:
    """Set torchrun's environment variables from srun's if srun started several tasks."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) == 1 or "SLURM_PROCID" not in os.environ:
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError("srun started several tasks; set MASTER_ADDR to the first node, as in scripts/slurm.sh")
    os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_PORT", "29500")


@contextmanager
def joined(device: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[Process]:
    """Join the process group within a `with` block; only rank 0 logs progress."""
    process = init_process(device, timeout)
    if not process.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        yield process
    finally:
        close_process()


def close_process() -> None:
    """Leave the process group, if there is one."""
    if _initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process; 0 if there is no process group."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _initialized() else 1


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all ranks, bitwise equal on every rank."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable value of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return one bool per flag: True if at least one rank has set it."""
    return mean_over_ranks(torch.tensor([float(flag) for flag in flags], device=device)).gt(0).tolist()


def fail_together(failure: str | None, device: torch.device) -> None:
    """Raise the same `UserError` on all ranks if any rank has failed. Costs one small reduction."""
    if on_any_rank([failure is not None], device)[0]:
        raise UserError(next(message for message in gather_objects(failure) if message))


def on_main(process: Process, make: Callable[[], T]) -> T:
    """Return the main rank's result of `make` on every rank; if it fails, raise the same `UserError` on every rank."""
    made, failure = None, None
    if process.is_main:
        try:
            made = make()
        except (UserError, OSError) as error:
            failure = str(error)
    fail_together(failure, process.device)
    return cast(T, gather_objects(made)[0])


def is_lost_rank(error: RuntimeError) -> bool:
    """Tell whether a collective failed because another process died or does not answer."""
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, kinds) or any(sign in str(error) for sign in signs)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """Return an autocast context for bfloat16 (amp_bf16) or float16 (amp), which does nothing for fp32."""
    dtype = torch.float16 if precision == "amp" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
