"""Several batches as one, losses beside CLIP's, optimizers, moving averages: by whole runs of a few steps."""

import json
import sys

import pytest
import torch
from helpers import MINILM, checkpoint, losses, train_flags

from languagebind.config import UserError
from languagebind.hub.encoders import load
from training.main import main

BASE = ["--workers=0", "--lr=1e-3", "--warmup=1"]


def gradients(logs, name) -> dict[str, torch.Tensor]:
    """Of a first step: AdamW's first average is a tenth of them."""
    return {key: 10 * value["exp_avg"] for key, value in checkpoint(logs, name, 1)["optimizer"].items()}


SIGLIP = ["--loss=siglip", "--init-logit-bias=-10", "--init-temperature=0.1"]


@pytest.mark.parametrize("more", [[], SIGLIP, ["--matryoshka", "384", "96"]])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_accumulated_batches_have_the_gradients_of_one_large_batch(depth_shards, tmp_path, tuning, more):
    common = [*BASE, "--patch-dropout=0.25", "--train-num-samples=24", f"--tuning={tuning}", *more]
    main(train_flags(depth_shards, tmp_path, *common, "--batch-size=24", "--name=large"))
    main(train_flags(depth_shards, tmp_path, *common, "--batch-size=8", "--accum-freq=3", "--name=parts"))
    large, parts = gradients(tmp_path, "large"), gradients(tmp_path, "parts")
    assert large.keys() == parts.keys()
    assert "logit_scale" in large
    assert losses(tmp_path, "large")[1] == pytest.approx(losses(tmp_path, "parts")[1], abs=1e-6)
    for key, value in large.items():
        torch.testing.assert_close(parts[key], value, atol=1e-6, rtol=0)


