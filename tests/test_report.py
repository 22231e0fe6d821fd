"""The page and the .csv that are made of result files: figures, charts, thumbnails, mistakes, and a browser's view."""

import base64
import csv
import hashlib
import io
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, call
from PIL import Image
from report_world import EVIL, Page, chromium, classification, media, multilabel, pairs, retrieval

from languagebind.config import UserError
from languagebind.eval.report.__main__ import main
from languagebind.eval.report.page import TEMPLATES
from languagebind.eval.results import write_result


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


RANKS = ("median_rank", "d_prime")


def percent(value: float, metric: str = "") -> str:
    """As published tables give it; a rank as it is."""
    return f"{value:g}" if metric.endswith(RANKS) else f"{100 * value:.1f}"


def check_figures(page: Page, folder: Path) -> None:
    """Every metric of every result, with its interval, is in its cell."""
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
                cell = f"{percent(value, metric)} [{percent(low, metric)}, {percent(high, metric)}]"
                assert str(value) in page.values, "the exact value, to sort by"
            assert table[metric][column] == cell
            assert table[metric][-1] == percent(0.0833, metric)
        headline = {"nyu_v2": "mean_per_class", "audioset": "mAP", "msrvtt": "text_to_modality/R@1"}[made["dataset"]]
        overview = page.table(f"Headline metric of each dataset, {made['model']}")
        assert overview["model"] == [f"{made['dataset']} {headline} 240 samples chance 8.3"]
        assert overview[made["pretrained"]][0].replace(" ★", "") == table[headline][column]


@pytest.fixture(scope="module")
def page(world):
    return Page((world / "out" / "page.html").read_text())


def test_tables_hold_the_results(world, page):
    check_figures(page, world)
    overview = page.table("Headline metric of each dataset, video")
    assert list(overview) == ["model", "LanguageBind_FT", "epoch_1", "LanguageBind", EVIL]
    assert (overview["LanguageBind"], overview[EVIL]) == (["44.8 ★"], ["36.0"])
    assert (overview["LanguageBind_FT"][0][:5], overview["epoch_1"][0][:6]) == ("42.7 ", "46.7 ★")
    assert page.table("Published results")["msrvtt"] == [EVIL, "text_to_modality/R@5", "61.0", "table 3"]
    assert page.table("Every class of audioset, epoch_1")["never heard"] == ["13", "0", "–", "–"]
    assert page.table("The most frequent confusions on nyu_v2, LanguageBind_FT")[EVIL] == [
        "dining & living room",
        "16",
        "80.0",
    ]


def make(folder: Path, *results: dict, configs: str = "") -> Page:
    """The page of some results, and of datasets' configs `name: ...`, one a line."""
    for k, each in enumerate(results):
        write_result(each, folder / "results" / f"{k}.json")
    (folder / "configs").mkdir(exist_ok=True)
    for line in configs.splitlines():
        name, _, config = line.partition(": ")
        (folder / "configs" / f"{name}.yaml").write_text(config)
    main([str(folder / "results"), "--configs", str(folder / "configs")])
    return Page((folder / "results" / "report.html").read_text())


def plain(name: str, top1: float = 0.5, half: float | None = 0.01, dataset: str = "d", **protocol) -> dict:
    """A result of a model."""
    given = {"samples": 100, "chance": {"top1": 0.1}, "data_sha256": "abcd", "precision": "fp32"} | protocol
    made = {"dataset": dataset, "model": "video", "pretrained": name, "task": "classification", "language": "en",
            "metrics": {"top1": top1}, "protocol": given}  # fmt: skip
    return made if half is None else made | {"intervals": {"top1": [top1 - half, top1 + half]}}


