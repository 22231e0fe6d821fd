import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from languagebind.loss import contrastive_loss


def unit(rows, size, seed):
    return F.normalize(torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_equals_the_formula_written_out():
    features, text, scale = unit(5, 8, 0), unit(5, 8, 1), torch.tensor(10.0)
    logits = (scale * features @ text.T).double()
    rows = -(logits.diagonal() - logits.exp().sum(1).log()).mean()
    columns = -(logits.diagonal() - logits.exp().sum(0).log()).mean()
    assert contrastive_loss(features, text, scale).item() == pytest.approx(((rows + columns) / 2).item(), abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 10])
def test_chunks_change_neither_loss_nor_gradients(chunk_size):
    results = []
    for size in (None, chunk_size):
        features, text = unit(10, 8, 0).requires_grad_(), unit(10, 8, 1)
        scale = torch.tensor(2.0, requires_grad=True)
        loss = contrastive_loss(features, text, scale.exp(), chunk_size=size)
        loss.backward()
        results.append((loss.detach(), features.grad, scale.grad))
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(plain, chunked, atol=1e-6, rtol=1e-5)


def test_scores_in_float32_under_autocast():
    features, text = unit(64, 32, 0), unit(64, 32, 1)
    with torch.autocast("cpu", torch.bfloat16):
        half = contrastive_loss(features, text, torch.tensor(100.0))
    assert half == contrastive_loss(features, text, torch.tensor(100.0))


@pytest.mark.parametrize("text_trains", [False, True])
def test_two_ranks_give_loss_and_gradients_of_one_process(tmp_path, text_trains):
    mp.spawn(one_rank, (tmp_path, text_trains), nprocs=2)
    whole = compute(slice(None), text_trains)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"]) / 2, whole["loss"], atol=1e-6, rtol=0)
    # DDP takes the mean of the ranks' gradients; a rank's rows hold the gradient of the sum.
    rows = torch.cat([part["features"] for part in parts]) / 2
    torch.testing.assert_close(rows, whole["features"], atol=1e-6, rtol=0)
    torch.testing.assert_close((parts[0]["scale"] + parts[1]["scale"]) / 2, whole["scale"], atol=1e-6, rtol=0)
    if text_trains:
        torch.testing.assert_close(torch.cat([p["text"] for p in parts]) / 2, whole["text"], atol=1e-6, rtol=0)


def one_rank(rank, folder, text_trains):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(compute(slice(rank * 4, rank * 4 + 4), text_trains), folder / f"{rank}.pt")
    dist.destroy_process_group()


def compute(rows, text_trains):
    features, text = unit(8, 16, 0)[rows].requires_grad_(), unit(8, 16, 1)[rows].requires_grad_(text_trains)
    scale = torch.tensor(2.0, requires_grad=True)
    loss = contrastive_loss(features, text, scale.exp())
    loss.backward()
    return {"loss": loss.detach(), "features": features.grad, "scale": scale.grad, "text": text.grad}
