"""Several modalities in one process: the weights of separate runs, one checkpoint, resume, live partners."""

import pytest
import torch
from helpers import call, call_ranks, checkpoint, losses, metrics, train_flags, write_pairs
from torch.nn import functional as F

from languagebind import load
from languagebind.config import UserError
from languagebind.data.members import stream_samples
from languagebind.hub.encoders import load_model
from languagebind.hub.export import main as export
from training.joint import parse_runs
from training.main import main

RECIPES = {
    "depth": "modality: depth\nmax_depth: 5\nepochs: 2\nbatch_size: 8\npatch_dropout: 0.25\nval_every_n_steps: 3\n",
    "infrared": "modality: infrared\nepochs: 1\nlr: 2e-3\nseed: 3\nbatch_size: 4\naccum_freq: 2\npatch_dropout: 0.5\n",
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Shards of depth and infrared, recipes of both, and `joint.yaml`, which lists them."""
    folder = tmp_path_factory.mktemp("joint")
    write_pairs(folder / "shards", [12, 12])
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "joint.yaml").write_text("config: [depth.yaml, infrared.yaml]\nmixture: {depth: 2, infrared: 1}\n")
    return folder


def flags(pairs, *more):
    own = train_flags(pairs / "shards", pairs / "logs", *more)
    own = [flag for flag in own if flag not in ("--modality=depth", "--batch-size=8")]
    return [*own, "--workers=0", "--image-size=32", "--patch-size=8", "--warmup=1", "--depth=1"]


def same_weights(one, other):
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(one["model"][key], value) for key, value in other["model"].items())


@pytest.fixture(scope="module")
def joint(pairs):
    """The logs of a joint run of nine steps, and of a run of each modality alone."""
    main(flags(pairs, f"--config={pairs / 'joint.yaml'}", "--name=joint", "--save-every-n-steps=4"))
    for name in RECIPES:
        main(flags(pairs, f"--config={pairs / name}.yaml", f"--name={name}"))
    return pairs / "logs"


def test_each_modality_gets_the_weights_of_a_run_of_its_own(joint):
    whole = checkpoint(joint, "joint", 9)["modalities"]
    for name, steps in (("depth", 6), ("infrared", 3)):
        alone = checkpoint(joint, name, steps)
        same_weights(whole[name], alone)
        assert losses(joint, f"joint/{name}") == losses(joint, name)
        assert whole[name]["step"] == steps
        assert metrics(joint, f"joint/{name}")[0]["train/samples_per_second"] > 0
    log = (joint / "joint/out.log").read_text()
    order = [line.split("| INFO | ")[1].split()[0] for line in log.splitlines() if "Train Epoch" in line]
    assert order == ["depth", "depth", "infrared"] * 3


def test_one_checkpoint_opens_as_all_and_each_can_be_exported_alone(joint, tmp_path):
    encoders = load(joint / "joint")
    assert encoders.modalities == ["depth", "infrared"]
    assert encoders.model("depth").text_model is encoders.model("infrared").text_model
    for name in RECIPES:
        call("-m", "languagebind", "export", f"--checkpoint={joint / 'joint'}", f"--modality={name}",
             f"--output={tmp_path / name}")  # fmt: skip
    alone, exported = (load(*(folder / name for name in RECIPES)) for folder in (joint, tmp_path))
    for name in RECIPES:
        x = encoders.model(name).vision_model.input_shape
        x = torch.randn(2, *x, generator=torch.Generator().manual_seed(0))
        one, _ = load_model(joint / "joint", like=encoders.model(name), modality=name)
        for model in (encoders.model(name), exported.model(name), one):
            assert torch.equal(model.encode(x), alone.model(name).encode(x))
    with pytest.raises(UserError, match=r"joint holds depth, infrared: name one of them \(--modality\)"):
        load_model(joint / "joint", modality="audio")
    for run, more, message in (
        ("joint", [], "holds depth, infrared: name one of them (--modality)"),
        ("depth", ["--modality=infrared"], "depth is for depth, not infrared"),
    ):
        assert message in call("-m", "languagebind", "export", f"--checkpoint={joint / run}", *more,
                               f"--output={tmp_path / 'no'}", status=2)  # fmt: skip


def test_one_modality_goes_on_alone_from_a_joint_checkpoint(joint, pairs):
    resume = f"--resume={joint / 'joint/checkpoints/step_00000004.pt'}"
    main(flags(pairs, f"--config={joint / 'joint/infrared/config.yaml'}", "--name=on", resume))
    same_weights(checkpoint(joint, "on", 3), checkpoint(joint, "infrared", 3))


def test_the_last_steps_are_saved_if_one_modality_wants_fewer_than_it_has_taken(joint, pairs):
    (pairs / "less.yaml").write_text(RECIPES["depth"].replace("epochs: 2", "epochs: 1"))
    (pairs / "more.yaml").write_text(RECIPES["infrared"].replace("epochs: 1", "epochs: 3"))
    names = [f"--config={pairs / 'less.yaml'}", f"--config={pairs / 'more.yaml'}", "--name=changed"]
    main(flags(pairs, *names, f"--resume={joint / 'joint/checkpoints/step_00000009.pt'}"))
    assert [own["step"] for own in checkpoint(joint, "changed", 15)["modalities"].values()] == [6, 9]


def test_each_modality_has_its_own_charts(pairs, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    more = [f"--config={pairs / 'joint.yaml'}", "--name=charts", "--report-to=wandb", "--train-num-samples=8"]
    call("-m", "training.main", *flags(pairs, *more))
    found = [path.relative_to(pairs / "logs/charts").parts[0] for path in (pairs / "logs/charts").rglob("*.wandb")]
    assert sorted(found) == ["depth", "infrared"]


@pytest.mark.parametrize("step", [4, 8])
def test_a_joint_run_resumes_as_if_never_stopped(step, joint, pairs):
    name = f"rest{step}"
    resume = f"--resume={joint / f'joint/checkpoints/step_0000000{step}.pt'}"
    main(flags(pairs, f"--config={joint / 'joint/config.yaml'}", f"--name={name}", resume))
    whole, rest = (checkpoint(joint, run, 9)["modalities"] for run in ("joint", name))
    for modality in RECIPES:
        same_weights(rest[modality], whole[modality])
        before = checkpoint(joint, "joint", step)["modalities"][modality]["step"]
        expected = {at: loss for at, loss in losses(joint, f"joint/{modality}").items() if at > before}
        path = joint / name / modality / "metrics.jsonl"
        assert (losses(joint, f"{name}/{modality}") if path.exists() else {}) == expected


def test_a_partner_by_name_is_the_other_encoder_as_it_is(pairs):
    """Without learning, the loss is that of the saved encoders on all samples, by the formula."""
    more = [f"--config={pairs / 'joint.yaml'}", "--lr=0", "--batch-size=24", "--accum-freq=1", "--epochs=1"]
    main(flags(pairs, *more, "--name=pull", "--anchor=infrared", "--patch-dropout=0"))
    whole = checkpoint(pairs / "logs", "pull", 2)["modalities"]
    assert whole["infrared"]["partner"] is None
    assert "anchor: null" in (pairs / "logs/pull/infrared/config.yaml").read_text()
    assert {"modality": "infrared", "weight": 0.5}.items() <= whole["depth"]["partner"].items()
    main(flags(pairs, *more[:1], "--name=alone", f"--resume={pairs / 'logs/pull/checkpoints/step_00000002.pt'}"))
    assert load(pairs / "logs/alone").model("depth").trained_with == ("text", "infrared")  # although not since then
    encoders = load(pairs / "logs/pull")
    assert encoders.model("depth").trained_with == ("text", "infrared")
    export([f"--checkpoint={pairs / 'logs/pull'}", "--modality=depth", f"--output={pairs / 'alone'}"])
    assert load(pairs / "alone").model("depth").trained_with == ("text", "infrared")
    samples = [sample for path in sorted((pairs / "shards").glob("*.tar")) for sample in stream_samples(str(path))]
    depth, infrared = (encoders.encode(**{name: [sample[file] for sample in samples]})
                       for name, file in (("depth", "depth.png"), ("infrared", "infrared.jpg")))  # fmt: skip
    scores = encoders.model("depth").logit_scale.exp() * depth @ infrared.T
    expected = (F.cross_entropy(scores, torch.arange(24)) + F.cross_entropy(scores.T, torch.arange(24))) / 2
    (row,) = metrics(pairs / "logs", "pull/depth")
    assert row["train/anchor_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert "train/anchor_loss" not in metrics(pairs / "logs", "pull/infrared")[0]


@pytest.fixture(scope="module")
def pulling(pairs):
    """The flags of recipes in which each modality is the other's partner."""
    recipes = [pairs / f"pulled_{name}.yaml" for name in RECIPES]
    for path, anchor, text in zip(recipes, ("infrared", "depth"), RECIPES.values(), strict=True):
        path.write_text(f"{text}anchor: {anchor}\nanchor_weight: 1\n")
    return [f"--config={path}" for path in recipes]


def test_live_partners_resume_as_if_never_stopped(joint, pulling, pairs):
    main(flags(pairs, *pulling, "--name=both", "--save-every-n-steps=5"))
    main(flags(pairs, *pulling, "--name=rest", f"--resume={pairs / 'logs/both/checkpoints/step_00000005.pt'}"))
    whole, rest, apart = (checkpoint(pairs / "logs", run, 9)["modalities"] for run in ("both", "rest", "joint"))
    for name in RECIPES:
        same_weights(rest[name], whole[name])
        weights = [run[name]["model"]["visual_projection.weight"] for run in (whole, apart)]
        assert not torch.equal(*weights)


ENGINES = {
    "ddp": [],
    "fsdp": ["--engine=fsdp", "--tuning=lora"],
    "zero1": ["--engine=deepspeed", "--zero-stage=1"],
    "zero2": ["--engine=deepspeed", "--zero-stage=2"],
    "zero3": ["--engine=deepspeed", "--zero-stage=3"],
}


@pytest.mark.parametrize("engine", [pytest.param(x, marks=[] if x == "fsdp" else pytest.mark.slow) for x in ENGINES])
def test_every_engine_resumes_bitwise(engine, pulling, pairs):
    both = flags(pairs, *pulling, *ENGINES[engine], "--batch-size=4")
    call_ranks(2, "-m", "training.main", *both, f"--name={engine}", "--save-every-n-steps=2")
    resume = f"--resume={pairs / f'logs/{engine}/checkpoints/step_00000002.pt'}"
    call_ranks(2, "-m", "training.main", *both, f"--name={engine}-rest", resume)
    whole, rest = (checkpoint(pairs / "logs", run, 7)["modalities"] for run in (engine, f"{engine}-rest"))
    for name in RECIPES:
        same_weights(rest[name], whole[name])


def test_files_of_one_modality_are_merged_and_of_several_are_not(pairs):
    (pairs / "cluster.yaml").write_text("workers: 3\n")
    names = [f"--config={pairs / f'{name}.yaml'}" for name in ("depth", "cluster", "infrared")]
    common = [flag for flag in flags(pairs) if not flag.startswith("--workers")]
    runs = parse_runs([*names, *common])
    assert list(runs) == ["depth", "infrared"]
    assert [(config.seed, config.data.workers, config.inputs.image_size) for config in runs.values()] == [
        (0, 3, 32), (3, 3, 32)
    ]  # fmt: skip
    assert runs["depth"].inputs.max_depth == 5
    (alone,) = parse_runs([*names[1:], *common, "--modality=infrared"]).values()
    assert (alone.modality, alone.seed) == ("infrared", 3)
    assert list(parse_runs([f"--config={pairs / 'joint.yaml'}", *common])) == ["depth", "infrared"]
    assert list(parse_runs(["--config=depth_infrared", "--train-data=x"])) == ["depth", "infrared"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mixture", "depth=0"], "--mixture gives each modality a number above 0, as in depth=2, not depth=0"),
        (["--mixture", "depth"], "a number above 0, as in depth=2, not depth"),
        (["--mixture", "audio=1"], "--mixture names audio, but this run trains depth, infrared"),
        (["--keep-best=x/top1"], "--keep-best needs a run of one modality"),
        (["--tune-text"], "--tune-text needs a run of one modality"),
        (["--anchor=depth", "--anchor-features=cached"], "depth trains beside infrared: use --anchor-features live"),
        (["--config={own}"], "--name differs between depth and infrared, which train together: pass it as a flag"),
        (["--config={mixed}"], "--mixture differs between depth and infrared, which train together"),
        (
            ["--anchor={joint}"],
            r"joint has several modalities: name one \(--modality; of a partner --anchor-modality",
        ),
        (["--config={tower}"], "modalities that train together need the same text tower"),
        (["--resume={depth}"], "cannot resume from .*step_00000006.pt: it has no encoder for infrared"),
    ],
)
def test_what_several_modalities_cannot_do_is_refused(more, message, joint, pairs):
    (pairs / "own.yaml").write_text("modality: infrared\nname: own\n")
    (pairs / "tower.yaml").write_text("modality: infrared\ncontext_length: 32\n")
    (pairs / "mixed.yaml").write_text("modality: infrared\nmixture: {infrared: 3}\n")
    paths = {name: pairs / f"{name}.yaml" for name in ("own", "tower", "mixed")}
    more = [
        word.format(**paths, depth=joint / "depth/checkpoints/step_00000006.pt", joint=joint / "joint") for word in more
    ]
    with pytest.raises(UserError, match=message):
        main(flags(pairs, f"--config={pairs / 'joint.yaml'}", *more))
