"""Contrastive losses over the batches of all ranks: InfoNCE as in CLIP, and SigLIP's sigmoid loss.

Both compute gradients in the forward pass, one chunk of rows at a time, so the memory for scores does not grow with
the batch. Shapes: B samples per rank, G = B * world_size samples on all ranks, D width of the shared space.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .distributed import rank, world_size

# Scores per chunk unless the caller sets `chunk_size`: 16 MB, in a few copies.
SCORES = 2**22


def contrastive_loss(
    features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    groups: Tensor | None = None,
    chunk_size: int | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    """Return the mean of modality-to-text and text-to-modality cross entropy.

    Each rank scores its own B rows against the G columns of all ranks. Averaged over ranks, the losses and gradients
    equal those of one process with the whole batch.

    Args:
        features: (B, D), unit norm, this rank's samples.
        text_features: (B, D), unit norm, their captions.
        logit_scale: scalar, already exponentiated.
        groups: (B,) integers. Rows with the same number match and share the target equally. By default, row i matches
            only row i.
        chunk_size: rows scored at a time; by default as many as fit in 16 MB of scores.
        negatives: (M, D), unit norm, texts that match no sample of any rank (hard negatives, as in NegCLIP); M is the
            same on every rank. Rows of zeros are left out.
    """
    groups = _own_rows(features) if groups is None else groups
    all_groups = gather(groups)
    with torch.autocast(features.device.type, enabled=False):  # at a scale of 100, half precision keeps two digits
        features, text_features, logit_scale = features.float(), text_features.float(), logit_scale.float()
        texts, text_groups = gather(text_features), all_groups
        if negatives is not None:
            extra = gather(negatives.float())
            extra = extra[extra.any(dim=1)]
            texts = torch.cat([texts, extra])
            text_groups = F.pad(all_groups, (0, len(extra)), value=torch.iinfo(groups.dtype).min)  # matches no row
        to_text = _CrossEntropy.apply(features, texts, logit_scale, groups, text_groups, chunk_size)
        to_modality = _CrossEntropy.apply(text_features, gather(features), logit_scale, groups, all_groups, chunk_size)
        return (to_text + to_modality) / 2


def sigmoid_loss(
    features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    groups: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return SigLIP's loss (arXiv 2303.15343): the sum of the binary losses of B * G pairs, divided by B.

    Texts are passed around the ranks in a ring, so no rank holds all of them. The scalar `logit_bias` is added to every
    logit; see `contrastive_loss` for the other arguments.
    """
    groups = _own_rows(features) if groups is None else groups
    with torch.autocast(features.device.type, enabled=False):
        inputs = (x.float() for x in (features, text_features, logit_scale, logit_bias))
        return _SigmoidRing.apply(*inputs, groups, chunk_size)


def over_prefixes(loss: Callable[..., Tensor], sizes: Sequence[int], *features: Tensor) -> Tensor:
    """Return the mean of a loss over prefixes of tensors (..., D), each at unit norm (Matryoshka, arXiv 2205.13147).

    `loss` takes as many tensors as there are `features`; `sizes` are the numbers of leading dimensions.
    """
    losses = [loss(*(F.normalize(x[..., :size], dim=-1) for x in features)) for size in sizes]
    return torch.stack(losses).mean()


def gather(x: Tensor) -> Tensor:
    """Return the rows of all ranks (G, ...), in rank order. Gradients flow back to the rank that owns the rows."""
    if world_size() == 1:
        return x
    return _AllGather.apply(x) if x.requires_grad else _all_gather(x)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        # The loss of every rank depends on these rows, so their gradients are summed over ranks.
        own = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def _all_gather(x: Tensor) -> Tensor:
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.detach().contiguous())
    return out


