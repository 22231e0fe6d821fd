"""The contrastive loss, forward and backward, on one rank with a local batch among the features of all ranks.

The other ranks are PyTorch's fake process group: this is rank 0 of global batch / local batch ranks, and a collective
gives at once what it would take time to fetch (copies of this rank's rows). So everything that the loss computes and
keeps on a rank is measured, through the function that training calls, and communication is not.
"""

import argparse
import dataclasses
import itertools
import statistics
import time

import torch
import torch.distributed as dist
from torch.nn import functional as F

from languagebind.config import UserError, at_least
from languagebind.distributed import close_process, init_process
from languagebind.loss import contrastive_loss

from .memory import PeakMemory, in_fresh_process
from .report import Row, progress, spread


@dataclasses.dataclass(frozen=True)
class Case:
    """What one row measures."""

    local_batch: int
    global_batch: int
    embed_dim: int
    chunk_size: int | None
    frozen_text: bool
    steps: int
    device: str | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--local-batch", type=int, nargs="+", default=[512], help="rows of this rank; a row of the table each")
    add("--global-batch", type=int, nargs="+", default=[4096], help="rows of all ranks; a row each")
    add("--embed-dim", type=int, default=768)
    add("--chunk-size", type=int, nargs="+", default=[0, 128], help="rows scored at a time, 0: all; a row each")
    add("--live-text", action="store_true", help="the text features take gradients as well")
    add("--steps", type=int, default=5)
    add("--device", choices=("cuda", "cpu"))


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each local batch, global batch and chunk size.

    Raises:
        UserError: a global batch is no multiple of a local one.
    """
    at_least(1, steps=options.steps, embed_dim=options.embed_dim)
    rows = []
    for local, total, chunk in itertools.product(options.local_batch, options.global_batch, options.chunk_size):
        at_least(1, local_batch=local, global_batch=total)
        at_least(0, chunk_size=chunk)
        if total % local:
            raise UserError(f"--global-batch {total} is no whole number of --local-batch {local}")
        case = Case(
            local, total, options.embed_dim, chunk or None, not options.live_text, options.steps, options.device
        )
        progress(f"{local} of {total} rows, chunks of {chunk or local}")
        row = {"local_batch": local, "global_batch": total, "chunk_size": chunk, "embed_dim": options.embed_dim}
        rows.append(row | in_fresh_process(measure_case, case))
    return rows


def measure_case(case: Case) -> Row:
    """Time and memory of the loss, in this process, which becomes rank 0 of a world that is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device = init_process(case.device).device
    dist.init_process_group("fake", rank=0, world_size=case.global_batch // case.local_batch, store=FakeStore())
    torch.manual_seed(0)
    features, text = F.normalize(torch.randn(2, case.local_batch, case.embed_dim, device=device), dim=-1)
    features = features.requires_grad_()
    text = text.requires_grad_(not case.frozen_text)
    logit_scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
    contrastive_loss(features, text, logit_scale, chunk_size=case.chunk_size).backward()  # warms up
    features.grad, text.grad, times = None, None, []
    memory = PeakMemory(device)
    for _ in range(case.steps):
        begin = time.perf_counter()
        loss = contrastive_loss(features, text, logit_scale, chunk_size=case.chunk_size)
        loss.backward()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - begin)
    peak = memory.peak() - memory.before
    close_process()
    return {
        "ranks": case.global_batch // case.local_batch,
        "step_ms": statistics.median(times) * 1e3,
        "step_spread_share": spread(times),
        "extra_bytes": peak,
        "scores_bytes": 4 * case.local_batch * case.global_batch,
        "loss": loss.item(),
    }