def test_what_must_not_be_compared_is_said(page, tmp_path):
    # 0.61 and 0.57 with 0.05 to each side overlap; 0.31 and 0.35 with 0.004 do not
    both = "overlap, so no model among these is shown to be better: LanguageBind_FT, epoch_1."
    assert f"Intervals of mean_per_class {both}" in page.text
    assert f"Intervals of text_to_modality/R@1 {both}" in page.text
    assert "Intervals of mAP" not in page.text
    assert "significant" not in page.text
    values = {"a": 0.5, "b": 0.515, "c": 0.53, "d": 0.8}
    within = plain("e", 0.508, 0.001)
    chain = make(tmp_path, *(plain(name, value) for name, value in values.items()), within)
    assert "no model in one of these groups is shown to be better: a, b, e; b, c." in chain.text


def test_settings_that_differ_are_named_with_their_models(tmp_path):
    inputs = {"num_frames": 8, "image_size": 224, "hflip": 0.5}
    first = {"templates": ["{c}"], "prompts_sha256": "12", "inputs": inputs}
    page = make(
        tmp_path,
        plain("a", **first),
        plain(
            "b", **first | {"inputs": inputs | {"num_frames": 16, "hflip": 0.0}, "precision": "amp_bf16", "clips": 3}
        ),
        plain("c", **first | {"templates": ["a photo of {c}"], "prompts_sha256": "34"}),
        *(plain(name, dataset="short", **first) for name in "abd"),
        plain("c", dataset="short", **first | {"limit": 60, "samples": 60}),
        plain("a", dataset="shapes", input_shape=[3, 1, 8, 8]),
        plain("b", dataset="shapes", input_shape=[3, 2, 8, 8]),
        plain("a", dataset="same", **first),
        plain("b", dataset="same", **first | {"inputs": inputs | {"hflip": 0.0}}),
    )
    assert (
        "The models' settings differ, which may explain part of a difference: precision amp_bf16 (b), fp32 (a, c);"
        ' templates ["a photo of {c}"] (c), ["{c}"] (a, b); prompts 34 (c), 12 (a, b);'
        " num frames 16 (b), 8 (a, c); clips 3 (b), not set (a, c)." in page.text
    )
    assert (
        "The samples or the task differ, so these values cannot be compared: samples 60 (c), 100 (a, b, d);"
        " limit 60 (c), not set (a, b, d)." in page.text
    )
    assert "input shape [3, 1, 8, 8] (a), [3, 2, 8, 8] (b)" in page.text
    assert "hflip" not in page.text.partition("Protocol")[0]
    assert page.text.count("Intervals of top1 overlap") == 4
    assert "better: a, b, d." in page.text  # c was not scored on the same
    overview = page.table("Headline metric")
    place = [head.split()[0] for head in overview["model"]].index
    assert overview["model"][place("short")] == "short top1 100 or 60 samples chance 10.0"
    assert not any("★" in row[place("short")] for row in overview.values())
    assert overview["a"][place("same")].startswith("50.0 ★")


def test_a_result_of_a_part_is_never_without_a_caveat(tmp_path):
    figures = ", ".join(f"{{model: M{k}, values: {{top1: 0.{k}}}, where: w}}" for k in range(1, 8))
    page = make(
        tmp_path,
        plain("all", samples=1000, classes=3),
        plain("few", samples=3, captions=15, limit=3, skipped_samples=0, classes=3),
        plain("left", samples=990, skipped_samples=4, missing_samples=6, classes=3),
        plain("all", 0.7, dataset="unknown", limit=100),
        plain("pair", dataset="pairs", skipped_samples=5, unpaired_samples=3),
        plain("c", dataset="texts", samples=10, captions=40),
        configs="d: {task: classification, data: x, expect: {samples: 1000, captions: 5000, classes: 3},"
        f" published: [{figures}]}}\n"
        "texts: {task: classification, data: x, expect: {samples: 10, captions: 50}}",
    )
    overview = page.table("Headline metric")
    assert overview["model"] == [
        "d top1 1,000 or 3 or 990 of 1,000 samples chance 10.0",
        "pairs top1 100 samples chance 10.0",
        "texts top1 10 samples chance 10.0",
        "unknown top1 100 samples chance 10.0",
    ]
    assert [overview[model][0].partition("] ")[2] for model in ("all", "few", "left")] == [
        "",
        "⚠ 3 of 1,000 samples",
        "⚠ 990 of 1,000 samples, 6 missing from the prepared data, 4 could not be read",
    ]
    published = {model: row[0] for model, row in overview.items() if model.startswith("M")}
    assert published == {f"M{k}": f"{10 * k}.0" + " ★" * (k == 7) for k in range(7, 0, -1)}
    assert "few: 3 of 1,000 samples; left: 990 of 1,000 samples, 6 missing from the prepared data" in page.text
    assert "Published results are for the whole dataset." in page.text
    assert "Not the whole dataset: all: limited to 100 samples." in page.text
    assert "Not the whole dataset: pair: 3 without a partner, 2 could not be read." in page.text
    assert "⚠ 40 of 50 captions" in overview["c"][2]


