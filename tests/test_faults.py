"""What ends a training early, and what is left of it then: signals, damaged files, lost ranks, shards and services."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    call,
    checkpoint,
    depth_png,
    free_port,
    losses,
    metrics,
    start,
    start_ranks,
    stripes_config,
    torchrun,
    train_flags,
    wait_for,
    write_shards,
)

import training.run
from languagebind.config import UserError
from training.checkpoint_files import checkpoint_path, damage
from training.main import main


def same_end(logs: Path, name: str, other: str, step: int) -> None:
    assert losses(logs, name) == losses(logs, other)
    ours, theirs = checkpoint(logs, name, step)["model"], checkpoint(logs, other, step)["model"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("resampled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_killed_twenty_times_ends_as_one_never_stopped(resampled, depth_shards, tmp_path):
    flags = train_flags(
        depth_shards, tmp_path, "--batch-size=4", "--epochs=3", "--patch-dropout=0.3", "--workers=2",
        "--save-every-n-steps=3", "--keep-last=2", "--shuffle-buffer=16",
        *(["--dataset-resampled"] if resampled else []),
    )  # fmt: skip
    call("-m", "training.main", *flags, "--name=whole")
    rng, kills, written = random.Random(0), 0, tmp_path / "killed/metrics.jsonl"
    while kills < (6 if resampled else 20):
        before = lines(written)
        process = start("-m", "training.main", *flags, "--name=killed", *(["--resume=latest"] if kills else []))
        # Once it writes again, at any moment of a step or of a checkpoint.
        wait_for(lambda before=before: lines(written) != before)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        kills += 1
        for path in (tmp_path / "killed/checkpoints").glob("step_*.pt"):
            assert damage(path) is None  # under its name it is whole
    call("-m", "training.main", *flags, "--name=killed", "--resume=latest")
    same_end(tmp_path, "killed", "whole", 72)
    assert len(list((tmp_path / "killed/checkpoints").glob("step_*.pt"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_status_0(number, depth_shards, tmp_path):
    flags = train_flags(depth_shards, tmp_path, "--epochs=40", "--workers=2", "--save-every-n-steps=0")
    process = start("-m", "training.main", *flags, "--name=run", start_new_session=True)
    wait_for(lambda: lines(tmp_path / "run/metrics.jsonl") > 2)
    os.killpg(process.pid, number)  # a scheduler tells all processes of a job, the loader's too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"stopped by {number.name} after step" in output
    config = tmp_path / "run/config.yaml"
    assert f"continue with python -m training.main --config {config} --resume latest" in output
    saved = list((tmp_path / "run/checkpoints").iterdir())
    assert len(saved) == 1
    step = max(losses(tmp_path, "run"))
    assert saved[0].name == checkpoint_path(Path(), step).name
    main([*flags, "--name=run", "--resume=latest", "--epochs=1", "--lr-scheduler=const"])


def test_two_ranks_stop_together_when_one_is_told(depth_shards, tmp_path):
    flags = train_flags(depth_shards, tmp_path, "--epochs=40", "--save-every-n-steps=0", "--batch-size=4")
    ranks = start_ranks(2, "-m", "training.main", *flags, "--name=run")
    wait_for(lambda: lines(tmp_path / "run/metrics.jsonl") > 2)
    ranks[1].send_signal(signal.SIGUSR1)
    for process in ranks:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


@pytest.mark.parametrize("fault", ["signal", "data", "nan"])
def test_what_one_rank_meets_reaches_the_other_a_step_later_in_one_reduction_a_step(fault, depth_shards, tmp_path):
    flags = ["--epochs=40", "--batch-size=4", "--log-every-n-steps=1000", "--name=run"]
    flags += ["--save-every-n-steps=0" if fault == "signal" else "--save-every-n-steps=4"]
    script = str(ROOT / "tests/step_faults.py")
    ranks = start_ranks(2, script, fault, *train_flags(depth_shards, tmp_path, *flags))
    outputs = [process.communicate(timeout=60)[0] for process in ranks]
    saved = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    if fault == "signal":  # raised while the fourth step ran
        assert [process.returncode for process in ranks] == [0, 0], outputs
        assert "stopped by a signal to another rank after step 5" in outputs[0]
        assert saved == ["step_00000005.pt"]
        (steps,) = re.findall("COLLECTIVES (.*)", outputs[0])
        quiet = {"all_reduce": 1, "all_gather_into_tensor": 3, "reduce_scatter_tensor": 1}
        assert json.loads(steps)[1:4] == [quiet] * 3
    else:
        assert [process.returncode for process in ranks] == [2, 2], outputs
        assert saved == ["step_00000004.pt"]
        for output in outputs:
            if fault == "data":
                assert "error: the fifth batch is lost" in output
            else:
                assert re.search(
                    "error: the loss of step 4 is nan: the step was not saved. Samples: .*rank 1: s", output
                )


def test_a_rank_that_dies_ends_the_others_with_a_reason(depth_shards, tmp_path):
    flags = train_flags(depth_shards, tmp_path, "--epochs=40", "--save-every-n-steps=2", "--batch-size=4")
    first, second = start_ranks(2, "-m", "training.main", *flags, "--name=run")
    wait_for(lambda: lines(tmp_path / "run/metrics.jsonl") > 3)
    begin = time.monotonic()
    second.kill()
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 2
    assert time.monotonic() - begin < 45
    assert "lost contact with another rank" in output
    assert "--resume latest" in output
    for path in (tmp_path / "run/checkpoints").glob("step_*.pt"):
        assert damage(path) is None


@pytest.mark.parametrize("how", ["cut", "bits", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(how, depth_shards, tmp_path):
    flags = train_flags(depth_shards, tmp_path, "--workers=0", "--save-every-n-steps=4")
    main([*flags, "--name=run"])
    last = checkpoint_path(tmp_path / "run/checkpoints", 12)
    whole = losses(tmp_path, "run")
    data = bytearray(last.read_bytes())
    if how == "bits":
        data[len(data) // 2] ^= 1
    last.write_bytes({"cut": data[: len(data) // 2], "bits": data, "empty": b""}[how])
    with pytest.raises(UserError, match="is damaged"):
        main([*flags, "--name=other", f"--resume={last}"])
    main([*flags, "--name=run", "--resume=latest"])
    log = (tmp_path / "run/out.log").read_text()
    assert "step_00000012.pt, which is damaged" in log
    assert "resumed from" in log
    assert "step_00000008.pt at step 8 of 12" in log
    assert losses(tmp_path, "run") == whole
    assert last.with_suffix(".pt.left").exists()


def test_a_course_that_was_left_is_not_gone_on_from(depth_shards, tmp_path):
    flags = train_flags(depth_shards, tmp_path, "--workers=0", "--save-every-n-steps=4", "--name=run")
    main(flags)
    early = checkpoint_path(tmp_path / "run/checkpoints", 4)
    short = ["--train-num-samples=48", "--keep-last=1", "--save-every-n-steps=1"]
    main([*flags, f"--resume={early}", *short])
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step_00000006.pt", "step_00000008.pt.left", "step_00000012.pt.left"}


def test_an_overflow_in_float16_skips_the_whole_step(depth_shards, tmp_path, monkeypatch):
    import training.train

    score, calls = training.train._loss, []

    def overflows_once(model, features, *args):
        calls.append(1)
        if len(calls) == 2:
            features.register_hook(lambda grad: grad * float("inf"))
        return score(model, features, *args)

    monkeypatch.setattr("training.train._loss", overflows_once)
    flags = ["--workers=0", "--precision=amp", "--train-num-samples=32", "--save-every-n-steps=1", "--ema-decay=0.9"]
    main(train_flags(depth_shards, tmp_path, *flags, "--name=amp"))
    before, skipped, after = (checkpoint(tmp_path, "amp", step) for step in (1, 2, 3))
    assert all(torch.equal(before["model"][key], skipped["model"][key]) for key in before["model"])
    assert skipped["ema_steps"] == before["ema_steps"]
    assert after["model"]["logit_scale"].isfinite()
    assert not torch.equal(after["model"]["logit_scale"], skipped["model"]["logit_scale"])
    assert skipped["scaler"]["scale"] < before["scaler"]["scale"]


def test_checkpoints_by_minutes_the_last_ones_and_the_best(depth_shards, tmp_path):
    (tmp_path / "val.yaml").write_text(f"name: stripes\ntask: retrieval\ndata: {depth_shards}\ncaption_source: raw\n")
    flags = ["--workers=0", "--save-every-n-steps=0", f"--val-config={tmp_path / 'val.yaml'}", "--val-every-n-steps=4"]
    metric = "--keep-best=stripes/text_to_modality/median_rank"
    main(train_flags(depth_shards, tmp_path, *flags, metric, "--keep-last=1", "--name=run"))
    folder = tmp_path / "run/checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step_00000012.pt", "best.pt", "best.json"}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    ranks = {row["step"]: row[metric.split("=")[1]] for row in rows if metric.split("=")[1] in row}
    best = json.loads((folder / "best.json").read_bytes())
    assert best["value"] == min(ranks.values()) == ranks[best["step"]]
    assert torch.load(folder / "best.pt", weights_only=True)["step"] == best["step"]
    with pytest.raises(UserError, match="is not one of the metrics of --val-config: stripes/"):
        main(train_flags(depth_shards, tmp_path, *flags, "--keep-best=stripes/none", "--name=none"))
    with pytest.raises(UserError, match="is not one of the metrics of --val-config: none"):
        main(train_flags(depth_shards, tmp_path, "--keep-best=a"))
    main(train_flags(depth_shards, tmp_path, *flags[:2], "--save-every-minutes=1e-9", "--keep-last=3", "--name=timed"))
    assert sorted(path.name for path in (tmp_path / "timed/checkpoints").iterdir()) == [
        f"step_{step:08d}.pt" for step in (10, 11, 12)
    ]


def test_an_evaluation_that_a_kill_cut_off_is_made_up(depth_shards, tmp_path):
    (tmp_path / "val.yaml").write_text(f"name: stripes\ntask: retrieval\ndata: {depth_shards}\ncaption_source: raw\n")
    flags = ["--workers=0", f"--val-config={tmp_path / 'val.yaml'}", "--val-every-n-steps=4", "--name=run",
             "--keep-best=stripes/text_to_modality/R@1"]  # fmt: skip
    main(train_flags(depth_shards, tmp_path, *flags))
    folder = tmp_path / "run"
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    best = (folder / "checkpoints/best.json").read_bytes()
    # As a kill within the evaluation after the checkpoint of step 8 leaves it.
    (folder / "checkpoints/step_00000012.pt").unlink()
    before = [row for row in rows if json.loads(row)["step"] <= 8]
    assert '{"step": 8, "stripes/' in before[-1]
    (folder / "metrics.jsonl").write_text("".join(before[:-1]))
    main(train_flags(depth_shards, tmp_path, *flags, "--resume=latest"))
    assert "stopped before the evaluation of step 8: evaluating now" in (folder / "out.log").read_text()
    again = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row for row in again if "train/loss" not in row] == [
        json.loads(row) for row in rows if "train/loss" not in row
    ]
    assert (folder / "checkpoints/best.json").read_bytes() == best


def test_the_best_one_is_found_again_when_a_run_goes_back(depth_shards, tmp_path):
    (tmp_path / "val.yaml").write_text(f"name: stripes\ntask: retrieval\ndata: {depth_shards}\ncaption_source: raw\n")
    flags = ["--workers=0", f"--val-config={tmp_path / 'val.yaml'}", "--val-every-n-steps=4", "--name=run",
             "--keep-best=stripes/text_to_modality/mean_rank", "--save-every-n-steps=2"]  # fmt: skip
    main(train_flags(depth_shards, tmp_path, *flags))
    folder = tmp_path / "run"
    assert json.loads((folder / "checkpoints/best.json").read_bytes())["step"] > 4, "it has learnt nothing"
    # As `--keep-best` of an evaluation after the step that the run goes back to.
    again = ["--train-num-samples=48", "--lr=0", "--val-every-n-steps=100", "--save-every-n-steps=100"]
    main(train_flags(depth_shards, tmp_path, *flags, *again, f"--resume={folder / 'checkpoints/step_00000004.pt'}"))
    best = json.loads((folder / "checkpoints/best.json").read_bytes())
    assert torch.load(folder / "checkpoints/best.pt", weights_only=True)["step"] == best["step"] in (4, 6)
    assert {path.name for path in (folder / "checkpoints").glob("*.left")} >= {"step_00000012.pt.left", "best.pt.left"}


def test_one_name_one_run(depth_shards, tmp_path):
    with locked_elsewhere(tmp_path / "busy/.lock"), pytest.raises(UserError, match="another process trains in"):
        main(train_flags(depth_shards, tmp_path, "--name=busy"))
    main(train_flags(depth_shards, tmp_path, "--name=one", "--workers=0", "--train-num-samples=16"))
    main(train_flags(depth_shards, tmp_path, "--name=two", "--workers=0", "--train-num-samples=16"))
    rows = (tmp_path / "two/metrics.jsonl").read_bytes()
    resume = f"--resume={tmp_path / 'one/checkpoints/step_00000002.pt'}"
    with pytest.raises(UserError, match=r"two exists, and .*one/checkpoints/step_00000002.pt does not belong to it"):
        main(train_flags(depth_shards, tmp_path, "--name=two", resume))
    assert (tmp_path / "two/metrics.jsonl").read_bytes() == rows


@contextmanager
def locked_elsewhere(path: Path):
    """A file that another process has locked."""
    path.parent.mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield
    finally:
        process.communicate(b"\n")


def test_what_changed_under_a_run_is_said(tmp_path):
    shards, logs = write_shards(tmp_path / "shards", [16, 16]), tmp_path / "logs"
    flags = ["--name=run", "--workers=0", "--ema-decay=0.9"]
    main(train_flags(shards, logs, *flags))
    shutil.rmtree(shards)
    write_shards(tmp_path / "shards", [40, 8])
    with open(logs / "run/metrics.jsonl", "ab") as file:
        file.write(b"\0\0\0\n")
    main(train_flags(shards, logs, *flags[:2], "--epochs=2", "--batch-size=4", "--resume=latest"))
    log = (logs / "run/out.log").read_text()
    for said in (
        "batch_size, what the shards hold changed since", "skipping an unreadable line",
        "has a moving average of the weights, which is dropped",
        "the global batch size changed from 8 to 4: 4 steps have used 0.67 epochs of samples, but count as 0.33 of 2"
        " epochs. To use 2 epochs of samples, pass --epochs 2",
    ):  # fmt: skip
        assert said in log
    with pytest.raises(
        UserError, match=r"batch size changed from 4 to 16: .* count as 8.00 of 3 epochs. .* --epochs 9"
    ):
        main(train_flags(shards, logs, *flags[:2], "--epochs=3", "--batch-size=16", "--resume=latest"))


@pytest.mark.parametrize("offset", [10, 20])
def test_a_wrong_bit_in_the_directory_is_damage_too(offset, depth_shards, tmp_path):
    main(train_flags(depth_shards, tmp_path, "--name=run", "--workers=0", "--train-num-samples=8"))
    path = tmp_path / "run/checkpoints/step_00000001.pt"
    assert damage(path) is None
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] ^= 8 if offset == 10 else 1
    path.write_bytes(content)
    assert damage(path)


def test_a_worker_that_is_killed_is_named_in_the_log(depth_shards, tmp_path):
    process = start("-m", "training.main", *train_flags(depth_shards, tmp_path, "--name=run", "--epochs=400"))
    log = tmp_path / "run/out.log"
    wait_for(lambda: log.exists() and "| step 2 " in log.read_text())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(max(map(int, children)), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "/training/" not in output  # a traceback; Python may write one about the temporary files of the dead worker
    assert "when memory runs out: use fewer --workers" in log.read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_costs_its_samples_or_stops_the_run(workers, tmp_path, monkeypatch):
    import training.main

    new_model = training.main.new_model
    for name, share in (("goes-on", "0.9"), ("stops", "0.1")):
        shards = write_shards(tmp_path / name, [40, 40, 40, 40])

        def and_remove(config, shards=shards):
            (shards / "00002.tar").unlink()
            return new_model(config)

        monkeypatch.setattr("training.main.new_model", and_remove)
        flags = train_flags(shards, tmp_path, f"--workers={workers}", f"--max-bad-share={share}", f"--name=run-{name}")
        if name == "goes-on":
            main(flags)
            assert len(losses(tmp_path, "run-goes-on")) == 20
            assert "00002.tar" in (tmp_path / "run-goes-on/skipped.jsonl").read_text()
        else:
            with pytest.raises(UserError, match="samples cannot be used, more than --max-bad-share 10%"):
                main(flags)


def test_weights_and_biases_out_of_reach_is_said_and_the_run_goes_on(depth_shards, tmp_path, monkeypatch):
    for name, value in {
        "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3",
        "WANDB_MODE": "online",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    flags = train_flags(
        depth_shards, tmp_path, "--workers=0", "--report-to=wandb", "--train-num-samples=16", "--name=run"
    )
    output = call("-m", "training.main", *flags)
    assert "cannot reach Weights & Biases" in output
    assert "wandb sync" in output
    assert len(losses(tmp_path, "run")) == 2


def test_a_second_signal_while_saving_changes_nothing(depth_shards, tmp_path):
    flags = train_flags(depth_shards, tmp_path, "--epochs=40", "--save-every-n-steps=0", "--workers=1")
    process = start("-m", "training.main", *flags, "--name=run")
    wait_for(lambda: lines(tmp_path / "run/metrics.jsonl") > 2)
    for delay in (0, 0.05, 0.1, 0.2):
        threading.Timer(delay, lambda: process.poll() is None and process.send_signal(signal.SIGTERM)).start()
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM), output  # after its work, a late one may find the default again
    assert damage(next((tmp_path / "run/checkpoints").glob("step_*.pt"))) is None


def test_srun_starts_the_ranks_without_torchrun(depth_shards, tmp_path, monkeypatch):
    flags = train_flags(depth_shards, tmp_path, "--batch-size=4", "--train-num-samples=32")
    call(*torchrun(2, "-m", "training.main", "--", *flags, "--name=torchrun"))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    ranks = []
    for number in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(number))
        monkeypatch.setenv("SLURM_LOCALID", str(number))
        ranks.append(start("-m", "training.main", *flags, "--name=srun"))
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert losses(tmp_path, "srun") == losses(tmp_path, "torchrun")
    monkeypatch.delenv("MASTER_ADDR")
    assert "set MASTER_ADDR" in call("-m", "training.main", *flags, "--name=without", status=2)


def test_ctrl_c_saves_and_prints_a_command_that_continues(depth_shards, tmp_path):
    """The run has no --name, so that the printed command has to name it."""
    flags = train_flags(depth_shards, tmp_path / "my logs", "--epochs=40", "--workers=2", "--save-every-n-steps=0")
    process = start("-m", "training.main", *flags, "--lr-scheduler=const", start_new_session=True)
    wait_for(lambda: [file for file in tmp_path.glob("my logs/*/metrics.jsonl") if lines(file) > 2])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Ctrl-C again ends at once" in output
    (folder,) = (tmp_path / "my logs").iterdir()
    (command,) = re.findall(r"stopped by SIGINT after step \d+: continue with python (.*)", output)
    first = max(losses(folder.parent, folder.name))
    output = call(*shlex.split(command), f"--train-num-samples={8 * (first + 2)}", "--epochs=1")
    assert f"at step {first} of {first + 2}" in output
    assert max(losses(folder.parent, folder.name)) == first + 2


def test_a_second_ctrl_c_ends_at_once(depth_shards, tmp_path):
    """The first one arrives in an evaluation that would take a minute."""
    code = (
        "import runpy, time, training.run as run; run.evaluate = lambda *a, **k: print('busy', flush=True) or"
        " time.sleep(60); runpy.run_module('training.main', run_name='__main__')"
    )
    flags = ["--workers=1", f"--val-config={stripes_config(tmp_path, depth_shards)}", "--val-every-n-steps=2"]
    process = start("-c", code, *train_flags(depth_shards, tmp_path, *flags, "--name=run"), start_new_session=True)
    wait_for(lambda: (tmp_path / "run/checkpoints/step_00000002.pt").exists())
    begin = time.monotonic()
    for _ in range(2):
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - begin < 30
    assert process.returncode == 130, output
    assert output.rstrip().endswith("interrupted")
    assert damage(tmp_path / "run/checkpoints/step_00000002.pt") is None


def test_evaluation_never_ends_training(depth_shards, tmp_path, caplog):
    """A missing file, a row without a caption, a damaged file; then all files of another set vanish in the run."""
    files, rng = tmp_path / "files", np.random.default_rng(5)
    files.mkdir()
    rows = [{"path": f"{i}.png", "caption": f"scene {i}"} for i in range(8)]
    for i in range(8):
        (files / f"{i}.png").write_bytes(depth_png(i % 4, rng))
    (files / "3.png").unlink()
    (files / "5.png").write_bytes((files / "5.png").read_bytes()[:90])
    rows[6]["caption"] = ""
    (files / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(f"task: retrieval\ndata: {files / 'm.jsonl'}\n")
    gone = write_shards(tmp_path / "gone", [8])
    (tmp_path / "gone.yaml").write_text(f"name: gone\ntask: retrieval\ndata: {gone}\ncaption_source: raw\n")
    (tmp_path / "few.yaml").write_text(f"name: few\ntask: retrieval\ndata: {depth_shards}\ncaption_source: raw\n")
    configs = ["--val-config", *(str(tmp_path / f"{name}.yaml") for name in ("mine", "gone", "few"))]
    flags = train_flags(depth_shards, tmp_path, "--workers=0", "--train-num-samples=16", "--name=run", *configs)
    before = training.run.Run.validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run.Run.validate", lambda *args: (shutil.rmtree(gone), before(*args)))
        main([*flags, "--keep-best=gone/text_to_modality/R@1"])
    text = (tmp_path / "run/out.log").read_text()
    found = "mine: 1 of 8 samples do not fit retrieval: 6.png has 0 captions; the evaluation leaves them out"
    assert found in caplog.text  # before the run has a log
    assert "mine: the files of 1 of 7 samples are missing, first of 3.png" in caplog.text
    assert "2 of 7 samples cannot be read; the result leaves them out" in text
    assert "the evaluation on gone failed, and training continues: gone: 8 of 8 samples cannot be read" in text
    assert "no best checkpoint at step 2: the evaluation gave no gone/text_to_modality/R@1" in text
    (row,) = [row for row in metrics(tmp_path, "run") if "mine/text_to_modality/R@1" in row]
    assert row["step"] == 2
    assert "few/text_to_modality/R@1" in row
