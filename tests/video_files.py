"""Small video files as people have them, written by the `ffmpeg` command, and the frames that it decodes.

python tests/video_files.py     # prints the table of docs/performance.md: container, codec, backend
"""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from clips import numbered, numbers

from languagebind.modalities import DecodeError
from languagebind.modalities._video_backends import BACKENDS
from languagebind.modalities.video import Video

FRAMES, HEIGHT, WIDTH = 40, 48, 64
X264 = "-c:v libx264 -crf 8 -x264-params keyint=10:min-keyint=10:scenecut=0:b-adapt=0:threads=1:"
X265 = "-c:v libx265 -crf 8 -x265-params log-level=none:keyint=10:min-keyint=10:scenecut=0:b-adapt=0:pools=1:"
CODECS = {
    "H.264": X264 + "bframes=0",
    "H.264, B-frames": X264 + "bframes=3",
    "H.264, open GOPs": X264 + "bframes=3:open-gop=1",
    "HEVC": X265 + "bframes=0",
    "HEVC, B-frames": X265 + "bframes=3:open-gop=0",
    "HEVC, open GOPs": X265 + "bframes=3:open-gop=1",
    "MPEG-4": "-c:v mpeg4 -bf 0 -g 10 -q:v 2",
    "MPEG-4, B-frames": "-c:v mpeg4 -bf 2 -g 10 -q:v 2",
    "MPEG-2": "-c:v mpeg2video -bf 0 -g 10 -q:v 2",
    "MPEG-2, B-frames": "-c:v mpeg2video -bf 2 -g 10 -q:v 2",
    "VP8": "-c:v libvpx -b:v 4M -g 10 -deadline realtime",
    "VP9": "-c:v libvpx-vp9 -b:v 4M -g 10 -lag-in-frames 16 -cpu-used 8",
    "AV1": "-c:v libaom-av1 -cpu-used 8 -crf 10 -g 10 -lag-in-frames 16 -threads 1",
}
# What each container can hold, by the first word
CONTAINERS = {
    "mp4": "H.264 HEVC MPEG-4 MPEG-2 VP9 AV1",
    "mov": "H.264 HEVC MPEG-4",
    "mkv": "H.264 HEVC MPEG-4 MPEG-2 VP8 VP9 AV1",
    "webm": "VP8 VP9 AV1",
    "avi": "H.264 MPEG-4 MPEG-2",
    "mpg": "H.264 HEVC MPEG-2",
    "ts": "H.264 HEVC MPEG-4 MPEG-2",
}
LETTERS = {"torchcodec": "T", "decord": "D", "pyav": "P", "opencv": "O"}


def ffmpeg(*arguments: object) -> bytes:
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def holds(container: str, codec: str) -> bool:
    return codec.split(",")[0] in CONTAINERS[container].split()


def write(folder: Path, codec: str, container: str, *options: object, name: str = "") -> Path:
    """Write the numbered frames to a file, unless it is there."""
    path = folder / f"{name or codec.replace(' ', '')}.{container}"
    raw = folder / "frames.rgb"
    if not raw.exists():
        raw.write_bytes(b"".join(numbered(n, HEIGHT, WIDTH).tobytes() for n in range(FRAMES)))
    if not path.exists():
        form = ["-f", "vob"] if container == "mpg" else []
        size = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", 25, "-i", raw]
        ffmpeg(*size, "-pix_fmt", "yuv420p", *CODECS[codec].split(), *options, *form, path)
    return path


def copy(path: Path, name: str, start: float, seconds: float) -> Path:
    """Cut a part out of a file without encoding it again."""
    out = path.with_name(name + path.suffix)
    form = ["-f", "vob"] if path.suffix == ".mpg" else []
    ffmpeg("-ss", start, "-i", path, "-t", seconds, "-c", "copy", *form, out)
    return out


def shown(path: Path) -> list[int]:
    """The numbers of the frames that `ffmpeg` decodes."""
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    frames = np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, WIDTH, 3).copy()
    return numbers(torch.from_numpy(frames).permute(0, 3, 1, 2))


def spread(frames: list[int], count: int = 8) -> list[int]:
    return [frames[i] for i in np.linspace(0, len(frames) - 1, count, dtype=int)]


def working(path: Path, expected: list[int]) -> set[str]:
    """The backends that return the expected frames. The others must raise an error, and `auto` must not."""
    assert numbers(Video().decode(path)) == expected, f"{path.name}: auto"
    found = set()
    for backend in BACKENDS:
        try:
            frames = numbers(Video(video_backend=backend).decode(path))
        except DecodeError:
            continue
        assert frames == expected, f"{path.name}: {backend}"
        found.add(backend)
    return found


def cell(folder: Path, codec: str, container: str) -> str:
    path = write(folder, codec, container)
    return " ".join(LETTERS[backend] for backend in BACKENDS if backend in working(path, spread(shown(path))))


def row(codec: str, cells: list[str]) -> str:
    return f"| {codec} | {' | '.join(cells)} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(row("", list(CONTAINERS)), row("---", ["---"] * len(CONTAINERS)), sep="\n")
        for codec in CODECS:
            cells = [cell(Path(folder), codec, c) if holds(c, codec) else "" for c in CONTAINERS]
            print(row(codec, cells), flush=True)


if __name__ == "__main__":
    main()