def test_results_without_intervals_promise_none(tmp_path):
    page = make(tmp_path, plain("a", half=None), plain("b", 0.6, half=None, precision="amp_bf16"))
    assert "95 %" not in page.text
    assert not re.search(r"\bintervals?\b", page.text)
    assert page.table("All metrics on d,")["top1"] == ["50.0", "60.0", "10.0"]


def test_pairs_name_their_query_and_show_what_was_found(world, tmp_path):
    sources = {"depth": [str(world / "room.png")]}
    texts = pairs(sources, gallery={"text": 1.0}) | {"dataset": "texts"}
    page = make(tmp_path, pairs(sources), texts, plain("x", dataset="fused", query={"text": 1.0, "depth": 1.0}))
    overview = page.table("Headline metric of each dataset, video+depth")
    assert overview["model"][0].startswith("rooms query_to_gallery/R@1")
    assert overview["video+depth"][0] == "10.0 [8.0, 12.0]"
    images = [attributes["alt"].partition(":")[0] for tag, attributes in page.tags if tag == "img"]
    assert images == ["Sample room.png", "Sample b/c/other.png"]
    assert "query…/b/two (video + text)" in page.text
    assert "caption…" not in page.text
    assert "The examples are texts: they have no picture." in page.text


def test_pairs_have_a_table_trained_ones_first(tmp_path):
    gap = {"distance": 0.834, "matched": 0.61, "across": 0.1, "within_query": 0.5, "within_gallery": None}
    emergent = pairs({"depth": ["room.png"]}, pairs={"video and depth": "emergent", "text and depth": "trained"})
    trained = emergent | {"protocol": emergent["protocol"] | {"pairs": {"video and depth": "trained"}}}
    classes = plain("c", pairs={"depth and text": "trained"})
    page = make(
        tmp_path, emergent | {"pretrained": "a", "gap": gap}, trained | {"pretrained": "b"}, classes, plain("d")
    )
    (rows,) = (rows for caption, rows in page.tables.items() if caption.startswith("Recall and gap of each pair"))
    assert [row[:3] for row in rows[1:]] == [
        ["d", "c", "depth and text trained"], ["rooms", "b", "video and depth trained"],
        ["rooms", "a", "video and depth emergent text and depth trained"],
    ]  # fmt: skip
    assert rows[0][3:6] == ["top1", "R@1 query to gallery", "R@1 gallery to query"]
    assert [row[3:5] for row in rows[1:]] == [["50.0 [49.0, 51.0]", ""], *[["", "10.0 [8.0, 12.0]"]] * 2]
    assert [row[6:] for row in rows[1:]] == [["–"] * 5, ["–"] * 5, ["0.83", "0.61", "0.10", "0.50", "–"]]
    assert "Pairs of modalities" not in make(tmp_path / "other", plain("d")).text


