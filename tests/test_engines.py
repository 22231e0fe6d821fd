"""FSDP2 and DeepSpeed against DDP and one process: real ranks, real checkpoints."""

import pytest
import torch
from helpers import call, torchrun, train_flags
from test_training import checkpoint, losses

from languagebind.encoders import load

ENGINES = {
    "fsdp": ["--engine=fsdp"],
    "zero1": ["--engine=deepspeed", "--zero-stage=1"],
    "zero2": ["--engine=deepspeed", "--zero-stage=2"],
    "zero3": ["--engine=deepspeed", "--zero-stage=3"],
}
RECIPE = ["--tuning=lora", "--patch-dropout=0.25", "--lr=3e-3", "--epochs=2", "--grad-clip-norm=1", "--accum-freq=2",
          "--save-every-n-steps=4", "--batch-size=4"]  # fmt: skip


@pytest.fixture(scope="module")
def ddp(depth_shards, tmp_path_factory):
    """Twelve steps under DDP on two ranks; the folder of its logs."""
    logs = tmp_path_factory.mktemp("engines")
    call(*torchrun(2, "-m", "training.main", "--", *train_flags(depth_shards, logs, *RECIPE, "--name=ddp")))
    return logs


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_losses_of_ddp_and_goes_on_from_its_checkpoints(engine, ddp, depth_shards):
    flags = train_flags(depth_shards, ddp, *RECIPE, *ENGINES[engine])
    call(*torchrun(2, "-m", "training.main", "--", *flags, f"--name={engine}"))
    expected = losses(ddp, "ddp")
    assert losses(ddp, engine) == pytest.approx(expected, abs=2e-4)
    ours, theirs = checkpoint(ddp, engine, 12), checkpoint(ddp, "ddp", 12)
    assert ours["optimizer"].keys() == theirs["optimizer"].keys()
    for key, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], value, atol=2e-3, rtol=0)
    # from DDP's checkpoint under this engine, and from this engine's in one process
    resume = f"--resume={ddp / 'ddp/checkpoints/step_00000004.pt'}"
    call(*torchrun(2, "-m", "training.main", "--", *flags, f"--name={engine}2", resume))
    assert losses(ddp, f"{engine}2") == pytest.approx({k: v for k, v in expected.items() if k > 4}, abs=2e-4)
    resume = f"--resume={ddp / engine / 'checkpoints/step_00000004.pt'}"
    output = call("-m", "training.main", *train_flags(depth_shards, ddp, *RECIPE, f"--name={engine}3", resume))
    assert "number of ranks changed" in output
    first = load(ddp / engine)
    assert first.encode(text=["a wall"]).shape == (1, 384)
