"""Memory does not grow with the number of samples read. `decoder_memory.py` checks the other video decoders."""

import io
import json

import av
import numpy as np
import pytest
from helpers import call

from languagebind.data.shards import ShardWriter, write_index

# Growth is measured between the middles of the two halves. A leak of one 64 x 64 frame a clip would be 12 kB a clip.
LEAK = 9e3  # bytes a clip; forked workers also copy the pages that they write to
SAMPLES = 4_000


def clip(rng: np.random.Generator) -> bytes:
    """Return an mp4 file of eight plain 64 x 64 frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), rng.integers(255), np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    with ShardWriter(folder / "00000.tar") as writer:
        for number in range(48):
            writer.add(f"s{number}", {"mp4": clip(rng)}, {"id": str(number), "captions": {"raw": "noise"}})
    write_index(folder, [writer.info])
    return folder


def test_the_loader_holds_as_much_after_many_clips_as_after_a_few(shards, tmp_path):
    check_growth("torchcodec", shards, tmp_path)


def check_growth(backend, shards, tmp_path):
    training = ["--modality=video", "--image-size=32", "--num-frames=4", f"--video-backend={backend}", "--batch-size=8",
                f"--train-data={shards}", "--caption-source=raw", "--text-pretrained=none"]  # fmt: skip
    out = tmp_path / "row.json"
    loader = ["loader", f"--samples={SAMPLES}", "--warmup-batches=100", "--workers=1", f"--output={out}"]
    call("scripts/benchmark.py", *loader, "--", *training)
    (row,) = json.loads(out.read_bytes())["rows"]
    assert row["samples"] == SAMPLES
    assert row["skipped"] == 0
    assert row["growth_mib"] * 2**20 < LEAK * SAMPLES / 2