def test_datasets_are_described_and_linked(tmp_path):
    page = make(
        tmp_path,
        plain("a"),
        configs="d: {task: classification, data: x, licence: CC BY 4.0, source: 'https://a.org/b?c=1 (and <i>)'}",
    )
    assert "Source: https://a.org/b?c=1 (and <i>)Licence: CC BY 4.0 All metrics" in page.text
    links = [attributes for tag, attributes in page.tags if tag == "a" and attributes["href"][0] != "#"]
    assert links == [{"href": "https://a.org/b?c=1", "rel": "noreferrer"}]


def test_text_from_data_is_escaped_and_nothing_is_loaded(world, page):
    text = (world / "out" / "page.html").read_text()
    assert EVIL in page.text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert [tag for tag, _ in page.tags].count("script") == len(scripts) == 1
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    allowed = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{allowed}'")
    assert "\0" not in text
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert not re.search(r"url\((?!#)|@import|https?:", text)
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
    # Two depth maps, one in a shard, a sound, a clip, one of frames with the clip that was found, for both models
    assert len(images) == 12
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
    assert page.text.count("The file does not exist: …") == 2
    assert page.folded.count("Best examples") == page.text.count("Best examples") == 4
    assert page.folded.count("Examples: 1 best and 1 worst") == 2
    assert page.folded.count("Classes and confusion") == 2  # of two models; open where there is one
    assert not any("open" in attributes for _, attributes in page.tags)
    gone = [attributes["title"] for tag, attributes in page.tags if attributes.get("title", "").endswith("gone.png")]
    assert len(gone) == 2
    assert gone[0] not in page.text
    assert "/".join(["…", *gone[0].split("/")[-2:]]) in page.text


def test_charts_show_every_class_and_line(page):
    bars = [attributes for tag, attributes in page.tags if attributes.get("class") == "bar"]
    assert len(bars) == 2 * 12 + 2 * 12
    assert bars[0]["style"] == f"--value: {100 * float(bars[0]['data-value'])}%; --chance: -100%"
    assert [row[3] for row in page.tables["Every class of audioset, epoch_1"]][:2] == ["AP", "64.0"]  # best first
    assert page.text.count("LanguageBind_FT, text to video") == 2  # the line's title, and the legend
    assert "LanguageBind_FT, text to video: 42.7 at k = 1" in page.text
    assert page.text.count("at k = 1") == 4
    matrix = page.table("Confusion matrix of nyu_v2, LanguageBind_FT")
    assert matrix["class 2"][2:4] == ["7", "13"]
    titles = [attributes.get("title", "") for tag, attributes in page.tags if tag == "td"]
    assert "class 2 predicted as class 3: 13 of 20" in titles


def test_curves_share_a_chart(tmp_path):
    def curved(name: str) -> dict:
        return plain(name) | {"task": "retrieval", "curves": {"text_to_modality": [[1, 0.2], [10, 0.9]]}}

    def lines(names: str) -> tuple[int, list[str]]:
        """How many charts there are, and the colour of each line."""
        page = make(tmp_path, *map(curved, names))
        styles = [attributes.get("style", "") for _, attributes in page.tags]
        colours = [re.search(r"fill: none; stroke: var\(--(c\d)\); stroke-width: 2", style) for style in styles]
        return page.text.count("Recall curves"), sorted(found[1] for found in colours if found)[::2]  # the legend's too

    charts, colours = lines("abcdefgh")
    assert (charts, colours) == (1, [f"c{k}" for k in range(8)])
    charts, colours = lines("abcdefghi")
    assert (charts, colours) == (2, sorted([f"c{k % 5}" for k in range(9)]))


