"""A partner in training: its features beside the shards, the loss by formula, moments, engines, and what is refused."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from eval_files import save
from helpers import call, call_ranks, checkpoint, losses, metrics, picture, train_flags, write_pairs
from safetensors.torch import load_file

from languagebind import load
from languagebind.config import UserError
from languagebind.modalities.depth import Depth
from languagebind.modalities.infrared import Infrared
from languagebind.partner import PartnerConfig, load_partner
from training.batch import DataConfig, Plan
from training.main import main
from training.worker import ShardBatches

EMBED = ("-m", "languagebind", "embed-anchor")
FRAMES = 3
CPU = torch.device("cpu")
SIGLIP = ["--loss=siglip", "--init-logit-bias=-10", "--init-temperature=0.1"]
BASE = ["--workers=0", "--lr=1e-3", "--warmup=1", "--image-size=32", "--depth=1"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), [8, 8])


@pytest.fixture(scope="module")
def partner(pairs, tmp_path_factory):
    """A run of one step on infrared: a real checkpoint of the text tower that the tests train with."""
    logs = tmp_path_factory.mktemp("partner")
    main(train_flags(pairs, logs, *BASE, "--modality=infrared", "--train-num-samples=8", "--name=infrared"))
    return logs / "infrared"


@pytest.fixture(scope="module")
def embedded(pairs, partner):
    """The same shards, with the partner's features beside them."""
    output = call(*EMBED, f"--train-data={pairs}", f"--anchor={partner}", "--batch-size=3")
    assert "16 inputs of 2 shards, infrared partner" in output
    return pairs


def train(shards, logs, name, *more):
    main(train_flags(shards, logs, *BASE, f"--name={name}", *more))
    return losses(logs, name)


def members(folder) -> dict[str, dict[str, bytes]]:
    """The samples of shards, read with tarfile alone."""
    import tarfile

    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return found


# ------------------------------------------------------------------------------------------------------ features


def test_features_are_those_of_the_encoder(embedded, partner):
    own = load_partner(PartnerConfig(str(partner)), CPU)
    samples = members(embedded)
    expected = load(partner).encode(infrared=[sample["infrared.jpg"] for sample in samples.values()])
    shards = {key: str(embedded / f"0000{key[1]}.tar") for key in samples}
    found = torch.stack([own.store.find(shards[key], sample["infrared.jpg"]) for key, sample in samples.items()])
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, atol=3e-4, rtol=0)
    with pytest.raises(UserError, match="lacks the infrared of a sample; if the shard has changed"):
        own.store.find(str(embedded / "00000.tar"), b"another picture")


def test_a_second_run_writes_what_is_missing_and_ranks_share_the_shards(partner, tmp_path):
    shards = write_pairs(tmp_path, [3, 3, 3], FRAMES, change={"s1_0": {"1.infrared.jpg": b"\xff\xd8\xff broken"}})
    flags = [f"--train-data={shards}", f"--anchor={partner}"]
    output = call_ranks(2, *EMBED, *flags)
    assert "4 inputs of 1 shards" in output
    assert "0 cannot be read" in output
    assert "of 2 shards" in output
    files = sorted(shards.glob("*.infrared-*.safetensors"))
    assert [len(load_file(path)["features"]) for path in files] == [3, 4, 3]
    assert int((load_file(files[1])["features"] == 0).all(dim=1).sum()) == 1
    files[0].unlink()
    assert "3 inputs of 1 shards" in (output := call(*EMBED, *flags))
    assert "2 shards were complete" in output


def test_an_open_clip_tower_is_a_partner(clip_folder, tmp_path):
    pictures = {f"s0_{i}": {"jpg": picture(90 + 20 * i)} for i in range(8)}
    shards = write_pairs(tmp_path / "shards", [8], change=pictures)
    tower = [f"--text-tower=local-dir:{clip_folder}", f"--anchor=open_clip:local-dir:{clip_folder}"]
    live = train(shards, tmp_path, "live", *tower)
    call(*EMBED, f"--train-data={shards}", tower[1])
    cached = train(shards, tmp_path, "cached", *tower, "--anchor-features=cached")
    assert cached == pytest.approx(live, abs=2e-3)
    assert cached != live
    saved = checkpoint(tmp_path, "cached", 1)["partner"]
    assert (saved["modality"], saved["weight"]) == ("image", 0.5)


