"""Video files as people have them: each decoder returns the frames that `ffmpeg` decodes, or an error."""

import io
import json
import logging
import shutil
import subprocess

import numpy as np
import pytest
import torch
from clips import numbers
from helpers import ROOT
from PIL import Image
from video_files import BACKENDS, CONTAINERS, WIDTH, copy, ffmpeg, shown, spread, working, write
from video_files import cell as measure

from languagebind.data.packing import PackOptions, pack
from languagebind.data.sources import Sample
from languagebind.modalities import DecodeError, _containers
from languagebind.modalities._video_backends import _report_fallback
from languagebind.modalities.video import Video

pytestmark = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the ffmpeg command is not installed")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("video_files")


# `python tests/video_files.py` measures the whole table
@pytest.mark.parametrize(
    ("codec", "container"),
    [
        ("H.264, B-frames", "mp4"), ("H.264, open GOPs", "mp4"), ("HEVC, open GOPs", "mkv"), ("VP9", "webm"),
        ("AV1", "webm"), ("MPEG-4", "avi"), ("MPEG-4, B-frames", "avi"), ("H.264, B-frames", "avi"),
        ("MPEG-2, B-frames", "mpg"), ("H.264", "ts"), ("H.264, B-frames", "ts"), ("MPEG-4, B-frames", "mov"),
    ],
)  # fmt: skip
def test_the_table_in_the_docs_holds(folder, codec, container):
    lines = [line.strip("| ").split("|") for line in (ROOT / "docs/performance.md").read_text().splitlines()]
    stated = next(line[1 + list(CONTAINERS).index(container)] for line in lines if line[0].strip() == codec)
    # torchcodec may find more with FFmpeg libraries other than those of the table
    found = set(measure(folder, codec, container).split())
    assert set(stated.split()) <= found <= set(stated.split()) | {"T"}


