"""FSDP2 and DeepSpeed against DDP and one process: real ranks, real checkpoints."""

import pytest
import torch
from helpers import CAPTIONS, runs, train_flags
from test_training import checkpoint, losses, metrics

from languagebind.encoders import load
from training.main import main

ENGINES = {
    "fsdp": ["--engine=fsdp"],
    "zero1": ["--engine=deepspeed", "--zero-stage=1"],
    "zero2": ["--engine=deepspeed", "--zero-stage=2"],
    "zero3": ["--engine=deepspeed", "--zero-stage=3"],
}
RECIPE = ["--tuning=lora", "--patch-dropout=0.25", "--lr=3e-3", "--grad-clip-norm=1", "--accum-freq=2", "--workers=0",
          "--save-every-n-steps=3", "--batch-size=4"]  # fmt: skip


@pytest.fixture(scope="module")
def ddp(depth_shards, tmp_path_factory):
    """Six steps under DDP on two ranks; the folder of its logs."""
    logs = tmp_path_factory.mktemp("engines")
    (logs / "val.yaml").write_text(
        f"name: stripes\ntask: classification\ndata: {depth_shards}\ncaption_source: raw\n"
        "class_names:\n" + "".join(f'  "{i}": {text}\n' for i, text in enumerate(CAPTIONS))
    )
    runs(2, logs, train_flags(depth_shards, logs, *RECIPE, f"--val-config={logs / 'val.yaml'}", "--name=ddp"))
    return logs


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_losses_of_ddp_and_goes_on_from_its_checkpoints(engine, ddp, depth_shards):
    flags = train_flags(depth_shards, ddp, *RECIPE, f"--val-config={ddp / 'val.yaml'}", *ENGINES[engine])
    resume = f"--resume={ddp / 'ddp/checkpoints/step_00000003.pt'}"
    runs(2, ddp, [*flags, f"--name={engine}"], [*flags, f"--name={engine}-resumed", resume])
    expected = losses(ddp, "ddp")
    later = {step: loss for step, loss in expected.items() if step > 3}
    assert losses(ddp, engine) == pytest.approx(expected, abs=2e-4)
    assert losses(ddp, f"{engine}-resumed") == pytest.approx(later, abs=2e-4)
    assert metrics(ddp, engine)[-1]["stripes/top1"] == pytest.approx(metrics(ddp, "ddp")[-1]["stripes/top1"], abs=0.03)
    ours, theirs = checkpoint(ddp, engine, 6), checkpoint(ddp, "ddp", 6)
    assert ours["optimizer"].keys() == theirs["optimizer"].keys()
    for key, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], value, atol=2e-3, rtol=0)
    # In one process, with twice the batch: the same steps but for their samples
    resume = f"--resume={ddp / engine / 'checkpoints/step_00000003.pt'}"
    main(train_flags(depth_shards, ddp, *RECIPE, f"--name={engine}-alone", resume, "--batch-size=8"))
    assert losses(ddp, f"{engine}-alone").keys() == later.keys()
    assert load(ddp / engine).encode(text=["a wall"]).shape == (1, 384)
