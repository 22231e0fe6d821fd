"""FSDP2 and DeepSpeed against DDP and one process: real ranks, real checkpoints."""

import pytest
import torch
from helpers import ROOT, call_ranks, checkpoint, losses, metrics, stripes_config, train_flags

from languagebind.config import UserError
from languagebind.hub.encoders import load
from training.engines.deepspeed import read_options
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
    val = f"--val-config={stripes_config(logs, depth_shards)}"
    call_ranks(2, "-m", "training.main", *train_flags(depth_shards, logs, *RECIPE, val, "--name=ddp"))
    return logs


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("zero1", "zero2"))) for name in ENGINES]
)
def test_every_engine_goes_on_as_ddp_would_and_ddp_goes_on_from_it(engine, ddp, depth_shards):
    flags = train_flags(depth_shards, ddp, *RECIPE, f"--val-config={ddp / 'val.yaml'}", f"--name={engine}")
    resume = f"--resume={ddp / 'ddp/checkpoints/step_00000003.pt'}"
    more = [*ENGINES[engine], resume, "--save-every-n-steps=1"]
    call_ranks(2, "-m", "training.main", *flags, *more)
    expected = {step: loss for step, loss in losses(ddp, "ddp").items() if step > 3}
    assert losses(ddp, engine) == pytest.approx(expected, abs=2e-4)
    assert metrics(ddp, engine)[-1]["stripes/top1"] == pytest.approx(metrics(ddp, "ddp")[-1]["stripes/top1"], abs=0.03)
    ours, theirs = checkpoint(ddp, engine, 6), checkpoint(ddp, "ddp", 6)
    assert ours["optimizer"].keys() == theirs["optimizer"].keys()
    for key, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], value, atol=2e-3, rtol=0)
    # One process goes on from the middle, with twice the batch: the same steps but for their samples.
    resume = f"--resume={ddp / engine / 'checkpoints/step_00000004.pt'}"
    main(train_flags(depth_shards, ddp, *RECIPE, f"--name={engine}-alone", resume, "--batch-size=8"))
    assert losses(ddp, f"{engine}-alone").keys() == {5, 6}
    assert load(ddp / engine).encode(text=["a wall"]).shape == (1, 384)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine=fsdp"], "start training with torchrun"),
        (["--engine=deepspeed"], "start training with torchrun"),
        (["--engine=fsdp", "--optimizer=adamw8bit"], "fsdp does not support --optimizer adamw8bit"),
        (["--engine=deepspeed", "--optimizer=timm/lamb"], "deepspeed does not support --optimizer timm/lamb"),
        (["--engine=fsdp", "--precision=amp"], "fsdp does not support --precision amp"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(flags, message, depth_shards, tmp_path):
    with pytest.raises(UserError, match=message):
        main(train_flags(depth_shards, tmp_path, *flags, "--workers=0"))


def test_an_optimizer_that_fsdp_cannot_shard_is_refused_at_the_first_step(depth_shards, tmp_path):
    flags = ["--engine=fsdp", "--optimizer=timm/cadamw", "--workers=0"]
    output = call_ranks(1, "-m", "training.main", *train_flags(depth_shards, tmp_path, *flags), status=2)
    assert "error: --engine fsdp does not support this --optimizer" in output


def test_a_deepspeed_config_cannot_decide_what_flags_decide(tmp_path):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    with pytest.raises(UserError, match="sets bf16: use the flags of training"):
        read_options(tmp_path / "own.json")
    for path in sorted((ROOT / "configs/deepspeed").glob("*.json")):
        assert read_options(path)["zero_optimization"]["stage"] in (1, 2, 3)