# To linear RGB as seen without the receptors of long, of middle or of short waves (Machado et al., 2009)
BLINDNESS = (
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
)
TO_LMS = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]  # Oklab
TO_LAB = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_of_lines_are_told_apart(theme):
    light, _, rest = (TEMPLATES / "style.css").read_text().partition("@media")
    theme = light if theme == "light" else rest.partition("}")[0]
    colours = dict(re.findall(r"--(\w+): #(\w{6});", theme))
    names = ["paper", *(f"c{k}" for k in range(8))]
    rgb = np.array([[int(colours[name][k : k + 2], 16) / 255 for k in (0, 2, 4)] for name in names])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    light = linear @ [0.2126, 0.7152, 0.0722] + 0.05
    assert (np.maximum(light[1:], light[0]) / np.minimum(light[1:], light[0])).min() >= 3
    for seen in (np.eye(3), *BLINDNESS):
        lab = np.cbrt((linear @ np.transpose(seen)).clip(0, 1) @ np.transpose(TO_LMS)) @ np.transpose(TO_LAB)
        apart = np.linalg.norm(lab[1:, None] - lab[None, 1:], axis=-1)
        assert apart[np.triu_indices(8, 1)].min() > 0.075


def test_csv_has_a_row_a_metric(world):
    rows = list(csv.DictReader(io.StringIO((world / "out" / "page.csv").read_text())))
    assert len(rows) == 2 * (3 + 3 + 7)
    found = {(row["model"], row["dataset"], row["metric"]): row for row in rows}
    assert found["epoch_1", "nyu_v2", "top1"] == {
        "model": "epoch_1", "dataset": "nyu_v2", "metric": "top1", "value": str(0.6123 - 0.04),
        "low": str(0.6123 - 0.04 - 0.05), "high": str(0.6123 - 0.04 + 0.05), "chance": "0.0833", "samples": "240",
    }  # fmt: skip
    assert found["epoch_1", "audioset", "d_prime"]["value"] == ""


def test_files_of_others_are_not_written_over_and_names_are_no_formulas(tmp_path, monkeypatch):
    example = {"key": "a", "source": [], "text": "\0", "found": "b", "rank": 2, "score": 0.5}
    result = {"dataset": "d", "model": "depth", "pretrained": "=1+1", "task": "classification",
              "metrics": {"top1": 0.5}, "protocol": {}, "examples": {"best": [example]}}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(result))
    (tmp_path / "data.csv").write_text("mine")
    with pytest.raises(UserError, match=r"data.csv exists and is not a report: move it away, or choose another"):
        main([str(tmp_path), "--output", str(tmp_path / "data.html")])
    assert (tmp_path / "data.csv").read_text() == "mine"
    assert not (tmp_path / "data.html").exists()
    for _ in range(2):  # over its own it writes
        main([str(tmp_path)])
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(UserError, match="results"):  # the default folder, which is not there
        main([])
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert [row["model"] for row in rows] == ["'=1+1"]
    (tmp_path / "report.csv").unlink()
    (tmp_path / "report.csv").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report.csv: Is a directory"):
        main([str(tmp_path)])


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
    assert page.table("All metrics on esc50")["top1"] == ["50.0 [40.0, ∞]", "50.0", "2.0"]
    assert "so these values cannot be compared: limit 10 (new), not set (old)." in page.text
    assert "Calibration: expected calibration error 7.1" in page.text
    (tmp_path / "a.json").unlink()
    main([str(tmp_path), "--configs", str(tmp_path)])
    assert "open" in next(a for tag, a in Page((tmp_path / "report.html").read_text()).tags if tag == "details")
    assert page.table("Accuracy of new on")["30.0"] == ["25.0", "12"]
    assert len([1 for _, attributes in page.tags if attributes.get("class") == "bar"]) == 100
    assert "the 30 of 100 classes that are confused most" in page.text
    assert len(page.table("Every class of esc50, new")) == 101
    assert len([1 for _, attributes in page.tags if attributes.get("class", "").startswith("heat")]) == 29


