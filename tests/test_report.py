"""The page and the .csv that are made of result files: figures, charts, thumbnails, mistakes, and a browser's view."""

import base64
import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, call
from PIL import Image
from report_world import EVIL, classification, media, multilabel, retrieval

from languagebind.config import UserError
from languagebind.eval.report import write_result
from languagebind.eval.report.__main__ import main


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
        "  - {model: LanguageBind, values: {text_to_modality/R@1: 0.448}, where: 'paper, table 2'}\n"
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
    assert "nyu_v2: intervals overlap, so neither is shown to be better: LanguageBind_FT with epoch_1" in page.text
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
    assert len(images) == 10  # two depth maps, one in a shard, a sound, a clip and one of frames, for both models
    depth = next(picture for alt, picture in shown.items() if alt.startswith("Sample bathroom/room.png"))
    assert abs(depth[36, 27] - (68, 1, 84)).max() < 25  # the near stripe, dark blue
    assert abs(depth[36, 60] - (253, 231, 37)).max() < 25  # the wall, bright yellow
    assert "m (dark) to 9.00 m (bright)" in " ".join(shown)
    clip = next(picture for alt, picture in shown.items() if "video7" in alt)
    assert clip.shape == (180, 240, 3)  # four frames of 4:3
    assert abs(clip[5, 5] - (230, 40, 30)).max() < 25
    frames = next(picture for alt, picture in shown.items() if "video8" in alt)
    assert [int(frames[y, x, 0]) // 50 for y in (5, -5) for x in (5, -5)] == [0, 1, 2, 3]
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
    (tmp_path / "b.json").write_text(json.dumps(old | new | {"intervals": {"top1": [0.4, None]}}))
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
    (tmp_path / "d.yaml").write_text(
        "task: classification\ndata: x\npublished: [{model: m, values: {top1: 56.7}, where: w}]"
    )
    fails("should be a fraction of 1", "--configs", str(tmp_path))
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
