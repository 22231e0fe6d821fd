"""Results in the form that an evaluation writes, of three tasks, with files that their examples are read from."""

import html.parser
import io
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from helpers import ROOT, depth_png
from PIL import Image

from languagebind.config import to_dict
from languagebind.modalities import modality_class

EVIL = "<script>alert('x')</script>"
CLASSES = [EVIL, "dining & living room", *(f"class {k}" for k in range(2, 12))]
DIRECTIONS = ("text_to_modality", "modality_to_text")
CAPTION = f"a dog barks {EVIL} 日本語\x00"


def example(key: str, source: list, text: str, found: str, rank: int, score: float) -> dict:
    return {"key": key, "source": source, "text": text, "found": found, "rank": rank, "score": score}


def result(dataset: str, model: str, task: str, metrics: dict, half: float, **more) -> dict:
    """In the form that an evaluation writes; each interval reaches `half` to both sides of the value."""
    inputs = {} if "+" in model else to_dict(modality_class(model)())
    protocol = {
        "split": "test",
        "limit": None,
        "data_sha256": "ab12",
        "samples": 240,
        "inputs": inputs,
        "versions": {"torch": "2.11.0"},
        "chance": dict.fromkeys(metrics, 0.0833),
    }
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": None,
        "task": task,
        "metrics": metrics,
        "intervals": {name: [value - half, value + half] for name, value in metrics.items() if np.isfinite(value)},
        "statistics": {"bootstrap": 1000, "seed": 0, "confidence": 0.95},
        "ties": 3,
        "language": "en",
        "protocol": protocol | more.pop("protocol", {}),
        **more,
    }


def media(folder: Path) -> dict[str, list]:
    """A depth map, one in a shard, a sound, a video, one of frames, and nothing; as `source` of an example."""
    rng = np.random.default_rng(0)
    (folder / "room.png").write_bytes(depth_png(1, rng))
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "b" / "c" / "other.png").write_bytes(depth_png(3, rng))
    with tarfile.open(folder / "00000.tar", "w") as archive:
        png = depth_png(2, rng)
        info = tarfile.TarInfo("s0.depth.png")
        info.size = len(png)
        archive.addfile(info, io.BytesIO(png))
    with tarfile.open(folder / "00000.tar") as archive:
        member = archive.getmembers()[0]
    place = {"shard": str(folder / "00000.tar"), "name": member.name, "offset": member.offset_data, "size": member.size}
    tone = np.sin(np.linspace(0, 1.5, 24000) ** 2 * 4000) / 4
    soundfile.write(folder / "tone.wav", tone, 16000)
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for step in range(12):
            frame = np.full((120, 160, 3), (230, 40, 30), np.uint8)
            frame[40:80, 10 + step * 10 : 40 + step * 10] = (20, 60, 220)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames = [str(folder / f"frame{step}.png") for step in range(4)]
    for step, path in enumerate(frames):
        Image.new("RGB", (80, 60), (60 * step, 90, 20)).save(path)
    names = {"depth": "room.png", "audio": "tone.wav", "video": "clip.mp4", "gone": "gone.png"}
    return {kind: [str(folder / name)] for kind, name in names.items()} | {"shard": [place], "frames": frames}


def classification(shift: float, sources: dict) -> dict:
    values = np.linspace(0.2, 0.95, 12) - shift
    classes = [
        {"label": f"c{k}", "name": name, "samples": 20, "top1": round(float(values[k]), 4)}
        for k, name in enumerate(CLASSES)
    ]
    right = [round(20 * value) for value in values]
    confusion = sorted(
        [[k, k, n] for k, n in enumerate(right)] + [[k, (k + 1) % 12, 20 - n] for k, n in enumerate(right)]
    )
    best = [
        example("bathroom/room.png", sources["depth"], "class 2", "class 2", 1, 0.93),
        example("00000.tar/s0", sources["shard"], "class 3", "class 3", 1, 0.91),
    ]
    worst = [example("gone.png", sources["gone"], EVIL, "class 3", 12, 0.11)]
    metrics = {"top1": 0.6123 - shift, "top5": 0.9 - shift, "mean_per_class": 0.6 - shift, "chance": 1 / 12}
    examples = {"best": best, "worst": worst}
    return result(
        "nyu_v2", "depth", "classification", metrics, 0.05, classes=classes, confusion=confusion, examples=examples
    )


