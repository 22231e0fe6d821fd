"""The page and the .csv that are made of result files: figures, charts, thumbnails, mistakes, and a browser's view."""

import base64
import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from helpers import ROOT, call, depth_png
from PIL import Image

from languagebind.config import UserError, to_dict
from languagebind.eval.report import write_result
from languagebind.eval.report.__main__ import main
from languagebind.modalities import modality_class

EVIL = "<script>alert('x')</script>"
CLASSES = [EVIL, "dining & living room", *(f"class {k}" for k in range(2, 12))]
DIRECTIONS = ("text_to_modality", "modality_to_text")
CAPTION = f"a dog barks {EVIL} 日本語\x00"


def example(key: str, source: list, text: str, found: str, rank: int, score: float) -> dict:
    return {"key": key, "source": source, "text": text, "found": found, "rank": rank, "score": score}


def result(dataset: str, model: str, task: str, metrics: dict, half: float, **more) -> dict:
    """In the form that an evaluation writes; each interval reaches `half` to both sides of the value."""
    protocol = {
        "split": "test",
        "limit": None,
        "data_sha256": "ab12",
        "samples": 240,
        "inputs": to_dict(modality_class(model)()),
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
    """A depth map, the same in a shard, a sound, a video; as `source` of an example."""
    rng = np.random.default_rng(0)
    (folder / "room.png").write_bytes(depth_png(1, rng))
    with tarfile.open(folder / "00000.tar", "w") as archive:
        info = tarfile.TarInfo("s0.depth.png")
        info.size = len(depth_png(2, rng))
        archive.addfile(info, io.BytesIO(depth_png(2, rng).ljust(info.size, b"\0")[: info.size]))
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
    return {"depth": [str(folder / "room.png")], "shard": [place], "audio": [str(folder / "tone.wav")],
            "video": [str(folder / "clip.mp4")], "gone": [str(folder / "gone.png")]}  # fmt: skip


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
    best = [example("video7", sources["video"], CAPTION, CAPTION, 1, 0.41)]
    return result("msrvtt", "video", "retrieval", metrics, 0.03, curves=curves, examples={"best": best, "worst": []})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Results of two models on three datasets, the media of their examples, and two datasets' configs."""
    folder = tmp_path_factory.mktemp("report")
    sources = media(folder)
    for name, shift in (("LanguageBind_FT", 0.0), ("epoch_1", 0.04)):
        for make in (classification, multilabel, retrieval):
            made = make(shift, sources) | {"pretrained": name}
            write_result(made, folder / "results" / f"{made['dataset']}_{name}.json")
    (folder / "configs").mkdir()
    (folder / "configs" / "msrvtt.yaml").write_text(
        "task: retrieval\ndata: x.jsonl\nmetric: text_to_modality/R@1\npublished:\n"
        "  - {model: LanguageBind, values: {text_to_modality/R@1: 0.448}, where: paper, table 2}\n"
        f'  - {{model: "{EVIL}", values: {{text_to_modality/R@1: 0.36, text_to_modality/R@5: 0.61}}, where: table 3}}\n'
    )
    (folder / "configs" / "other.yaml").write_text(
        "name: nyu_v2\ntask: classification\ndata: x\nmetric: mean_per_class\n"
    )
    main([str(folder / "results"), "--output", str(folder / "out" / "page.html"), "--configs", str(folder / "configs")])
    return folder


class Page(html.parser.HTMLParser):
    """Its tables by caption, as rows of texts; its pictures; the text and tags that it holds."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.parts: list[str] | None = None
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "caption"):
            self.parts = []
        if tag in ("div", "span") and self.parts:
            self.parts.append(" ")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(" ".join("".join(self.parts).split()))
        if tag == "caption":
            self.tables["".join(self.parts)] = self.rows
        if tag in ("td", "th", "caption"):
            self.parts = None

    def handle_data(self, data):
        self.text += data
        if self.parts is not None:
            self.parts.append(data)

    def table(self, start: str) -> dict[str, list[str]]:
        rows = next(rows for caption, rows in self.tables.items() if caption.startswith(start))
        return {row[0]: row[1:] for row in rows if len(row) > 1}


def check_figures(page: Page, folder: Path) -> None:
    """Every metric of every result, with its interval, is in its cell."""
    overview = page.table("Headline metric")
    for file in (folder / "results").glob("*.json"):
        made = json.loads(file.read_text())
        table = page.table(f"All metrics on {made['dataset']},")
        column = table["metric"].index(made["pretrained"])
        for metric, value in made["metrics"].items():
            if metric == "chance":
                continue
            cell = "not finite"
            if value is not None:
                low, high = made["intervals"][metric]
                cell = f"{value:.4f} [{low:.4f}, {high:.4f}]"
            assert table[metric][column] == cell
            assert table[metric][-1] == "0.0833"
        headline = {"nyu_v2": "mean_per_class", "audioset": "mAP", "msrvtt": "text_to_modality/R@1"}[made["dataset"]]
        place = overview["dataset"].index(made["pretrained"])
        assert overview[f"{made['dataset']} {headline}"][place] == table[headline][column]


@pytest.fixture(scope="module")
def page(world):
    return Page((world / "out" / "page.html").read_text())


def test_tables_hold_the_results(world, page):
    check_figures(page, world)
    published = page.table("Headline metric")["msrvtt text_to_modality/R@1"][-1]
    assert published == f"★ 0.4480 LanguageBind 0.3600 {EVIL}"
    assert page.table("Published figures")["msrvtt"] == [EVIL, "text_to_modality/R@5", "0.6100", "table 3"]
    assert page.table("Every class of audioset, epoch_1")["never heard"] == ["13", "0", "–", "–"]
    assert page.table("The most frequent confusions on nyu_v2, LanguageBind_FT")[EVIL] == [
        "dining & living room",
        "16",
        "0.8000",
    ]


def test_what_must_not_be_compared_is_said(page):
    # 0.61 and 0.57 with 0.05 to each side overlap; 0.31 and 0.35 with 0.004 do not
    assert "nyu_v2: intervals overlap, so the difference is not significant: LanguageBind_FT with epoch_1" in page.text
    assert "msrvtt: intervals overlap" in page.text
    assert "audioset: intervals overlap" not in page.text


def test_text_from_data_is_escaped_and_nothing_is_loaded(world, page):
    text = (world / "out" / "page.html").read_text()
    assert EVIL in page.text
    assert "script" not in [tag for tag, _ in page.tags]
    assert "\0" not in text
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert not re.search(r"url\(|@import|https?:", text)
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert heads
    assert all(attributes.get("scope") in ("col", "row") for attributes in heads)


def test_thumbnails_show_the_samples(page):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    shown = {}
    for attributes in images:
        data = base64.b64decode(attributes["src"].partition(",")[2])
        assert len(data) <= 15_000
        shown[attributes["alt"]] = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert len(images) == 8  # two depth maps, one of them in a shard, a sound and a clip, for both models
    depth = next(picture for alt, picture in shown.items() if alt.startswith("Sample bathroom/room.png"))
    assert abs(depth[36, 27] - (68, 1, 84)).max() < 25  # the near stripe, dark blue
    assert abs(depth[36, 60] - (253, 231, 37)).max() < 25  # the wall, bright yellow
    assert "m (dark) to 9.00 m (bright)" in " ".join(shown)
    clip = next(picture for alt, picture in shown.items() if "video7" in alt)
    assert clip.shape == (180, 240, 3)  # four frames of 4:3
    assert abs(clip[5, 5] - (230, 40, 30)).max() < 25
    sound = next(alt for alt in shown if "tone" in alt)
    assert "1.5 s, 20 Hz (bottom) to 8 kHz (top)" in sound
    assert page.text.count("The file is not there: ") == 2


def test_charts_show_every_class_and_line(page):
    bars = [attributes for tag, attributes in page.tags if tag == "rect" and attributes.get("class") == "bar"]
    assert len(bars) == 2 * 12 + 2 * 12
    assert page.text.count("Not drawn: 1 without a sample") == 2
    lines = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert len(lines) == 4
    first = [tuple(map(float, point.split(","))) for point in lines[0]["points"].split()]
    steps = np.diff([x for x, _ in first])
    assert steps[0] == pytest.approx(first[4][0] - first[3][0], abs=0.2)  # from 1 to 2 is as far as from 5 to 10
    assert "LanguageBind_FT, text to video: 0.4271 at k = 1" in page.text
    assert "taken for class 3: " in page.text


def test_csv_has_a_row_a_metric(world):
    rows = list(csv.DictReader(io.StringIO((world / "out" / "page.csv").read_text())))
    assert len(rows) == 2 * (3 + 3 + 7)
    found = {(row["model"], row["dataset"], row["metric"]): row for row in rows}
    assert found["epoch_1", "nyu_v2", "top1"] == {
        "model": "epoch_1", "dataset": "nyu_v2", "metric": "top1", "value": str(0.6123 - 0.04),
        "low": str(0.6123 - 0.04 - 0.05), "high": str(0.6123 - 0.04 + 0.05), "chance": "0.0833", "samples": "240",
    }  # fmt: skip
    assert found["epoch_1", "audioset", "d_prime"]["value"] == ""


def test_results_of_older_versions_and_many_classes(tmp_path):
    """Without anything optional; and more classes than a chart shows."""
    old = {"dataset": "esc50", "model": "audio", "pretrained": "old", "task": "classification", "language": "en",
           "metrics": {"top1": 0.5, "chance": 0.02}, "protocol": {"samples": 10, "chance": {"top1": 0.02}}}  # fmt: skip
    classes = [{"label": str(k), "name": f"kind {k:03d}", "samples": 4, "top1": k / 100} for k in range(100)]
    confusion = [[k, (k + 1) % 100, 1 + k] for k in range(100)]
    write_result(old, tmp_path / "a.json")
    calibration = {"ece": 0.0712, "bins": [[0.3, 0.25, 12], [0.7, 0.6, 8]]}
    new = {"pretrained": "new", "classes": classes, "confusion": confusion, "calibration": calibration}
    new["protocol"] = old["protocol"] | {"limit": 10}
    write_result(old | new | {"intervals": {"top1": [0.4, None]}}, tmp_path / "b.json")
    main([str(tmp_path), "--configs", str(tmp_path)])
    page = Page((tmp_path / "report.html").read_text())
    assert page.table("All metrics on esc50")["top1"] == ["0.5000 [0.4000, ∞]", "0.5000", "0.0200"]
    assert "esc50: the models differ in limit, so their values cannot be compared" in page.text
    assert "Calibration: expected error 0.0712" in page.text
    assert page.table("How often new is right")["0.3000"] == ["0.2500", "12"]
    assert len([1 for tag, attributes in page.tags if tag == "rect" and attributes.get("class") == "bar"]) == 40
    assert "… 60 classes between these …" in page.text
    assert "the 30 of 100 classes that are confused most" in page.text
    assert len(page.table("Every class of esc50, new")) == 101
    assert len([1 for tag, attributes in page.tags if tag == "rect" and attributes.get("height") == "28"]) == 29


def test_mistakes_say_what_to_do(tmp_path):
    def fails(words: str, *flags: str) -> None:
        with pytest.raises(UserError, match=words):
            main([str(tmp_path), *flags])

    fails("no results .*`python -m languagebind.eval --output")
    good = {"dataset": "d", "model": "depth", "pretrained": "m", "task": "classification", "metrics": {"top1": 0.5},
            "protocol": {}}  # fmt: skip
    for content, words in (
        ("{", "is not valid JSON"),
        ("[]", "no result of an evaluation"),
        ('{"dataset": "d"}', "has no `model`"),
        (json.dumps(good | {"intervals": {"top1": 3}}), "`intervals` is not what"),
        (json.dumps(good | {"confusion": [[0, 1]]}), "`confusion` is not what"),
        (json.dumps(good | {"task": "clustering"}), "`task` is not what"),
    ):
        (tmp_path / "a.json").write_text(content)
        fails(words)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(good))
    fails("a.json and .*b.json are both of m on d: move one")
    (tmp_path / "b.json").unlink()
    fails("no folder", "--configs", str(tmp_path / "none"))
    fails("should end in .html", "--output", str(tmp_path / "x.csv"))
    for values, words in (("{top1: 56.7}", "give a fraction, not percent"), ("{top1: high}", "is no number")):
        (tmp_path / "d.yaml").write_text(f"published: [{{model: m, values: {values}, where: w}}]")
        fails(words, "--configs", str(tmp_path))
    assert call("-m", "languagebind.eval.report", str(tmp_path / "none"), status=2).startswith("error: ")


def chromium(*flags: str, page: Path, profile: Path) -> tuple[str, str]:
    """What the browser prints and what it logs, its pages' consoles included."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium is installed: the page is not tried in a browser")
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={profile}", *flags, page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_in_a_browser(world, tmp_path):
    """The tables are there, and the console is silent: no script was blocked, nothing was looked for."""
    dom, log = chromium("--dump-dom", page=world / "out" / "page.html", profile=tmp_path / "profile")
    check_figures(Page(dom), world)
    assert "CONSOLE" not in log, log
    broken = tmp_path / "broken.html"
    broken.write_text("<script>console.error('seen')</script>")
    assert "CONSOLE" in chromium("--dump-dom", page=broken, profile=tmp_path / "profile")[1]  # so it would be seen
