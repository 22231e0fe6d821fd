"""Frames of videos packed as pictures: the frames that the video gives, and much faster."""

import json
import tarfile
import time
from pathlib import Path

import av
import numpy as np
import pytest
from clips import FRAMES, numbered, numbers, write
from helpers import call
from PIL import Image

from languagebind.data.members import media_members
from languagebind.modalities.video import Video


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two clips and a folder of frames, and something that is no clip."""
    folder = tmp_path_factory.mktemp("media") / "bars"
    (folder / "folder").mkdir(parents=True)
    (folder / "wide.mp4").write_bytes(write())
    (folder / "large.mp4").write_bytes(write(height=360, width=640))
    (folder / "broken.mp4").write_bytes((folder / "wide.mp4").read_bytes()[:5000])
    for number in range(20):
        Image.fromarray(numbered(number, 300, 400)).save(folder / "folder" / f"{number}.png")
    return folder.parent


def make(output: Path, media: Path, *flags: str, status: int = 0) -> str:
    common = ["folder", f"--root={media}", f"--output={output}", "--workers=1", "--modality=video"]
    return call("scripts/make_shards.py", *common, *flags, status=status)


def read(shards: Path) -> dict[str, dict[str, bytes]]:
    """Members by key and extension."""
    samples = {}
    with tarfile.open(shards / "00000.tar") as shard:
        for member in shard:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key.split("-")[0], {})[extension] = shard.extractfile(member).read()
    return samples


@pytest.fixture(scope="module")
def packed(media, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed") / "shards"
    printed = make(output, media, "--frames=8")
    assert "undecodable: 1" in printed
    return output


def test_the_frames_are_those_that_the_video_gives(media, packed):
    samples, sizes = read(packed), {"bars_wide": (64, 128), "bars_large": (256, 455), "bars_folder": (256, 341)}
    assert samples.keys() == sizes.keys()
    for name, members in samples.items():
        names = media_members(members, Video.extensions)
        assert names == {k: f"{k}.jpg" for k in range(8)}
        frames = Video().decode([members[name] for name in names.values()])
        assert frames.shape == (8, 3, *sizes[name])
        count = 20 if name == "bars_folder" else FRAMES
        assert numbers(frames) == np.linspace(0, count - 1, 8, dtype=int).tolist()
    wide = Video().decode([samples["bars_wide"][f"{k}.jpg"] for k in range(8)])
    difference = (wide.float() - Video().decode(media / "bars" / "wide.mp4")).abs()
    assert difference.mean() < 8  # of 255; the bars have hard edges, where JPEG errs
    assert json.loads(samples["bars_wide"]["json"])["label"] == "bars"


def test_packed_frames_are_good_shards(packed):
    assert "no faults" in call("scripts/check_shards.py", str(packed), "--modality=video", "--decode")


def test_quality_and_size_are_options_that_are_kept(media, packed, tmp_path):
    output = tmp_path / "shards"
    make(output, media, "--frames=3", "--frame-size=64", "--frame-quality=30")
    small = read(output)["bars_large"]
    assert {name for name in small if name != "json"} == {"0.jpg", "1.jpg", "2.jpg"}
    assert Video(num_frames=3).decode([small[f"{k}.jpg"] for k in range(3)]).shape == (3, 3, 64, 114)
    assert "was made with frame_quality 30, not 31" in make(
        output, media, "--frames=3", "--frame-size=64", "--frame-quality=31", status=2
    )
    record = output / ".make_shards" / "options.json"
    options = json.loads(record.read_bytes())
    for name in ("frames", "frame_size", "frame_quality"):  # as it was written before there were these options
        del options[name]
    record.write_text(json.dumps(options))
    assert "was made with frames None, not 3" in make(output, media, "--frames=3", status=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames=0"], "frames should be a number of at least 1"),
        (["--frames=8", "--frame-quality=96"], "--frame-quality is 96; use 1 to 95"),
        (["--frames=8", "--shard-size=1000"], "--shard-size cannot be combined"),
        (["--frames=8", "--modality=depth"], "--frames needs a modality with frames"),
    ],
)
def test_mistakes_are_named(media, tmp_path, flags, message):
    assert message in make(tmp_path, media, *flags, status=2)


def test_a_picture_beside_frames_is_refused(media, tmp_path):
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"video": "bars/wide.mp4", "image": "p.jpg", "caption": "a", "id": "a"})
    )
    Image.fromarray(numbered(1)).save(media / "p.jpg")
    flags = ["jsonl", f"--manifest={tmp_path / 'm.jsonl'}", f"--root={media}", "--modality", "video", "image"]
    printed = call("scripts/make_shards.py", *flags, "--frames=2", f"--output={tmp_path / 'out'}", status=2)
    assert "two modalities in one member: 1" in printed


def film(path: Path) -> None:
    """Ten seconds of moving texture with a camera's noise, 640x360; key frames are as far apart as they usually are."""
    rng = np.random.default_rng(0)
    texture = rng.integers(16, 236, size=(45, 110, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(texture).resize((880, 360), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number in range(250):
            noise = rng.integers(12, size=(360, 640, 1), dtype=np.uint8)
            picture = texture[:, number % 240 : number % 240 + 640] + noise
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def test_packed_frames_are_read_several_times_as_fast(tmp_path):
    """In processor time, each at its best of several turns: about 14 times as fast, where 4 would pass."""
    (tmp_path / "media" / "films").mkdir(parents=True)
    film(tmp_path / "media" / "films" / "a.mp4")
    make(tmp_path / "shards", tmp_path / "media", "--frames=8")
    samples, video = read(tmp_path / "shards")["films_a"], Video()
    sources = {"frames": [samples[f"{k}.jpg"] for k in range(8)], "file": tmp_path / "media" / "films" / "a.mp4"}
    times = {name: [] for name in sources}
    for _ in range(4):
        for name, source in sources.items():
            start = time.process_time()
            video.decode(source)
            times[name].append(time.process_time() - start)
    assert min(times["file"]) > 4 * min(times["frames"]), times