def test_mistakes_say_what_to_do(tmp_path):
    def fails(words: str, *flags: str) -> None:
        with pytest.raises(UserError, match=words):
            main([str(tmp_path), *flags])

    fails("no results below .*`languagebind eval --output")
    good = {"dataset": "d", "model": "depth", "pretrained": "m", "task": "classification", "metrics": {"top1": 0.5},
            "protocol": {}}  # fmt: skip
    for content, words in (
        ("{", "a.json is not a valid result .Invalid JSON"),
        ("[]", "no results below"),
        ('{"dataset": "d"}', "no results below"),
        (json.dumps(good | {"intervals": {"top1": 3}}), "a.json .*intervals.top1: "),
        (json.dumps(good | {"confusion": [[0, 1]]}), "a.json .*confusion.0"),
        (json.dumps(good | {"confusion": [[0, 1, -2]]}), "a.json .*confusion.0"),
        (json.dumps(good | {"curves": {"a": [[1.5, 0.2]]}}), "a.json .*curves.a"),
        (json.dumps(good | {"metrics": {"top1": 10**400}}), "a.json .*metrics.top1"),
        (json.dumps(good | {"metrics": {"top1": float("nan")}}), "a.json .*metrics.top1"),
        (json.dumps(good | {"ties": True}), "a.json .*ties"),
        (json.dumps(good | {"task": "clustering"}), "a.json .*task"),
        (json.dumps(good | {"protocol": {"samples": "many"}}), "a.json .*protocol.samples"),
    ):
        (tmp_path / "a.json").write_text(content)
        fails(words)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(good))
    fails("a.json and .*b.json are both results of m on d: move one")
    (tmp_path / "b.json").unlink()
    fails("no results below .*none", str(tmp_path / "none"))
    fails("none is not a folder", "--configs", str(tmp_path / "none"))
    (tmp_path / "d.yaml").write_text(
        "task: classification\ndata: x\npublished: [{model: m, values: {top1: 56.7}, where: w}]"
    )
    fails("d.yaml: .*should be fractions of 1", "--configs", str(tmp_path))
    assert call("-m", "languagebind.eval.report", str(tmp_path / "none"), status=2).startswith("error: ")


def test_folders_are_searched_and_other_files_passed_over(tmp_path, caplog):
    for name, place in (("a", "one/results"), ("b", "two/deep/er"), ("c", "two/.trash")):
        write_result(plain(name), tmp_path / place / f"{name}.json")
    (tmp_path / "two" / "index.json").write_text('{"shards": 3}')
    with caplog.at_level("INFO"):
        main([str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "two" / "deep")])
    page = Page((tmp_path / "one" / "report.html").read_text())
    assert list(page.table("Headline metric")) == ["model", "a", "b"]
    assert "index.json" in caplog.text


def test_a_file_that_lacks_keys_of_a_result_is_named(tmp_path, caplog):
    for key in ("metrics", "protocol"):
        rest = {name: value for name, value in plain(key).items() if name != key}
        (tmp_path / f"no_{key}.json").write_text(json.dumps(rest))
    (tmp_path / "index.json").write_text('{"shards": 3}')
    write_result(plain("a"), tmp_path / "a.json")
    main([str(tmp_path)])
    warnings = "".join(record.message for record in caplog.records if record.levelname == "WARNING")
    assert re.findall(r"\w+\.json", warnings) == ["no_metrics.json", "no_protocol.json"]


def test_two_published_figures_of_a_model_and_large_ranks(tmp_path):
    ranked = {"metrics": {"text_to_modality/mean_rank": 123456.4}, "task": "retrieval"}
    entry = "{{model: m, values: {{text_to_modality/mean_rank: {}}}, where: {}}}"
    published = ", ".join(entry.format(*each) for each in ((100000, "table 1"), (1234567, "table 2")))
    configs = f"d: {{task: retrieval, data: x, metric: text_to_modality/mean_rank, published: [{published}]}}"
    table = make(tmp_path, plain("a", half=None) | ranked, configs=configs).table("Headline metric of each dataset")
    assert {name: cells[0] for name, cells in table.items() if name != "model"} == {
        "a": "123456",
        "m (table 1)": "100000 ★",
        "m (table 2)": "1234567",
    }


