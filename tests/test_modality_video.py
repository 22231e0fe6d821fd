"""Video: the same frames from each decoder, and no frames where a file cannot give them."""

import io
import resource
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from clips import FRAMES, HEIGHT, WIDTH, numbered, numbers, write
from helpers import ROOT
from PIL import Image

from languagebind.config import UserError
from languagebind.modalities import DecodeError
from languagebind.modalities._video_backends import BACKENDS, resolve
from languagebind.modalities.video import Video


@pytest.fixture(scope="module")
def clips() -> dict[str, bytes]:
    return {
        "mp4": write(mux={"movflags": "faststart"}),  # the header in front, so that a cut file can be opened
        "with sound": write(sound=True),
        "fragmented": write(mux={"movflags": "frag_keyframe+empty_moov"}),
        "variable rate": write(times=[n * 40 + 200 * (n > 20) + 15 * (n % 3) for n in range(FRAMES)]),
        "mkv": write("matroska"),
        "webm": write("webm", "libvpx"),
        "avi": write("avi", "mpeg4"),
        "mov": write("mov"),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mp4", "with sound", "fragmented", "variable rate", "mkv", "webm", "avi", "mov"])
def test_each_decoder_gives_the_frames_of_linspace(clips, tmp_path, backend, name):
    for num_frames in (1, 8, 13):
        video = Video(num_frames=num_frames, video_backend=backend)
        frames = video.decode(clips[name])
        assert frames.shape == (num_frames, 3, HEIGHT, WIDTH)
        assert frames.dtype == torch.uint8
        assert numbers(frames) == np.linspace(0, FRAMES - 1, num_frames, dtype=int).tolist()
    path = tmp_path / "a:strange, name"
    path.write_bytes(clips[name])
    assert torch.equal(video.decode(path), frames)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mp4", "webm", "avi"])
def test_decoders_agree_on_every_pixel(clips, backend, name):
    expected = Video(video_backend="pyav").decode(clips[name])
    assert torch.equal(Video(video_backend=backend).decode(clips[name]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_decoder_matches_the_original(golden, backend):
    expected = np.load(golden / "golden/preprocess.npz")
    for sample in (0, 1):
        x = Video(video_backend=backend).preprocess(golden / f"media/video/{sample}.mp4")
        assert (x - torch.from_numpy(expected[f"video_{sample}"])).abs().mean() <= 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_short_clips_repeat_frames(backend, count):
    frames = Video(video_backend=backend).decode(write(count=count))
    assert numbers(frames) == np.linspace(0, count - 1, 8, dtype=int).tolist()


def cut_by_edit_list(file: bytes) -> bytes:
    """The clip without its first 0.8 s, which stay in the file but are not shown (a trim without re-encoding)."""
    at = file.index(b"elst") + 12  # then: duration, first moment shown
    rate = 25 * 512  # ticks a second that FFmpeg's MP4 writer chooses for 25 frames a second
    start = int.from_bytes(file[at + 4 : at + 8], "big") + int(0.8 * rate)
    return file[: at + 4] + start.to_bytes(4, "big") + file[at + 8 :]


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_hidden_by_an_edit_list_are_not_counted(clips, backend):
    trimmed = cut_by_edit_list(clips["mp4"])
    if backend == "decord":  # it counts and misplaces them: an error is better than wrong frames
        with pytest.raises(DecodeError, match="decord: found 60 frames, expected 40"):
            Video(video_backend=backend).decode(trimmed)
    else:
        frames = Video(num_frames=5, video_backend=backend).decode(trimmed)
        assert numbers(frames) == [20 + n for n in np.linspace(0, 39, 5, dtype=int)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_phone_s_rotation_is_applied(clips, backend):
    unturned = [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]
    quarter = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    before, after = (b"".join(n.to_bytes(4, "big", signed=True) for n in m) for m in (unturned, quarter))
    file = clips["mp4"]
    track = file.index(b"tkhd")
    turned = file[:track] + file[track:].replace(before, after, 1)
    frames = Video(video_backend=backend).decode(turned)
    assert torch.equal(frames, Video(video_backend=backend).decode(file).rot90(-1, (2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mp4", "with sound", "mkv", "webm", "avi"])
@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_a_lost_end_is_an_error(clips, backend, name, damage):
    file = clips[name]
    for share in (0.3, 0.6):
        kept = file[: int(len(file) * share)]
        with pytest.raises(DecodeError):
            Video(video_backend=backend).decode(kept + bytes(len(file) - len(kept)) * (damage == "zeros"))


@pytest.mark.parametrize("share", [0.8, 0.95, 0.99])
def test_mp4_that_lacks_only_its_last_frames_is_an_error(clips, share):
    with pytest.raises(DecodeError, match="truncated"):
        Video().decode(clips["mp4"][: int(len(clips["mp4"]) * share)])


def test_opencv_refuses_interlaced_video_rather_than_return_noise():
    clip = write(flags="+ildct+ilme")
    assert numbers(Video(num_frames=3).decode(clip)) == [0, 29, 59]
    with pytest.raises(DecodeError, match="opencv: interlaced"):
        Video(video_backend="opencv").decode(clip)


def test_files_without_moving_pictures_are_refused():
    file = io.BytesIO()
    Image.fromarray(numbered(0)).save(file, "PNG")
    with pytest.raises(DecodeError, match="not a video file"):
        Video().decode(file.getvalue())
    assert numbers(Video(num_frames=1).decode(file.getvalue())) == [0]  # a frame drawn from a sample's frames


def test_limits_hold_before_decoding(clips):
    with pytest.raises(DecodeError, match=r"128x64 pixels .* --max-pixels 8000"):
        Video(image_size=32, max_pixels=8000).decode(clips["mp4"])
    with pytest.raises(DecodeError, match="exceeds --max-seconds 2"):
        Video(max_seconds=2.0).decode(clips["mp4"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_bomb_is_not_decoded(backend):
    clip = write("webm", "libvpx", count=2, width=256, height=256)
    sizes = bytes.fromhex("b0 82 0100 ba 82 0100"), bytes.fromhex("b0 82 2ee0 ba 82 2ee0")  # as Matroska writes them
    assert sizes[0] in clip
    bomb = clip.replace(*sizes)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match="12000x12000 pixels"):
        Video(video_backend=backend).decode(bomb)
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_extracted_frames_are_frames(tmp_path):
    files = []
    for number in range(20):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(numbered(number)).save(files[-1])
    frames = Video().decode(files)
    assert numbers(frames) == np.linspace(0, 19, 8, dtype=int).tolist()
    assert torch.equal(frames, Video().decode([file.read_bytes() for file in files]))
    assert numbers(Video().decode(files[:3])) == np.linspace(0, 2, 8, dtype=int).tolist()
    (tmp_path / "2.png").write_bytes(files[2].read_bytes()[:-30])
    with pytest.raises(DecodeError, match=r"2\.png"):
        Video().decode(files)
    Image.fromarray(numbered(0, 64, 64)).save(tmp_path / "0.png")
    with pytest.raises(DecodeError, match="differ in size"):
        Video(num_frames=2).decode(files)
    with pytest.raises(DecodeError, match="no frames"):
        Video().decode([])


def test_frames_in_memory_agree():
    array = np.stack([numbered(n) for n in range(30)])
    tensor = torch.from_numpy(array)
    expected = Video().preprocess(array)
    pictures = [Image.fromarray(frame) for frame in array]
    for value in (tensor, tensor.permute(0, 3, 1, 2), pictures, list(array)):
        assert torch.equal(Video().preprocess(value), expected)
    assert numbers(Video().from_memory(array)) == np.linspace(0, 29, 8, dtype=int).tolist()
    with pytest.raises(DecodeError, match="expected a path"):
        Video().from_memory(array[0])


def test_a_random_crop_is_the_same_in_every_frame():
    still = np.repeat(numbered(5)[None], 8, axis=0)
    x = Video().preprocess(still, torch.Generator().manual_seed(3))
    assert torch.equal(x, x[:, :1].expand_as(x))


def test_auto_takes_the_first_decoder_that_can_be_imported():
    assert resolve("auto") == "torchcodec"
    code = """
        import logging, sys
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
        sys.modules["torchcodec.decoders"] = None  # as if it were not installed
        from languagebind.modalities._video_backends import resolve
        print(resolve("auto"), resolve("auto"))
        resolve("torchcodec")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.count("video backend: decord; not usable: torchcodec (") == 1
    assert "decord decord" in run.stdout
    assert f"{UserError.__name__}: no usable video backend: torchcodec (" in run.stderr
