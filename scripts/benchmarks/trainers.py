"""Run OpenCLIP's trainer and ours in turn on the same shards, model, batch and precision, each in its own processes.

Both are watched from outside, by their log lines, which are alike. A ViT-S/32 of open_clip with random weights is tuned
against its frozen text tower. The pictures have 320 x 240 pixels, and captions 8 to 20 words.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from languagebind.config import UserError

from .loader_benchmark import read_memory
from .rows import Row

ROOT = Path(__file__).resolve().parent.parent.parent
STEP = re.compile(r"Train Epoch: .* Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)")
RATIOS = {
    "speed": "samples_per_second",
    "cpu": "sample_cpu_ms",
    "memory": "peak_pss_mib",
    "start": "first_step_seconds",
}
MAKE_TOWER = """
import json, open_clip, torch
torch.manual_seed(0)
torch.save(open_clip.create_model("ViT-S-32").state_dict(), "open_clip_pytorch_model.bin")
with open("open_clip_config.json", "w") as file:
    json.dump({"model_cfg": open_clip.get_model_config("ViT-S-32")}, file)
"""
SHARDS = 8


def add_options(add: Callable[..., object]) -> None:
    python = ROOT / ".venv-open-clip/bin/python"
    add("--open-clip-python", type=Path, default=python, help="Python interpreter from scripts/setup_open_clip.sh")
    add("--precision", choices=("fp32", "amp_bf16"), default="fp32", help="with open_clip (default %(default)s)")
    add("--samples", type=int, default=2048, help="with open_clip: samples of a training (default %(default)s)")
    add("--workers", type=int, default=2, help="with open_clip (default %(default)s)")


def measure(options: argparse.Namespace) -> list[Row]:
    """Return the medians of each trainer over the rounds, and their ratios to OpenCLIP's."""
    python, batch = options.open_clip_python.absolute(), options.batch_size
    if not python.is_file():
        raise UserError(f"there is no interpreter at {python}; run scripts/setup_open_clip.sh")
    steps, rest = divmod(options.samples, batch * max(1, options.workers))
    if rest or not steps or not 0 < options.warmup_steps < options.samples // batch:
        needs = f"a multiple of {batch * max(1, options.workers)} and more than the warm-up steps' samples"
        raise UserError(f"--samples {options.samples} should be {needs}, for equal steps in all workers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder, options.samples)
        run(folder, str(python), "-c", MAKE_TOWER)
        tower = f"local-dir:{folder}"
        run(folder, sys.executable, "-m", "languagebind", "embed-text", "--train-data", name, "--caption-source", "txt",
            "--text-tower", tower, "--text-pretrained", "none")  # fmt: skip
        same = [f"--batch-size={batch}", f"--workers={options.workers}", f"--train-num-samples={options.samples}",
                f"--precision={options.precision}", "--epochs=1", "--lr=1e-4", "--warmup=10", "--device=cpu",
                f"--logs={folder / 'logs'}", "--log-every-n-steps=1"]  # fmt: skip
        shards = f"{folder}/{{{0:05d}..{SHARDS - 1:05d}}}.tar"
        theirs = [str(python), "-m", "open_clip_train.main", *same, f"--model={tower}", f"--train-data={shards}",
                  "--dataset-type=webdataset", "--lock-text", "--lock-text-freeze-layer-norm"]  # fmt: skip
        ours = [sys.executable, "-m", "training.main", *same, "--modality=image", "--tuning=full",
                f"--encoder-tower={tower}", "--encoder-pretrained=local", f"--text-tower={tower}",
                f"--train-data={folder}", "--caption-source=txt"]  # fmt: skip
        commands = {"OpenCLIP": theirs, "ours": [*ours, "--text-features=live"]}
        commands["ours, cached text"] = [*ours, "--text-features=cached"]
        found = [
            {
                name: watch(folder, name, [*command, f"--name={name}-{number}"], options)
                for name, command in commands.items()
            }
            for number in range(options.rounds)
        ]
    rows: list[Row] = []
    for variant in commands:
        rounds = [each[variant] for each in found]
        row = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        ratios = {f"{name}_ratio": row[key] / (rows[0] if rows else row)[key] for name, key in RATIOS.items()}
        rows.append({"trainer": variant, "precision": options.precision, **row, **ratios, "rounds": rounds})
    return rows


def make_shards(folder: Path, samples: int) -> None:
    """Write shards of a `.jpg` and a `.txt` for each sample, and OpenCLIP's `sizes.json`, which ours reads, too."""
    draw, rng, sizes = np.random.default_rng(0), random.Random(0), {}
    words = [f"{first}{second}" for first in ("river", "stone", "cloud", "table", "green") for second in ("", "s", "y")]
    for shard in range(SHARDS):
        name, keys = f"{shard:05d}.tar", range(samples * shard // SHARDS, samples * (shard + 1) // SHARDS)
        sizes[name] = len(keys)
        with tarfile.open(folder / name, "w") as archive:
            for key in keys:
                coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                coarse.resize((320, 240), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=90)
                caption = f"{' '.join(rng.choices(words, k=rng.randint(8, 20)))} {key}"
                for extension, data in {"jpg": file.getvalue(), "txt": caption.encode()}.items():
                    member = tarfile.TarInfo(f"{key:09d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    (folder / "sizes.json").write_text(json.dumps(sizes))


def environment(python: str) -> dict[str, str]:
    """Return the variables of a process, which finds this library only in this library's interpreter."""
    return {**os.environ, "PYTHONPATH": str(ROOT) if python == sys.executable else "", "HF_HUB_OFFLINE": "1"}


def run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, env=environment(command[0]), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{command[2]} failed:\n{done.stderr.strip()[-2000:]}")


def watch(folder: Path, name: str, command: list[str], options: argparse.Namespace) -> Row:
    """Run a training, and return its figures after the warm-up steps, and the load of the machine at its start."""
    print(f"train: {name}", file=sys.stderr, flush=True)
    load, begin, ended = os.getloadavg()[0], time.perf_counter(), threading.Event()
    trainer = psutil.Popen(command, cwd=folder, env=environment(command[0]), text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)  # fmt: skip
    memory, steps, lines = [], [], []

    def read() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            memory.append((len(steps), read_memory(trainer)["all_pss_mib"]))

    def keep_reading() -> None:
        while not ended.wait(0.5):
            read()

    reader = threading.Thread(target=keep_reading)
    reader.start()
    for line in trainer.stdout:
        lines.append(line)
        if times := STEP.search(line):
            steps.append((time.perf_counter() - begin, cpu_seconds(trainer), *map(float, times.groups())))
            read()
    ended.set()
    reader.join()
    if trainer.wait() or len(steps) != options.samples // options.batch_size:
        raise UserError(f"{name}: {len(steps)} steps, status {trainer.returncode}:\n{''.join(lines)[-2000:]}")
    timed = steps[options.warmup_steps :]
    before, samples = steps[options.warmup_steps - 1], len(timed) * options.batch_size
    return {
        "samples_per_second": samples / (steps[-1][0] - before[0]),
        "sample_cpu_ms": 1e3 * (steps[-1][1] - before[1]) / samples,
        "peak_pss_mib": max(pss for _, pss in memory),
        "step_pss_mib": max(pss for done, pss in memory if done),
        "first_step_seconds": steps[0][0],
        "data_wait_percent": 100 * sum(step[2] for step in timed) / sum(step[3] for step in timed),
        "load": load,
    }


def cpu_seconds(trainer: psutil.Process) -> float:
    """Return the CPU seconds of a process and its descendants so far, with those that have ended."""
    total = 0.0
    for process in (trainer, *trainer.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user, system, and both of children that were waited for
    return total
