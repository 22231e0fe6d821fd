"""Training with a small PE-Core of timm: engines, accumulation, resuming, compiling, loading and export."""

import numpy as np
import pytest
import torch
from helpers import MINILM, call_ranks, checkpoint, depth_png, losses
from test_accumulation import gradients
from test_engines import ENGINES

from languagebind import load
from languagebind.config import UserError
from languagebind.hub.export import main as export
from training.main import main

SMALL = ["embed_dim=32", "num_heads=2", "attn_pool_num_heads=2"]
TINY = ["--encoder-tower=timm/vit_pe_core_tiny_patch16_384", "--encoder-pretrained=none", "--image-size=64",
        "--timm-options", "depth=2", *SMALL]  # fmt: skip


def flags(shards, logs, *more):
    """A run of four steps with a small PE-Core."""
    return ["--modality=depth", *TINY, "--tuning=full", f"--text-tower={MINILM}", f"--train-data={shards}",
            "--caption-source=raw", "--batch-size=8", "--workers=0", "--precision=fp32", "--warmup=2", f"--logs={logs}",
            "--log-every-n-steps=1", "--train-num-samples=32", *more]  # fmt: skip


def test_a_run_goes_on_and_its_checkpoint_is_enough(depth_shards, tmp_path):
    more = ["--tuning=lora", "--patch-dropout=0.5", "--save-every-n-steps=2"]
    main(flags(depth_shards, tmp_path, *more, "--name=whole"))
    resume = f"--resume={tmp_path / 'whole/checkpoints/step_00000002.pt'}"
    main(["--config", str(tmp_path / "whole/config.yaml"), resume, "--name=rest"])
    whole, rest = (checkpoint(tmp_path, name, 4) for name in ("whole", "rest"))
    assert all(torch.equal(rest["model"][key], value) for key, value in whole["model"].items())
    assert whole["config"]["model"]["encoder"]["timm_model"] == "vit_pe_core_tiny_patch16_384"
    assert whole["config"]["inputs"]["image_mean"] == [0.5] * 3
    export([f"--checkpoint={tmp_path / 'whole'}", f"--output={tmp_path / 'out'}"])
    own, exported = load(tmp_path / "whole"), load(tmp_path / "out")
    pictures = [depth_png(1, np.random.default_rng(0))]
    assert torch.equal(own.encode(depth=pictures), exported.encode(depth=pictures))
    assert own.encoders["depth"][1].image_std == (0.5,) * 3
    with pytest.raises(UserError, match="does not support vit_pe_core_tiny_patch16_384"):
        export([f"--checkpoint={tmp_path / 'whole'}", f"--output={tmp_path / 'other'}", "--adapter"])


def test_accumulated_and_recomputed_batches_have_the_same_gradients(depth_shards, tmp_path):
    base = flags(depth_shards, tmp_path, "--train-num-samples=8", "--shuffle-buffer=0", "--save-every-n-steps=1")
    main([*base, "--name=plain"])
    main([*base, "--name=again", "--batch-size=2", "--accum-freq=4", "--grad-checkpointing"])
    main([*base, "--name=half", "--grad-checkpointing", "--grad-checkpointing-blocks=1"])
    for name in ("again", "half"):
        for key, value in gradients(tmp_path, "plain").items():
            torch.testing.assert_close(gradients(tmp_path, name)[key], value, atol=1e-5, rtol=1e-3)


def test_layers_below_learn_more_slowly(depth_shards, tmp_path):
    base = flags(depth_shards, tmp_path, "--layer-decay=0.5", "--train-num-samples=8", "--wd=0", "--lr=1e-2")
    main([*base, "--warmup=0", "--lr-scheduler=const", "--name=decay"])
    main([*base, "--lr=0", "--name=start"])
    start, after = (checkpoint(tmp_path, name, 1)["model"] for name in ("start", "decay"))
    names = ("attn_pool.kv.weight", "blocks.1.mlp.fc1.weight", "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight")
    names = [f"vision_model.trunk.{name}" for name in names]
    steps = [(after[name] - start[name]).abs().max().item() for name in names]
    assert steps == pytest.approx([1e-2, 5e-3, 2.5e-3, 1.25e-3], rel=0.05)


@pytest.fixture(scope="module")
def ddp(depth_shards, tmp_path_factory):
    logs = tmp_path_factory.mktemp("towers")
    call_ranks(2, "-m", "training.main", *flags(depth_shards, logs, *RECIPE, "--name=ddp"))
    return logs


RECIPE = ["--tuning=lora", "--batch-size=4", "--lr=3e-3", "--grad-checkpointing"]


@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_engines_agree(engine, ddp, depth_shards):
    call_ranks(2, "-m", "training.main", *flags(depth_shards, ddp, *RECIPE, *ENGINES[engine], f"--name={engine}"))
    assert losses(ddp, engine) == pytest.approx(losses(ddp, "ddp"), abs=2e-4)