# ---------------------------------------------------------------------------------------------------------- loss


def clip_loss(x, y, scale):
    scores = scale * x @ y.T
    own = np.diag(scores)
    rows, columns = (np.log(np.exp(scores).sum(axis=axis)) for axis in (1, 0))
    return ((rows - own).mean() + (columns - own).mean()) / 2


def siglip_loss(x, y, scale, bias):
    sign = 2 * np.eye(len(x)) - 1
    return np.log1p(np.exp(-sign * (scale * x @ y.T + bias))).sum() / len(x)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_is_that_of_the_formula(kind, embedded, partner, tmp_path):
    flags = ["--lr=0", "--batch-size=16", f"--anchor={partner}", *(SIGLIP if kind == "siglip" else [])]
    found = {}
    for mode, weight in (("live", 0), ("live", 2), ("cached", 0.5)):
        more = [f"--anchor-features={mode}", f"--anchor-weight={weight}"]
        found[mode, weight] = train(embedded, tmp_path, f"{mode}{weight}", *flags, *more)[1]
    samples = list(members(embedded).values())
    encoders = load(tmp_path / "live0")
    depth = encoders.encode(depth=[sample["depth.png"] for sample in samples], to="numpy").astype(np.float64)
    text = encoders.encode(text=[json.loads(sample["json"])["captions"]["raw"] for sample in samples], to="numpy")
    anchor = load(partner).encode(infrared=[sample["infrared.jpg"] for sample in samples], to="numpy")
    model = encoders.model("depth")
    scale = model.logit_scale.exp().item()

    def loss(x, y):
        return siglip_loss(x, y, scale, model.logit_bias.item()) if kind == "siglip" else clip_loss(x, y, scale)

    for (mode, weight), value in found.items():
        expected = loss(depth, text) + weight * loss(depth, anchor)
        assert value == pytest.approx(expected, abs=2e-3 if mode == "cached" else 1e-4)
        logged = metrics(tmp_path, f"{mode}{weight}")[0]["train/anchor_loss"]
        assert logged == pytest.approx(loss(depth, anchor), abs=2e-3)
    assert loss(depth, anchor) > 0.1


def test_the_partner_is_compared_alike_when_the_text_tower_trains(embedded, partner, tmp_path):
    for name, more in (("plain", []), ("tuned", ["--tune-text"])):
        train(embedded, tmp_path, name, f"--anchor={partner}", "--batch-size=16", *more)
    plain, tuned = (metrics(tmp_path, name)[0] for name in ("plain", "tuned"))
    assert tuned["train/anchor_loss"] == pytest.approx(plain["train/anchor_loss"], abs=1e-5)
    assert tuned["train/loss"] != plain["train/loss"]  # now with dropout


def gradients(logs, name):
    """Of a first step: AdamW's first average is a tenth of them."""
    return {key: 10 * value["exp_avg"] for key, value in checkpoint(logs, name, 1)["optimizer"].items()}


@pytest.mark.parametrize(
    ("mode", "more"), [("live", []), ("cached", SIGLIP), ("cached", ["--matryoshka", "384", "96"])]
)
def test_accumulated_batches_have_the_gradients_of_one_large_batch(mode, more, embedded, partner, tmp_path):
    flags = [f"--anchor={partner}", f"--anchor-features={mode}", "--patch-dropout=0.25", *more]
    large = train(embedded, tmp_path, "large", *flags, "--batch-size=16")
    parts = train(embedded, tmp_path, "parts", *flags, "--batch-size=4", "--accum-freq=4")
    assert large[1] == pytest.approx(parts[1], abs=1e-5)
    ours, theirs = gradients(tmp_path, "parts"), gradients(tmp_path, "large")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=2e-6, rtol=0)