def multilabel(shift: float, sources: dict) -> dict:
    classes = [
        {"label": str(k), "name": f"sound {k}", "samples": 7 + k, "AP": 0.05 * k + shift, "AUC": 0.5 + 0.02 * k}
        for k in range(1, 13)
    ]
    classes.append({"label": "13", "name": "never heard", "samples": 0, "AP": None, "AUC": None})
    worst = [example("tone", sources["audio"], "sound 1, sound 2", "sound 9", 4, 0.21)]
    metrics = {"mAP": 0.31 + shift, "mAUC": 0.9, "d_prime": float("inf")}
    return result(
        "audioset", "audio", "multilabel", metrics, 0.004, classes=classes, examples={"best": [], "worst": worst}
    )


def retrieval(shift: float, sources: dict) -> dict:
    recalls = {"R@1": 0.4271 + shift, "R@5": 0.7 + shift, "R@10": 0.8 + shift}
    metrics = {f"{way}/{name}": value for way in DIRECTIONS for name, value in recalls.items()}
    metrics["text_to_modality/median_rank"] = 2.0
    ks = [1, 2, 3, 5, 10, 20, 50, 100, 200, 240]
    curves = {
        way: [[k, min(1.0, 0.4271 + shift + lift + 0.24 * np.log10(k))] for k in ks]
        for way, lift in zip(DIRECTIONS, (0, -0.03), strict=True)
    }
    best = [example("video7", sources["video"], CAPTION, "video7", 1, 0.41)]
    worst = [example("video8", sources["frames"], "two cats", "video7", 240, 0.02)]
    return result("msrvtt", "video", "retrieval", metrics, 0.03, curves=curves, examples={"best": best, "worst": worst})


def pairs(sources: dict, **protocol) -> dict:
    """Between modalities: video and text to text and depth, each found for the other."""
    metrics = {f"{way}/R@{k}": 0.1 * k for way in ("query_to_gallery", "gallery_to_query") for k in (1, 5)}
    root = sources["depth"][0].removesuffix("room.png")
    worst = [example("room.png", [f"{root}room.png"], "a/b/two", "b/c/other.png", 3, 0.2)]
    modalities = {"inputs": {name: to_dict(modality_class(name)()) for name in ("video", "depth")}}
    sides = {"query": {"video": 1.0, "text": 1.0}, "gallery": {"text": 0.5, "depth": 1.0}}
    return result("rooms", "video+depth", "retrieval", metrics, 0.02, examples={"best": [], "worst": worst},
                  protocol=modalities | sides | protocol)  # fmt: skip


class Page(html.parser.HTMLParser):
    """Its tables by caption, as rows of texts; its text and tags, values to sort by, and the text that is folded."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict]] = []
        self.values: set[str | None] = set()
        self.text = ""
        self.folded = ""
        self.depth = 0
        self.parts: list[str] | None = None
        self.rows: list[list[str]] = []
        self.feed(re.sub(r"<(style|script)>.*?</\1>", r"<\1></\1>", text, flags=re.DOTALL))
        self.text, self.folded = (" ".join(text.split()) for text in (self.text, self.folded))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.values.add(dict(attributes).get("data-value"))
        self.depth += tag == "details"
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "caption"):
            self.parts = []
        if tag in ("div", "span", "summary") and self.parts:
            self.parts.append(" ")

    def handle_endtag(self, tag):
        self.depth -= tag == "details"
        if tag in ("td", "th"):
            self.rows[-1].append(" ".join("".join(self.parts).split()))
        if tag == "caption":
            self.tables[" ".join("".join(self.parts).split())] = self.rows
        if tag in ("td", "th", "caption"):
            self.parts = None

    def handle_data(self, data):
        self.text += data
        self.folded += data if self.depth else ""
        if self.parts is not None:
            self.parts.append(data)

    def table(self, start: str) -> dict[str, list[str]]:
        rows = next(rows for caption, rows in self.tables.items() if caption.startswith(start))
        return {row[0]: row[1:] for row in rows if len(row) > 1}


def browser_program() -> str:
    """The path of the browser; skips without one."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium is installed: the page is not tried in a browser")
    return program


def chromium(*flags: str, page: Path, profile: Path) -> tuple[str, str]:
    """What the browser prints and what it logs, its pages' consoles included."""
    command = [browser_program(), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={profile}", *flags, page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