class _GradientsInForward(torch.autograd.Function):
    """A scalar loss whose `forward` computes the gradients and keeps them in `ctx.grads`, one per argument."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("backward() can be called only once on this loss")
        grads, ctx.grads = ctx.grads, None
        return tuple(None if grad is None else grad.mul_(grad_output) for grad in grads)


class _CrossEntropy(_GradientsInForward):
    """Mean cross entropy of queries (B, D) against all keys (G, D)."""

    @staticmethod
    def forward(ctx, queries, keys, logit_scale, groups, key_groups, chunk_size):
        needs_queries, needs_keys, needs_scale = ctx.needs_input_grad[:3]
        # The scale's gradient follows from the gradient of the queries or of the keys, so one is always computed.
        grad_queries = torch.empty_like(queries) if needs_queries or (needs_scale and not needs_keys) else None
        grad_keys = torch.zeros_like(keys) if needs_keys else None
        loss = queries.new_zeros(())
        chunks = _chunks(len(queries), len(keys), chunk_size)
        buffer = queries.new_empty(chunks[0].stop, len(keys))
        for rows in chunks:
            own = queries[rows] * logit_scale
            scores = torch.mm(own, keys.T, out=buffer[: len(own)])  # (rows, G)
            matches = groups[rows, None] == key_groups
            share = 1 / matches.sum(dim=1)
            at = matches.nonzero(as_tuple=True)
            loss -= scores[at] @ share[at[0]]
            largest = scores.amax(dim=1, keepdim=True)
            total = scores.sub_(largest).exp_().sum(dim=1, keepdim=True)
            loss += (total.log() + largest).sum()
            grad = scores.div_(total)
            grad[at] -= share[at[0]]
            if grad_queries is not None:
                torch.mm(grad, keys, out=grad_queries[rows])
            if grad_keys is not None:
                grad_keys.addmm_(grad.T, own)
        grad_scale = None
        if grad_queries is not None:
            grad_scale = torch.dot(grad_queries.flatten(), queries.flatten()) if needs_scale else None
            grad_queries *= logit_scale
        elif grad_keys is not None and needs_scale:
            grad_scale = torch.dot(grad_keys.flatten(), keys.flatten()) / logit_scale
        grads = (grad_queries if needs_queries else None, grad_keys, grad_scale)
        ctx.grads = (*(grad if grad is None else grad.div_(len(queries)) for grad in grads), None, None, None)
        return loss / len(queries)


class _SigmoidRing(_GradientsInForward):
    """Sigmoid loss of this rank's features (B, D) against the texts of all ranks, one rank's texts at a time."""

    @staticmethod
    def forward(ctx, features, text_features, logit_scale, logit_bias, groups, chunk_size):
        grad_features = torch.zeros_like(features)
        grad_bias, loss = features.new_zeros(()), features.new_zeros(())
        # The texts' gradients travel with the texts and return to their own rank after every rank has added its part.
        texts, text_groups, grad_texts = text_features, groups, torch.zeros_like(text_features)
        for turn in range(world_size()):
            for rows in _chunks(len(features), len(texts), chunk_size):
                own = features[rows] * logit_scale
                logits = (own @ texts.T).add_(logit_bias)  # (rows, B)
                sign = torch.where(groups[rows, None] == text_groups, 1.0, -1.0)
                logits *= sign
                loss -= F.logsigmoid(logits).sum()
                grad = logits.neg_().sigmoid_().mul_(sign).neg_()
                grad_features[rows].addmm_(grad, texts)
                grad_texts.addmm_(grad.T, own)
                grad_bias += grad.sum()
            if world_size() > 1:
                last = turn == world_size() - 1
                grad_texts = _pass_on(grad_texts)
                texts, text_groups = (texts, text_groups) if last else (_pass_on(texts), _pass_on(text_groups))
        grad_scale = torch.dot(grad_features.flatten(), features.flatten())
        grads = (grad_features.mul_(logit_scale), grad_texts, grad_scale, grad_bias)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        ctx.grads = (*(grad.div_(len(features)) if needed else None for grad, needed in wanted), None, None)
        return loss / len(features)


def _chunks(rows: int, columns: int, chunk_size: int | None) -> list[slice]:
    size = min(rows, chunk_size or max(1, SCORES // columns))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _pass_on(x: Tensor) -> Tensor:
    """Send `x` to the next rank and return the tensor that the previous rank sent."""
    x, received = x.contiguous(), torch.empty_like(x)
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    exchange = [dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, received, before)]
    for request in dist.batch_isend_irecv(exchange):
        request.wait()
    return received


def _own_rows(features: Tensor) -> Tensor:
    """Return one number per sample, unique over all ranks."""
    return torch.arange(len(features), device=features.device) + rank() * len(features)
