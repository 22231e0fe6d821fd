"""Measure the forward and backward pass of the contrastive loss on one of many ranks.

PyTorch's fake process group stands for the other ranks. Its collectives at once return copies of this rank's rows. So
the benchmark measures the computation and the memory of one rank, but not the communication.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.nn import functional as F

from languagebind.config import UserError
from languagebind.distributed import close_process, init_process
from languagebind.loss import contrastive_loss

from .rows import MIB, Row, measure_rows, measure_steps


def add_options(add: Callable[..., object]) -> None:
    add("--local-batch", type=int, nargs="+", default=[512], help="samples per rank, one row per value")
    add("--global-batch", type=int, nargs="+", default=[4096], help="samples on all ranks, one row per value")
    add("--embed-dim", type=int, default=768)
    add("--chunk-size", type=int, nargs="+", default=[0, 128], help="rows scored at once, one row per value (0: auto)")
    add("--steps", type=int, default=5)
    add("--device", choices=("cuda", "cpu"))


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for local, total in itertools.product(options.local_batch, options.global_batch):
        if total % local:
            raise UserError(f"--global-batch {total} is not a multiple of --local-batch {local}")
    return measure_rows(options, ["local_batch", "global_batch", "chunk_size"], measure_row, "forkserver")


def measure_row(options: argparse.Namespace) -> Row:
    """Return the time and memory of the loss. This process becomes rank 0, and the other ranks are fake."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device, ranks = init_process(options.device).device, options.global_batch // options.local_batch
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    torch.manual_seed(0)
    features, text = F.normalize(torch.randn(2, options.local_batch, options.embed_dim, device=device), dim=-1)
    features.requires_grad_()
    logit_scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)

    def step() -> float:
        loss = contrastive_loss(features, text, logit_scale, chunk_size=options.chunk_size or None)
        loss.backward()
        return loss.item()  # waits for the device

    figures = measure_steps(step, device, options.steps, warmup_steps=1) | {"loss": step()}
    close_process()
    scores = 4 * options.local_batch * options.global_batch / MIB
    return {"embed_dim": options.embed_dim, "ranks": ranks, **figures, "scores_mib": scores}