def test_a_run_resumes_as_if_never_stopped(embedded, partner, tmp_path):
    flags = [f"--anchor={partner}", "--patch-dropout=0.25", "--batch-size=4", "--workers=2", "--epochs=2"]
    for mode in ("live", "cached"):
        more = [*flags, f"--anchor-features={mode}", "--save-every-n-steps=3"]
        whole = train(embedded, tmp_path, f"{mode}-whole", *more)
        resume = f"--resume={tmp_path / f'{mode}-whole/checkpoints/step_00000003.pt'}"
        rest = train(embedded, tmp_path, f"{mode}-rest", *more, resume)
        assert rest == {step: loss for step, loss in whole.items() if step > 3}
        ours, theirs = (checkpoint(tmp_path, f"{mode}-{name}", 8)["model"] for name in ("rest", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    train(embedded, tmp_path, "without", *flags[1:], resume)
    assert checkpoint(tmp_path, "without", 8)["partner"] == checkpoint(tmp_path, "cached-whole", 8)["partner"]
    other = tmp_path / "other"
    train(embedded, tmp_path, "other", "--modality=infrared", "--seed=5", "--train-num-samples=8")
    with pytest.raises(UserError, match=r"the partner of .* differs from --anchor"):
        train(embedded, tmp_path, "again", *flags, f"--anchor={other}", "--anchor-features=live", resume)


ENGINES = {
    "ddp": ["--anchor-features=live", *SIGLIP],
    "fsdp": ["--engine=fsdp", "--anchor-features=cached", "--tuning=lora"],
    "zero1": ["--engine=deepspeed", "--zero-stage=1", "--anchor-features=live"],
    "zero2": ["--engine=deepspeed", "--zero-stage=2", "--anchor-features=cached", "--accum-freq=2", "--batch-size=4"],
    "zero3": ["--engine=deepspeed", "--zero-stage=3", "--anchor-features=live"],
}


@pytest.mark.parametrize("engine", [pytest.param(x, marks=[] if x == "fsdp" else pytest.mark.slow) for x in ENGINES])
def test_two_ranks_of_every_engine_take_the_steps_of_one_process(engine, embedded, partner, tmp_path):
    # Every batch is the whole data, so the order of the samples does not matter
    flags = [f"--anchor={partner}", "--epochs=3", "--grad-clip-norm=1", "--batch-size=8", *ENGINES[engine]]
    call_ranks(2, "-m", "training.main", *train_flags(embedded, tmp_path, *BASE, *flags, "--name=ranks"))
    alone = [flag for flag in flags if not flag.startswith(("--engine", "--zero", "--accum"))]
    expected = train(embedded, tmp_path, "alone", *alone, "--batch-size=16")
    assert expected.keys() == {1, 2, 3}
    assert losses(tmp_path, "ranks") == pytest.approx(expected, abs=2e-4)
    assert checkpoint(tmp_path, "ranks", 3)["partner"] == checkpoint(tmp_path, "alone", 3)["partner"]


# --------------------------------------------------------------------------------------------------- the samples


def batches(shards, modality, partner, steps, source="raw"):
    config = DataConfig(batch_size=4, caption_source=source, shuffle_buffer=8)
    counts = {str(path): 4 for path in sorted(shards.glob("*.tar"))}
    plan = Plan(0, 0, 1, len(counts), steps)
    return ShardBatches(
        counts, modality, lambda texts: {"ids": torch.zeros(len(texts), 1)}, config, plan, None, partner
    )


@pytest.mark.parametrize("stored", [False, True])
def test_the_partner_reads_the_moment_of_the_trained_modality(stored, partner, tmp_path):
    shards = write_pairs(tmp_path, [4, 4], FRAMES)
    own = load_partner(PartnerConfig(str(partner)), CPU)
    frames = [own.modality.preprocess(picture(80 * (k + 1))) for k in range(FRAMES)]
    if stored:
        call(*EMBED, f"--train-data={shards}", f"--anchor={partner}")
        frames = list(own.encode(torch.stack(frames), "fp32").half())
        own = own.ready("auto", list(map(str, shards.glob("*.tar"))), 384)
        assert own.stored
        assert own.model is None
    depth = Depth(image_size=32)
    seen = Counter()
    for batch in batches(shards, depth, own, 10):
        for x, anchor in zip(batch.inputs, batch.anchor, strict=True):
            k = round(10 * x[0].mul(depth.image_std[0]).add(depth.image_mean[0]).mean().item()) - 1  # of 10 m
            torch.testing.assert_close(anchor, frames[k], atol=3e-4, rtol=0)
            seen[k] += 1
    assert seen.keys() == {0, 1, 2}
    assert seen.total() == 40


def test_where_the_trained_modality_reads_the_whole_the_caption_decides(partner, tmp_path):
    shards = write_pairs(tmp_path, [4], FRAMES, {f"s0_{i}": {"wave.npy": b"whole"} for i in range(4)})
    own = load_partner(PartnerConfig(str(partner)), CPU)
    sample = {**members(shards)["s0_0"], "__key__": "s0_0", "__url__": "0.tar"}
    frames = [own.modality.preprocess(picture(80 * (k + 1))) for k in range(FRAMES)]
    assert torch.equal(own.read(sample, random.Random(0), None, 1), frames[1])
    drawn = [own.read(sample, random.Random(seed), None, None) for seed in range(20)]
    assert all(any(torch.equal(x, frame) for x in drawn) for frame in frames)


def test_samples_that_the_partner_cannot_read_are_skipped_alike(partner, tmp_path):
    bad = {"s0_1": {"infrared.jpg": b"\xff\xd8\xff broken"}, "s1_2": {"infrared.jpg": b""}}
    shards = write_pairs(tmp_path / "shards", [12, 12], change=bad)
    output = call(*EMBED, f"--train-data={shards}", f"--anchor={partner}")
    assert "23 inputs of 2 shards" in output
    assert "1 cannot be read" in output
    flags = [f"--anchor={partner}", "--max-bad-share=0.2"]
    found = [train(shards, tmp_path, mode, *flags, f"--anchor-features={mode}") for mode in ("live", "cached")]
    assert found[1] == pytest.approx(found[0], abs=2e-3)
    for mode in ("live", "cached"):
        rows = [json.loads(line) for line in (tmp_path / mode / "skipped.jsonl").read_text().splitlines()]
        assert {row["key"] for row in rows} == {"s0_1", "s1_2"}
        assert all(row["reason"].startswith("partner: ") for row in rows)
    assert "no member is named infrared" in next(row["reason"] for row in rows if row["key"] == "s1_2")


def test_what_cannot_be_a_partner_is_refused(embedded, partner, clip_folder, depth_shards, tmp_path):
    def refused(message, *flags, shards=embedded):
        with pytest.raises(UserError, match=message):
            train(shards, tmp_path, "refused", *flags)

    refused(r"partner: no member is named infrared", f"--anchor={partner}", shards=depth_shards)
    refused("no checkpoint at", f"--anchor={tmp_path / 'none.pt'}")
    refused("is for infrared, not video", f"--anchor={partner}", "--anchor-modality=video")
    small = save(tmp_path, Infrared(image_size=32), clip_folder, 0)
    refused("has 16 dimensions, but the text tower 384", f"--anchor={small}")
    copy = write_pairs(tmp_path / "copy", [8, 8])
    refused("2 of 2 shards lack infrared features, .*embed-anchor", f"--anchor={partner}", "--anchor-features=cached",
            shards=copy)  # fmt: skip
    (copy / "00000.infrared-ffffffffffff.safetensors").write_bytes(b"")
    refused("belongs to another partner than this run's", f"--anchor={partner}", shards=copy)
    output = call(*EMBED, f"--train-data={depth_shards}", f"--anchor={partner}", status=2)
    assert "has no member named infrared" in output
