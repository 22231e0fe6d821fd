"""The symmetric contrastive loss (InfoNCE) over the batch of every rank."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .distributed import rank, world_size


def contrastive_loss(
    features: Tensor, text_features: Tensor, logit_scale: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Mean of modality-to-text and text-to-modality cross entropy; row i matches row i.

    Each rank scores its own B rows against the B * world_size columns of all ranks, so that the mean of the ranks'
    losses, and of their gradients, is that of one process with the whole batch.

    Args:
        features: (B, D), unit norm, this rank's samples.
        text_features: (B, D), unit norm, their captions. Without gradient they are gathered without one.
        logit_scale: scalar, already exponentiated.
        chunk_size: rows scored at a time. Memory for the scores is then chunk_size * B * world_size in place of
            B * B * world_size; they are computed again in the backward pass.
    """
    features, text_features, logit_scale = features.float(), text_features.float(), logit_scale.float()
    first = rank() * len(features)
    modality_to_text = _cross_entropy(features, gather(text_features), logit_scale, first, chunk_size)
    text_to_modality = _cross_entropy(text_features, gather(features), logit_scale, first, chunk_size)
    return (modality_to_text + text_to_modality) / 2


def gather(x: Tensor) -> Tensor:
    """(B, D) of every rank, in rank order: (B * world_size, D). Gradients flow back to the rank they belong to."""
    if world_size() == 1:
        return x
    return _AllGather.apply(x) if x.requires_grad else _all_gather(x)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.batch = len(x)
        return _all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Every rank's loss depends on these rows, so their gradients are summed over the ranks.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.narrow(0, rank() * ctx.batch, ctx.batch)


def _all_gather(x: Tensor) -> Tensor:
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.detach().contiguous())
    return out


def _cross_entropy(queries: Tensor, keys: Tensor, logit_scale: Tensor, first: int, chunk_size: int | None) -> Tensor:
    """Mean over queries of the cross entropy against all keys; query i matches key `first + i`."""
    labels = torch.arange(first, first + len(queries), device=queries.device)
    if chunk_size is None or chunk_size >= len(queries):
        return _summed_cross_entropy(queries, keys, logit_scale, labels) / len(queries)
    chunks = zip(queries.split(chunk_size), labels.split(chunk_size), strict=True)
    losses = [
        checkpoint(_summed_cross_entropy, rows, keys, logit_scale, targets, use_reentrant=False)
        for rows, targets in chunks
    ]
    return torch.stack(losses).sum() / len(queries)


def _summed_cross_entropy(queries: Tensor, keys: Tensor, logit_scale: Tensor, labels: Tensor) -> Tensor:
    # Autocast would score in half precision, where a scale of 100 leaves two digits.
    with torch.autocast(queries.device.type, enabled=False):
        return F.cross_entropy(logit_scale * queries @ keys.T, labels, reduction="sum")
