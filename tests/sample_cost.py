"""What a training sample costs beside its decoding and resizing, in CPU time of one worker in this process.

OMP_NUM_THREADS=1 PYTHONPATH=. python tests/sample_cost.py     # prints the table of docs/performance.md
"""

import io
import statistics
import tempfile
import time
from pathlib import Path

import clips
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, PngImagePlugin
from scipy.ndimage import gaussian_filter

from languagebind.data.shards import ShardWriter
from languagebind.modalities import _audio_files, _video_backends, audio, modality_class
from languagebind.modalities._images import ImageModality
from languagebind.modalities.depth import Depth
from training.batch import DataConfig, Plan
from training.worker import ShardBatches, WorkerStream

COUNT, BATCH, ROUNDS, CLIP = 32, 4, 7, 250
CAPTIONS = {"raw": "A ball #shorts", "mplug": "a red ball", "polish_mplug": "A red ball.",
            "ofa": [f"ball {i}" for i in range(8)]}  # fmt: skip

spent: dict[str, float] = {}
running: list[float] = []


def timed(kind, function):
    """Let a function add its CPU time to `spent`, without that of other timed functions in it."""

    def call(*args, **options):
        begin = time.process_time()
        running.append(0.0)
        try:
            return function(*args, **options)
        finally:
            took = time.process_time() - begin
            spent[kind] = spent.get(kind, 0.0) + took - running.pop()
            if running:
                running[-1] += took

    return call


def watch():
    kinds = {
        "decode": [(Image, "open"), (ImageFile.ImageFile, "load"), (PngImagePlugin.PngImageFile, "verify"),
                   (_audio_files, "_read_soundfile"), (_audio_files, "_read_av")],
        "resize": [(F, "interpolate"), (audio, "log_mel"), (audio.Audio, "_resample")],
        "normalise": [(ImageModality, "fit"), (Depth, "transform"), (audio.Audio, "transform")],
    }  # fmt: skip
    for kind, functions in kinds.items():
        for owner, name in functions:
            setattr(owner, name, timed(kind, getattr(owner, name)))
    _video_backends.SEEKING |= {name: timed("decode", find) for name, find in _video_backends.SEEKING.items()}


def picture(height, width, channels=3):
    noise = np.random.default_rng(0).standard_normal((height, width, channels))
    scales = ((0.7, 0.5), (2, 1), (8, 1.5), (30, 2))
    x = sum(gaussian_filter(noise, (scale, scale, 0)) * scale * weight for scale, weight in scales)
    return (x - x.min()) / (x.max() - x.min())


def encoded(array, form, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def colours(height, width):
    return encoded((picture(height, width) * 255).astype(np.uint8), "JPEG", quality=90)


def sound(rate, channels, form):
    file, seconds = io.BytesIO(), np.arange(10 * rate) / rate
    wave = np.sin(2 * np.pi * 440 * seconds) / 3 + np.random.default_rng(0).standard_normal(len(seconds)) / 20
    soundfile.write(file, np.stack([wave] * channels, 1), rate, format=form)
    return file.getvalue()


def panning():
    scene = (picture(336, 616) * 255).astype(np.uint8)

    def frame(i, height, width):
        top, left = int(40 + 39 * np.cos(i / 40)), int(80 + 79 * np.sin(i / 30))
        return np.ascontiguousarray(scene[top : top + height, left : left + width])

    return clips.write(count=CLIP, height=256, width=456, picture=frame, crf="23", g="50", preset="veryfast")


def depth():
    return encoded((500 + picture(256, 340, 1)[..., 0] * 4000).astype(np.uint16), "PNG")


CASES = {  # in VIDAL's sizes, and larger ones
    "depth, 340 x 256": ("depth", lambda: {"depth.png": depth()}),
    "infrared, 340 x 256": ("infrared", lambda: {"infrared.jpg": colours(256, 340)}),
    "image, 640 x 480": ("image", lambda: {"jpg": colours(480, 640)}),
    "audio, 10 s, WAV, 16 kHz": ("audio", lambda: {"wav": sound(16_000, 1, "WAV")}),
    "audio, 10 s, MP3, 44.1 kHz": ("audio", lambda: {"mp3": sound(44_100, 2, "MP3")}),
    "video, 10 s, MP4, 456 x 256": ("video", lambda: {"mp4": panning()}),
    "video, 8 packed frames, 456 x 256": ("video", lambda: {f"{i}.jpg": colours(256, 456) for i in range(8)}),
}


def measure(folder, name, members, **options):
    """Return milliseconds a sample: in all, by kind, and beside decoding, resizing and normalising."""
    modality = modality_class(name)(**options)
    with ShardWriter(folder / f"{name}.tar") as writer:
        for i in range(COUNT):
            writer.add(f"s{i:03d}", members, {"captions": CAPTIONS})
    steps, shard = COUNT // BATCH, str(folder / f"{name}.tar")
    config, plan = DataConfig(batch_size=BATCH), Plan(0, 0, 1, steps, steps)
    dataset = ShardBatches({shard: COUNT}, modality, lambda texts: {"ids": torch.zeros(len(texts), 1)}, config, plan)
    rows = []
    for _ in range(ROUNDS + 1):
        spent.clear()
        begin, stream = time.process_time(), WorkerStream(dataset, 0, 0, 1, False)
        for _ in range(steps):
            stream.next_batch()
        rows.append({"all": time.process_time() - begin, **spent})
    row = {key: statistics.median(each.get(key, 0.0) for each in rows[1:]) * 1000 / COUNT for key in rows[-1]}
    work = [row.get(kind, 0.0) for kind in ("decode", "resize", "normalise")]
    return [row["all"], *work, row["all"] - sum(work)]


def main():
    torch.set_num_threads(1)
    watch()
    print("| sample | all | decoding | resizing | normalising | the rest | share |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for label, (name, make) in CASES.items():
            members = make()
            for fast in [False] if name in ("audio", "depth") else [False, True]:
                row = measure(Path(folder), name, members, **({"fast_resize": True} if fast else {}))
                cells = [label + ", as bytes" * fast, *(f"{x:.2f} ms" for x in row), f"{row[-1] / row[0]:.0%}"]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