def test_a_run_that_accumulates_goes_on_as_if_never_stopped(depth_shards, tmp_path):
    flags = [*BASE, "--patch-dropout=0.25", "--batch-size=4", "--accum-freq=2", "--save-every-n-steps=5"]
    main(train_flags(depth_shards, tmp_path, *flags, "--workers=2", "--name=whole"))
    resume = f"--resume={tmp_path / 'whole/checkpoints/step_00000005.pt'}"
    main(train_flags(depth_shards, tmp_path, *flags, "--workers=2", "--name=rest", resume))
    assert losses(tmp_path, "rest") == {k: v for k, v in losses(tmp_path, "whole").items() if k > 5}
    ours, theirs = checkpoint(tmp_path, "rest", 12)["model"], checkpoint(tmp_path, "whole", 12)["model"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_samples_of_one_caption_or_id_match_one_another(depth_shards, tmp_path):
    first = {}
    for positives in ("pair", "caption", "id"):
        for name, loss in (("clip", []), ("siglip", SIGLIP)):
            flags = [*BASE, *loss, f"--positives={positives}", "--train-num-samples=8", f"--name={name}-{positives}"]
            main(train_flags(depth_shards, tmp_path, *flags))
            first[name, positives] = losses(tmp_path, f"{name}-{positives}")[1]
    # Eight samples of four captions: to a sigmoid each, more pairs match, which start as unlikely as the bias says.
    assert first["siglip", "caption"] > first["siglip", "pair"] + 5
    # A softmax over equal captions gives each of them the same share, told so or not.
    assert first["clip", "caption"] == pytest.approx(first["clip", "pair"], abs=1e-6)
    for name in ("clip", "siglip"):  # every sample has an id of its own
        assert first[name, "id"] == pytest.approx(first[name, "pair"], abs=1e-6)


def test_matryoshka_of_all_dimensions_is_the_plain_loss(depth_shards, tmp_path):
    first, flags = {}, [*BASE, "--train-num-samples=8"]
    for name, sizes in (("plain", []), ("whole", ["384"]), ("nested", ["384", "96"]), ("again", ["96", "384"])):
        more = ["--matryoshka", *sizes] if sizes else []
        main(train_flags(depth_shards, tmp_path, *flags, *more, f"--name={name}"))
        first[name] = losses(tmp_path, name)[1]
    assert first["whole"] == pytest.approx(first["plain"], abs=1e-5)
    assert first["again"] == pytest.approx(first["nested"], abs=1e-6)
    assert abs(first["nested"] - first["plain"]) > 1e-3
    with pytest.raises(UserError, match="should be all 384 dimensions of the features, not 256"):
        main(train_flags(depth_shards, tmp_path, *flags, "--matryoshka", "256", "64"))


def test_siglip_learns_and_its_checkpoint_loads(depth_shards, tmp_path):
    flags = ["--loss=siglip", "--init-logit-bias=-10", "--init-temperature=0.1", "--train-num-samples=80"]
    main(train_flags(depth_shards, tmp_path, *BASE, *flags, "--name=siglip"))
    found = list(losses(tmp_path, "siglip").values())
    assert found[-1] < 0.8 * found[0]
    model, _ = load(tmp_path / "siglip").encoders["depth"]
    assert model.logit_bias.item() != -10
    for wrong in (["--loss=siglip"], ["--init-logit-bias=-10"]):
        with pytest.raises(UserError, match="belong together"):
            main(train_flags(depth_shards, tmp_path, *BASE, *wrong))


@pytest.mark.parametrize("optimizer", ["timm/lamb", "timm/adopt", "timm/adan", "adamw8bit"])
def test_other_optimizers_train_and_go_on(depth_shards, tmp_path, optimizer):
    flags = [*BASE, f"--optimizer={optimizer}", "--train-num-samples=32", "--save-every-n-steps=2"]
    main(train_flags(depth_shards, tmp_path, *flags, "--name=whole"))
    resume = f"--resume={tmp_path / 'whole/checkpoints/step_00000002.pt'}"
    main(train_flags(depth_shards, tmp_path, *flags, "--name=rest", resume))
    assert losses(tmp_path, "rest") == {k: v for k, v in losses(tmp_path, "whole").items() if k > 2}


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("sgdx", "expected one of adamw"),
        ("timm/none_such", "expected one of adamw, adamw8bit, timm/"),
        ("timm/adahessian", "expected one of adamw"),  # it needs second derivatives
        ("timm/fusedadam", "cannot be made here"),
        ("adamw8bit", "pip install bitsandbytes"),
    ],
)
def test_optimizers_that_cannot_be_used_are_named(depth_shards, tmp_path, optimizer, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # as where it is not installed
    with pytest.raises(UserError, match=message):
        main(train_flags(depth_shards, tmp_path, *BASE, f"--optimizer={optimizer}"))


def test_a_moving_average_is_what_is_evaluated_and_loaded(depth_shards, tmp_path):
    flags = [*BASE, "--ema-decay=0.5", "--train-num-samples=32", "--save-every-n-steps=2"]
    main(train_flags(depth_shards, tmp_path, *flags, "--name=whole"))
    resume = f"--resume={tmp_path / 'whole/checkpoints/step_00000002.pt'}"
    main(train_flags(depth_shards, tmp_path, *flags, "--name=rest", resume))
    saved, again = checkpoint(tmp_path, "whole", 4), checkpoint(tmp_path, "rest", 4)
    assert all(torch.equal(saved["ema"][key], again["ema"][key]) for key in saved["ema"])
    name = "visual_projection.weight"
    before = [checkpoint(tmp_path, "whole", step) for step in (2, 4)]
    assert not torch.equal(before[1]["ema"][name], before[1]["model"][name])
    loaded = load(tmp_path / "whole").encoders["depth"][0].visual_projection.weight
    assert torch.equal(loaded, saved["ema"][name])


def test_layers_below_learn_more_slowly(depth_shards, tmp_path):
    flags = [*BASE, "--layer-decay=0.5", "--train-num-samples=8", "--wd=0", "--lr=1e-2", "--save-every-n-steps=1"]
    main(train_flags(depth_shards, tmp_path, *flags, "--name=decay"))
    main(train_flags(depth_shards, tmp_path, *flags, "--name=start", "--lr=0"))
    start, after = checkpoint(tmp_path, "start", 1)["model"], checkpoint(tmp_path, "decay", 1)["model"]
    steps = [  # AdamW's first step is the learning rate, whatever the gradient
        (after[key] - start[key]).abs().max().item()
        for key in (
            "visual_projection.weight",
            "vision_model.encoder.layers.1.mlp.fc1.weight",
            "vision_model.encoder.layers.0.mlp.fc1.weight",
            "vision_model.embeddings.patch_embedding.weight",
        )
    ]
    assert steps == pytest.approx([1e-2, 5e-3, 2.5e-3, 1.25e-3], rel=0.05)


def test_captions_that_repeat_are_encoded_once(depth_shards, tmp_path, monkeypatch):
    from languagebind.model import DualEncoder

    rows, encode = [], DualEncoder.encode_text
    monkeypatch.setattr(
        DualEncoder, "encode_text", lambda self, text: rows.append(len(text["input_ids"])) or encode(self, text)
    )
    main(train_flags(depth_shards, tmp_path, *BASE, "--batch-size=32", "--name=run", f"--text-tower={MINILM}"))
    assert rows == [4, 4, 4]  # the captions of depth_shards


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_some_blocks_may_be_recomputed(depth_shards, tmp_path, blocks):
    flags = [*BASE, "--train-num-samples=8", "--patch-dropout=0.25"]
    main(train_flags(depth_shards, tmp_path, *flags, "--name=plain"))
    more = ["--grad-checkpointing", f"--grad-checkpointing-blocks={blocks}"]
    main(train_flags(depth_shards, tmp_path, *flags, "--name=again", *more))
    for key, value in gradients(tmp_path, "plain").items():
        torch.testing.assert_close(gradients(tmp_path, "again")[key], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("what", [pytest.param("encoder", marks=pytest.mark.slow), "step"])
def test_a_compiled_run_has_the_losses_of_a_plain_one(depth_shards, tmp_path, what):
    flags = [*BASE, "--train-num-samples=16"]
    main(train_flags(depth_shards, tmp_path, *flags, "--name=plain"))
    main(train_flags(depth_shards, tmp_path, *flags, "--name=compiled", f"--torchcompile={what}"))
    assert losses(tmp_path, "compiled") == pytest.approx(losses(tmp_path, "plain"), abs=1e-4)
    config = json.dumps(checkpoint(tmp_path, "compiled", 2)["config"])
    assert f'"torchcompile": "{what}"' in config
    assert checkpoint(tmp_path, "compiled", 2)["model"].keys() == checkpoint(tmp_path, "plain", 2)["model"].keys()