def test_templates_go_into_the_wheel():
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["languagebind.eval.report"]
    packed = {path for pattern in patterns for path in (ROOT / "languagebind/eval/report").glob(pattern)}
    assert packed == set(TEMPLATES.iterdir())


def test_columns_sort(tmp_path):
    """Numbers best first, ranks from the lowest, empty cells last; a second click turns the order round."""
    values = {"a": (0.2, 0.055), "b": (0.9, None), "c": (0.55, 0.5)}
    results = [plain(name, one, dataset="d") for name, (one, _) in values.items()]
    results += [plain(name, two, dataset="e") for name, (_, two) in values.items() if two]
    ranked = {"metrics": {"text_to_modality/median_rank": 3.0}, "task": "retrieval", "intervals": {}}
    results += [plain("a", dataset="f") | ranked, plain("b", dataset="f") | ranked]
    results[-1]["metrics"] = {"text_to_modality/median_rank": 12.0}
    make(tmp_path, *results, configs="f: {task: retrieval, data: x, metric: text_to_modality/median_rank}")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe src='{(tmp_path / 'results' / 'report.html').as_uri()}'></iframe><p></p><script>"
        """onload = () => {
          const table = document.querySelector("iframe").contentDocument.querySelector("table"), seen = [];
          for (const column of [1, 1, 2, 3, 0]) {
            table.tHead.rows[0].cells[column].querySelector("button").click();
            const head = table.querySelector("[aria-sort]");
            seen.push([...table.tBodies[0].rows].map(row => row.cells[0].textContent).join("") + head.ariaSort);
          }
          document.querySelector("p").textContent = seen.join(" ");
        }</script>"""
    )
    dom, _ = chromium("--dump-dom", "--allow-file-access-from-files", page=frame, profile=tmp_path / "profile")
    found = re.search(r"<p>(.+?)</p>", dom)
    assert found, dom
    assert found[1].split() == ["bcadescending", "acbascending", "cabdescending", "abcascending", "abcascending"]


def test_in_a_browser(world, tmp_path):
    """The tables are there, and the console is silent: no script was blocked, nothing was looked for."""
    dom, log = chromium("--dump-dom", page=world / "out" / "page.html", profile=tmp_path / "profile")
    check_figures(Page(dom), world)
    assert "CONSOLE" not in log, log
    broken = tmp_path / "broken.html"
    broken.write_text("<script>console.error('seen')</script>")
    assert "CONSOLE" in chromium("--dump-dom", page=broken, profile=tmp_path / "profile")[1]  # so it would be seen


def test_nothing_overflows_a_telephone(world, tmp_path):
    """Wide tables and charts scroll in themselves; the page does not."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe width=400 height=900 src='{(world / 'out' / 'page.html').as_uri()}'></iframe><p></p><script>"
        "onload = () => { document.querySelector('p').textContent = 'wide '"
        " + document.querySelector('iframe').contentDocument.documentElement.scrollWidth + ' end' }</script>"
    )
    dom, _ = chromium("--dump-dom", "--allow-file-access-from-files", page=frame, profile=tmp_path / "profile")
    found = re.search(r"<p>wide (\d+) end</p>", dom)
    assert found, dom
    assert int(found[1]) <= 400


def test_the_highest_possible_recall_is_on_the_page(tmp_path):
    bound = {f"{way}/R@1": value for way, value in (("text_to_modality", 0.998), ("modality_to_text", 0.5))}
    shared = {"captions": 500, "captions_of_several_samples": 2, "ceiling": bound}
    made = plain("a", **shared) | {"task": "retrieval", "metrics": {"text_to_modality/R@1": 0.2}}
    page = make(tmp_path, made, plain("b", dataset="e"))
    assert page.text.count("2 of 500 captions belong to several samples: R@1 cannot exceed 0.99 / 0.50") == 1
    assert page.text.count("belong to several samples") == 1