@pytest.mark.parametrize(
    ("codec", "container"),
    [
        ("H.264, B-frames", "mp4"), ("H.264", "mov"), ("HEVC, open GOPs", "mp4"), ("HEVC, open GOPs", "mkv"),
        ("H.264, open GOPs", "ts"), ("MPEG-2, B-frames", "mpg"), ("MPEG-4, B-frames", "avi"), ("VP9", "mp4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("start", [0.52, 0.7])
def test_parts_copied_without_encoding(folder, codec, container, start):
    path = copy(write(folder, codec, container), f"cut{start}-{codec}", start, 0.6)
    assert "pyav" in working(path, spread(shown(path)))


def test_recordings_of_streams(folder):
    source = write(folder, "H.264, B-frames", "mp4")
    ffmpeg("-i", source, "-c", "copy", "-f", "hls", "-hls_time", 0.4, "-hls_list_size", 0, folder / "list.m3u8")
    segments = [path.read_bytes() for path in sorted(folder.glob("list*.ts"))]
    assert len(segments) == 4
    whole = write(folder, "H.264, B-frames", "ts").read_bytes()
    late = whole[len(whole) // 188 // 4 * 188 :]  # begins between key frames
    short = whole[: len(whole) // 188 * 4 // 5 * 188 + 100]
    assert "pyav" in working(folder / "list.m3u8", spread(list(range(40))))
    for name, data in {
        "joined": b"".join(segments), "gap": segments[0] + b"".join(segments[2:]), "again": whole + segments[1],
        "late": late, "short": short,
    }.items():  # fmt: skip
        path = folder / f"{name}.mp4"  # as downloaders name them
        path.write_bytes(data)
        assert working(path, spread(shown(path))) >= {"pyav", "opencv"}, name


@pytest.mark.parametrize("container", ["mkv", "mp4", "ts"])
def test_a_variable_frame_rate(folder, container):
    for name, rule in {"gaps": "N+5*gt(N\\,20)+0.3*mod(N\\,3)", "twice": "N-mod(N\\,2)*gt(N\\,30)"}.items():
        more = "-vf", f"setpts='({rule})/25/TB'", "-fps_mode", "passthrough"
        path = write(folder, "H.264, B-frames", container, *more, name=f"vfr-{name}")
        assert working(path, spread(shown(path))) >= {"pyav", "opencv"}


@pytest.mark.parametrize(
    ("codec", "container", "options", "whole"),
    [
        ("H.264, B-frames", "mp4", [], False), ("HEVC, open GOPs", "mov", [], False), ("MPEG-4", "mp4", [], False),
        ("H.264, B-frames", "mov", ["-movflags", "faststart"], False),
        ("H.264, B-frames", "mp4", ["-vf", "setpts='(N+5*gt(N,20)+0.3*mod(N,3))/25/TB'", "-fps_mode", "vfr"], False),
        ("H.264, B-frames", "mp4", ["-use_editlist", 0], False),
        ("H.264, B-frames", "mp4", ["-movflags", "frag_keyframe+empty_moov"], True),  # no table
        ("H.264, B-frames", "mp4", ["-output_ts_offset", 2], True),  # two edits
    ],
)  # fmt: skip
def test_the_sample_table_states_what_the_packets_state(folder, monkeypatch, codec, container, options, whole):
    path = write(folder, codec, container, *options, name=f"table-{codec}-{options[-1:]}")
    command = ["ffprobe", "-v", "error", "-select_streams", "v", "-show_entries", "packet=pts_time", "-of", "json"]
    packets = json.loads(subprocess.run([*command, path], capture_output=True, check=True).stdout)["packets"]
    results, original = [], _containers._without_reading
    monkeypatch.setattr(_containers, "_without_reading", lambda *args: results.append(original(*args)) or results[-1])
    found = _containers.read_packets(path, "video", 60)
    assert found.times == pytest.approx(sorted(float(packet["pts_time"]) for packet in packets), abs=1e-6)
    assert (found.unclear, found.countable) == ("", "open" not in codec)
    assert all(rows is None for rows in results) == whole


def test_hidden_frames_of_vp8_are_not_counted(folder):
    source = write(folder, "H.264", "mp4")
    path = folder / "hidden.webm"
    for step in (1, 2):  # only the second pass writes frames to which others refer and which are not shown
        log = "-pass", step, "-passlogfile", folder / "vp8"
        options = ["-b:v", "200k", "-g", 30, "-auto-alt-ref", 1, "-lag-in-frames", 16, "-arnr-maxframes", 7]
        ffmpeg("-stream_loop", 2, "-i", source, "-c:v", "libvpx", *options, *log, path)
    packets = subprocess.run(
        ["ffprobe", "-v", "error", "-count_packets", "-show_entries", "stream=nb_read_packets", "-of", "csv=p=0", path],
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert int(packets) > len(shown(path)) == 120
    assert working(path, spread(shown(path))) == {"pyav", "opencv"}


def matrix(*values: int) -> bytes:
    a, b, c, d = (value << 16 for value in values)
    return b"".join(number.to_bytes(4, "big", signed=True) for number in (a, b, 0, c, d, 0, 0, 0, 1 << 30))


def first_picture(path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(ffmpeg("-i", path, "-vframes", 1, "-f", "apng", "-"))).convert("RGB"))


@pytest.mark.parametrize(
    "values",
    [(1, 0, 0, -1), (-1, 0, 0, 1), (-1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0), (0, 1, -1, 0), (0, -1, 1, 0)],
)
def test_display_matrices_turn_and_mirror(folder, values):
    file = write(folder, "H.264, B-frames", "mp4").read_bytes()
    track = file.index(b"tkhd")
    path = folder / "turned.mp4"
    path.write_bytes(file[:track] + file[track:].replace(matrix(1, 0, 0, 1), matrix(*values), 1))
    expected = first_picture(path)
    # decord cannot turn to a width that is not a multiple of 32
    for backend in ("auto", "torchcodec", "pyav", "opencv") + ("decord",) * (expected.shape[1] == WIDTH):
        frame = Video(num_frames=1, video_backend=backend).decode(path)[0].permute(1, 2, 0).numpy()
        assert frame.shape == expected.shape
        assert np.abs(frame.astype(int) - expected).mean() < 3, backend


@pytest.mark.parametrize("turn", ["rotate=90", "rotate=180", "flip=horizontal"])
def test_an_orientation_in_the_h264_stream(folder, turn):
    path = folder / "orientation.mkv"
    source = write(folder, "H.264, B-frames", "mp4")
    ffmpeg("-i", source, "-c", "copy", "-bsf:v", f"h264_metadata=display_orientation=insert:{turn}", path)
    expected = first_picture(path)
    for backend in ("auto", "torchcodec", "pyav", "opencv"):
        try:
            frame = Video(num_frames=1, video_backend=backend).decode(path)[0].permute(1, 2, 0).numpy()
        except DecodeError:
            assert backend in ("torchcodec", "opencv")
            continue
        assert np.abs(frame.astype(int) - expected).mean() < 3, backend


@pytest.mark.parametrize("default", [0, 1])
@pytest.mark.parametrize("container", ["mkv", "mp4"])
def test_of_two_tracks_all_read_the_one_that_ffmpeg_reads(folder, container, default):
    path = folder / f"two{default}.{container}"
    inputs = "-i", write(folder, "H.264", "mp4"), "-i", write(folder, "H.264, B-frames", "mp4")
    flags = [part for k in (0, 1) for part in (f"-disposition:v:{k}", "default" if k == default else "0")]
    ffmpeg(*inputs, "-filter_complex", "[1:v]vflip[b]", "-map", "0:v", "-map", "[b]", *flags, "-crf", 8, path)
    expected = first_picture(path)
    for backend in ("auto", *BACKENDS):
        try:
            frame = Video(num_frames=1, video_backend=backend).decode(path)[0].permute(1, 2, 0).numpy()
        except DecodeError:
            assert backend == "decord" or (backend == "opencv" and default == 1)
            continue
        assert np.abs(frame.astype(int) - expected).mean() < 3, backend


def test_a_part_of_a_clip_whose_times_are_unclear(folder):
    path = write(folder, "MPEG-4, B-frames", "avi")
    assert numbers(Video().read_part(path, 0.4, 1.2)) == spread(shown(path)[10:30])


def test_a_named_backend_says_that_it_cannot_and_auto_logs_it(folder, caplog):
    path = write(folder, "MPEG-4, B-frames", "avi")
    for backend in ("torchcodec", "decord"):
        with pytest.raises(DecodeError, match=f"{backend}: the file does not state when .*; try another"):
            Video(video_backend=backend).decode(path)
    _report_fallback.cache_clear()
    with caplog.at_level(logging.DEBUG, "languagebind"):
        for _ in range(2):
            Video().decode(path)
    assert f"{path}: torchcodec: the file does not state when each frame is shown; PyAV decodes" in caplog.text
    assert caplog.text.count("PyAV decodes videos that torchcodec misses in order, which is slower") == 1


def test_pixels_are_those_of_ffmpeg(folder):
    """Odd sizes, ten bits and full chroma, compared with FFmpeg's pictures."""
    source = write(folder, "H.264", "mp4")
    for name, options in {
        "odd": "-vf scale=63:47 -pix_fmt yuv444p -c:v libx264 -crf 8",
        "ten": "-pix_fmt yuv420p10le -c:v libx264 -crf 8",
        "full": "-vf scale=out_color_matrix=bt709:out_range=full -color_range pc -colorspace bt709 -c:v libx264 -crf 8",
    }.items():
        path = folder / f"{name}.mkv"
        ffmpeg("-i", source, *options.split(), path)
        expected = first_picture(path)
        for backend in BACKENDS:
            try:
                frame = Video(num_frames=1, video_backend=backend).decode(path)[0].permute(1, 2, 0).numpy()
            except DecodeError:
                continue
            assert torch.from_numpy(frame.astype(int) - expected).float().abs().mean() < 4, (name, backend)


@pytest.mark.parametrize(
    "options",
    [
        "-c:v libvpx-vp9 -pix_fmt yuv420p -b:v 4M", "-c:v libvpx-vp9 -pix_fmt yuv444p -b:v 4M",
        "-c:v libx264 -crf 8 -pix_fmt yuv422p10le", "-c:v libx264 -crf 8 -pix_fmt gray10le",
    ],
)  # fmt: skip
def test_full_range_colours_that_the_pixel_format_does_not_state(folder, options):
    path = folder / "full-range.mkv"
    ffmpeg(
        "-i", write(folder, "H.264", "mp4"), "-vf", "scale=out_range=full", "-color_range", "pc", *options.split(), path
    )
    expected = first_picture(path)
    for backend in ("auto", "torchcodec", "pyav", "opencv"):
        try:
            frame = Video(num_frames=1, video_backend=backend).decode(path)[0].permute(1, 2, 0).numpy()
        except DecodeError:
            assert backend == "torchcodec"
            continue
        assert np.abs(frame.astype(int) - expected).mean() < 1.5, backend


@pytest.mark.parametrize("tags", ["colour_primaries=12", "colour_primaries=9:transfer_characteristics=18"])
def test_hdr_and_wide_colours_are_those_of_ffmpeg(folder, tags):
    path = folder / "wide.mp4"  # as phones record
    ffmpeg("-i", write(folder, "H.264", "mp4"), "-c", "copy", "-bsf:v", f"h264_metadata={tags}", path)
    expected = first_picture(path)
    for backend in ("auto", "torchcodec", "decord", "pyav"):
        frame = Video(num_frames=1, video_backend=backend).decode(path)[0].permute(1, 2, 0).numpy()
        assert np.abs(frame.astype(int) - expected).mean() < 1.5, backend
    with pytest.raises(DecodeError, match=r"opencv: .* wide-gamut"):
        Video(video_backend="opencv").decode(path)


def test_avi_without_an_index(folder):
    """As an interrupted recorder leaves it: FFmpeg then takes every frame for a key frame."""
    path = folder / "unindexed.avi"
    ffmpeg("-i", write(folder, "MPEG-4", "mp4"), "-c:v", "msmpeg4", "-q:v", 2, "-g", 10, path)
    path.write_bytes(path.read_bytes()[: path.read_bytes().rindex(b"idx1")])
    assert working(path, spread(shown(path))) == {"pyav", "opencv"}


def test_a_palette(folder):
    path = folder / "palette.avi"
    ffmpeg("-i", write(folder, "H.264", "mp4"), "-c:v", "rawvideo", "-pix_fmt", "pal8", path)
    assert working(path, spread(shown(path))) == {"pyav", "opencv"}


def test_avi_with_b_frames_that_was_copied_to_mp4(folder):
    path = folder / "copied.mp4"
    ffmpeg("-i", write(folder, "MPEG-4, B-frames", "avi"), "-c", "copy", path)
    assert "pyav" in working(path, spread(shown(path)))


def test_parts_that_overlap_where_they_were_joined(folder):
    source = write(folder, "H.264, B-frames", "mp4")
    (folder / "parts.txt").write_text(f"file {source}\noutpoint 0.6\nfile {source}\ninpoint 0.5\n")
    path = folder / "overlap.mp4"
    ffmpeg("-f", "concat", "-safe", 0, "-i", folder / "parts.txt", "-c", "copy", path)
    assert "pyav" in working(path, spread(shown(path)))


def test_times_that_begin_late(folder):
    """A part whose times were kept is no truncated file, and its length is not the time at its end."""
    source = write(folder, "H.264, B-frames", "mp4")
    part, later = folder / "late.mkv", folder / "later.mkv"
    ffmpeg("-i", source, "-ss", 0.9, "-c", "copy", part)
    ffmpeg("-i", source, "-c", "copy", "-output_ts_offset", 3600, later)
    hls = "-f", "hls", "-hls_time", 0.4, "-hls_list_size", 0, "-hls_segment_type", "fmp4"
    ffmpeg("-i", source, "-c", "copy", *hls, "-hls_fmp4_init_filename", "first.mp4", folder / "live.m3u8")
    live = folder / "live.mp4"
    live.write_bytes(b"".join((folder / name).read_bytes() for name in ("first.mp4", "live2.m4s", "live3.m4s")))
    for path in (part, later, live):
        assert "pyav" in working(path, spread(shown(path))), path.name


def test_older_kinds_of_video_are_packed(folder):
    source = write(folder, "MPEG-2", "mpg")
    for name, member in {
        "a.mpeg": "mpg", "a.VOB": "mpg", "a.ts": "ts", "a.flv": "flv", "a.wmv": "wmv", "a.asf": "wmv", "a.m4v": "mp4",
        "a.3gp": "mp4", "a.mov": "mov",
    }.items():  # fmt: skip
        path = folder / name
        ffmpeg("-i", source, *["-f", "mp4"] * (name == "a.m4v"), *["-s", "176x144"] * (name == "a.3gp"), path)
        packed = pack(Sample(name, {"video": [[path]]}, {"caption": "counting"}), PackOptions())
        assert isinstance(packed, tuple), packed
        assert list(packed[1]) == [member]
        assert torch.equal(Video().decode(packed[1][member]), Video().decode(path))
