"""The page of what the steps made: numbers against NumPy's and collections', media that are missing or damaged."""

import base64
import html
import io
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import soundfile
from helpers import call
from PIL import Image
from report_world import EVIL, Page
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from languagebind.data.vidal import CAPTION_SOURCES, clean_title, read_annotation
from languagebind.generate import report
from languagebind.generate.__main__ import STEPS, main

COUNT = 9


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Scenes with frames by a real step; one is marked twice, and others lack media or have damaged ones."""
    world = tmp_path_factory.mktemp("world")
    flags = [f"--num-train={COUNT}", "--num-test=0", "--size=64", "--workers=1"]
    call("-m", "languagebind.data.world", f"--output={world}", *flags)
    root = world / "train"
    entries = dict(read_annotation(root / "vidal.json"))
    names = dict(zip(("no_depth", "damaged", "silent", "unreadable", "marked", "bare"), entries, strict=False))
    shutil.rmtree(root / f"world/{names['no_depth']}_depth_f8glpn_folder")
    cut = root / f"world/{names['damaged']}_depth_f8glpn_folder/4.png"
    cut.write_bytes(cut.read_bytes()[:90])
    (root / f"world_audio/{names['silent']}.wav").unlink()
    (root / f"world_resize256_skip15/{names['unreadable']}.mp4").write_bytes(b"not a video")
    entries[names["bare"]] = {"folder": "world"}
    (root / "vidal.json").write_text(json.dumps(entries))
    main(["frames", *annotation(root), "--workers=0", "--no-clips"])
    main(["sound", *annotation(root), "--workers=0"])
    entries[names["marked"]] |= {"left_out": ["near-duplicate: abc", "too short"], "raw": f"a dog {EVIL} 日本語 \udc80"}
    entries[names["silent"]] |= {"left_out": ["near-duplicate: def", "near-duplicate: ghi"]}
    (root / "vidal.json").write_text(json.dumps(entries))
    (root / "generate/depth").mkdir()
    record = {"model": "org/depth", "revision": "0123abc", "licence": "apache-2.0", "weights_sha256": {"m": "f" * 64}}
    (root / "generate/depth/record.json").write_text(json.dumps(record))
    (root / "names.json").write_text(json.dumps(names))
    return root


def annotation(root):
    return [f"--annotation={root / 'vidal.json'}", f"--root={root}"]


@pytest.fixture(scope="module")
def text(root):
    main(["report", *annotation(root)])
    return (root / "generate/report.html").read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture
def names(root):
    return json.loads((root / "names.json").read_text())


def card(text, key):
    """The text of an example."""
    (found,) = (part for part in text.split('<div class="several">')[1:] if f"<dd>{key}" in part)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", found)).split())


def test_steps_are_counted_by_reason_and_show_their_record(page, names):
    steps = page.table("Entries by step")
    assert list(steps) == ["step", *STEPS]
    assert steps["frames"][:5] == ["9", "0", "0", "8", "1"]
    assert "frames original" in steps["frames"][-1]
    assert steps["sound"][:5] == ["9", "0", "8", "1", "0"]
    assert steps["infrared"] == ["not run", ""]
    assert steps["depth"][0] == "not finished yet"
    assert steps["depth"][1] == "model org/depth revision 0123abc licence apache-2.0 weights_sha256 m ffffffffffff…"
    reason, count, example = page.table("Entries by reason")["frames"]
    assert (reason, count) == ("unreadable video", "1 11.1 %")
    assert example.startswith(f"{names['unreadable']}: ")
    assert page.table("Entries by reason")["sound"] == ["no sound track", "1 11.1 %", names["silent"]]


def test_marks_are_counted_once_for_an_entry(page, names):
    (rows,) = (rows for caption, rows in page.tables.items() if caption.startswith("Entries by reason"))
    first, second = f"{names['silent']}: near-duplicate: ghi", f"{names['marked']}: near-duplicate: abc"
    assert [row[1:] for row in rows if row[0] == "left out"] == [
        ["near-duplicate", "2 22.2 %", f"{first} {second}"], ["too short", "1 11.1 %", f"{names['marked']}: too short"]
    ]  # fmt: skip
    assert "9 entries, 2 of them left out by the filter" in page.text


def test_captions_are_those_that_training_reads(root, page):
    entries = list(json.loads((root / "vidal.json").read_text()).values())
    table = page.table("Captions by source")
    for source in CAPTION_SOURCES:
        given = [entry[source] for entry in entries if entry.get(source)]
        texts = [text for each in given for text in (each if isinstance(each, list) else [each]) if text.strip()]
        texts = [clean_title(text.replace("\udc80", "€")) if source == "raw" else text for text in texts]
        words = Counter(
            word for text in texts for word in re.findall(r"\b\w\w+\b", text.lower()) if word not in ENGLISH_STOP_WORDS
        )
        own, captions, different, length, frequent = table[source]
        assert own.split()[0] == str(len(given))
        assert captions == str(len(texts))
        assert different.split()[0] == str(len(set(texts)))
        assert length.endswith(f"words; median {np.median([len(text.split()) for text in texts]):.3g}")
        shown = dict(zip(frequent.split()[::2], map(int, frequent.split()[1::2]), strict=True))
        assert shown.items() <= words.items()
        assert sorted(shown.values()) == sorted(words.values())[-12:]


def test_examples_show_every_modality_or_why_not(page, text, names):
    images = {a["alt"].partition(":")[0]: a["src"] for tag, a in page.tags if tag == "img"}
    lacking = {("no_depth", "depth"), ("damaged", "depth"), ("silent", "audio"), ("unreadable", "video")}
    wanted = {f"Sample {key}, {name}" for key in names.values() for name in ("video", "depth", "infrared", "audio")}
    assert wanted - images.keys() == {f"Sample {names[key]}, {name}" for key, name in lacking}
    assert "The file does not exist:" in card(text, names["no_depth"])
    assert "The file cannot be read:" in card(text, names["damaged"])
    assert "_resize256_folder/0.jpg" not in card(text, names["marked"])
    assert card(text, names["bare"]).endswith(" ".join(f"{source} missing" for source in CAPTION_SOURCES))
    assert f"left out: near-duplicate: abc left out: too short raw a dog {EVIL} 日本語" in card(text, names["marked"])
    picture = Image.open(io.BytesIO(base64.b64decode(images[f"Sample {names['marked']}, video"].partition(",")[2])))
    assert picture.size == (64, 64)


def test_distributions_are_those_of_the_files(root, text):
    shown = re.findall(r"<figcaption>(\w+).*?, (\d+) files</figcaption>(.*?)</figure>", text, re.DOTALL)
    bars = {name: [int(bar) for bar in re.findall(r"<title>(\d+) from", part)] for name, _, part in shown}
    medians = {name: float(re.search(r"; median ([\d.]+)", part)[1]) for name, _, part in shown}
    assert [(name, int(count)) for name, count, _ in shown] == [("Depth", 7), ("Infrared", 9), ("Length", 8)]
    depth = [
        np.asarray(Image.open(path)) / 1000 for path in root.glob("world/*depth*/4.png") if path.stat().st_size > 90
    ]
    depth = np.concatenate([each.ravel() for each in depth])
    depth = depth[depth > 0]
    assert bars["Depth"] == np.histogram(depth.astype(np.float32), 64, (0, depth.max()))[0].tolist()
    assert medians["Depth"] == pytest.approx(np.median(depth), abs=0.0051)
    warm = np.stack([np.asarray(Image.open(path)) for path in root.glob("world/*thermal*/4.jpg")])
    assert bars["Infrared"] == np.bincount(warm.ravel() // 4, minlength=64).tolist()
    seconds = [soundfile.info(path).duration for path in root.glob("world_audio/*.wav")]
    assert medians["Length"] == pytest.approx(np.median(seconds), abs=0.0051)


def test_unknown_depth_is_a_share(tmp_path):
    values = [np.array([[0.5, 0], [2.0, 4.0]]), np.array([4.0])]
    unknown, median, end, bars = report.histogram(values)
    assert (unknown, median, end) == (pytest.approx(0.2), 3.0, 4.0)
    assert {k: bar for k, bar in enumerate(bars) if bar} == {8: 1, 32: 1, 63: 2}


def test_the_page_loads_nothing_and_text_is_escaped(text, page):
    assert EVIL not in text
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert not re.search(r"url\((?!#)|@import|https?:", text)


def test_a_large_annotation_is_sampled(root, text, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SAMPLE", 4)
    entries = {str(k): {"folder": "f", "mplug": f"caption {k}"} for k in range(100)}
    (tmp_path / "vidal.json").write_text(json.dumps(entries))
    pages = []
    for name in ("a", "b"):
        main(["report", *annotation(tmp_path), f"--output={tmp_path / name}.html", "--examples=2"])
        pages.append((tmp_path / f"{name}.html").read_text())
    assert pages[0] == pages[1]
    found = Page(pages[0])
    assert "A random sample of 4 entries" in found.text
    assert found.table("Captions by source")["mplug"][:2] == ["4 100.0 %", "4"]
    assert "2 entries, drawn at random" in found.text
    (tmp_path / "vidal.json").write_text("{}")
    main(["report", *annotation(tmp_path)])
    assert "0 entries" in Page((tmp_path / "generate/report.html").read_text()).text
