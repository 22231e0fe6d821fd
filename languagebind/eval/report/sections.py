"""The section of a dataset: metrics, curves and the protocol of all models, then each model's classes and examples."""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..datasets import DatasetConfig
from ..statistics import interval
from . import charts
from .markup import Markup, breakable, details, join, table, tag
from .results import Result, headline, model_name, shown_metrics
from .thumbnails import Thumbnails

log = logging.getLogger(__name__)

# The second of each two is dashed
DIRECTIONS = {
    "text_to_modality": "text to {}",
    "modality_to_text": "{} to text",
    "query_to_gallery": "query to gallery",
    "gallery_to_query": "gallery to query",
}
MODELS_A_CHART = 4
SHOWN_CONFUSIONS = 50


def dataset_section(name: str, results: Sequence[Result], config: DatasetConfig | None) -> Markup:
    log.info("drawing %s", name)  # reading the examples may take a while
    first = results[0]
    protocol = first["protocol"]
    facts = [first["task"], f"{protocol['samples']} samples" if "samples" in protocol else None]
    facts += [f"split {protocol['split']}" if protocol.get("split") else None]
    facts += [f"headline metric {headline(config, first['task'])}"]
    return tag(
        "section",
        tag("h2", name, id=name),
        tag("p", ", ".join(fact for fact in facts if fact), class_="lead"),
        _metrics(name, results),
        *_curves(results),
        *(_model(name, result) for result in results),
        _protocols(name, results),
        aria_labelledby=name,
    )


def figure_cell(result: Result | None, metric: str) -> Markup:
    """A value with its interval below."""
    if result is None or metric not in result["metrics"]:
        return Markup("–")
    ends = interval(result, metric)
    return join([_number(result["metrics"][metric]), tag("span", _range(ends), class_="range") if ends else None])


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _range(ends: tuple[float, float]) -> str:
    return "[{}, {}]".format(*(f"{end:.4f}" if math.isfinite(end) else str(end).replace("inf", "∞") for end in ends))


def _metrics(name: str, results: Sequence[Result]) -> Markup:
    metrics = list(dict.fromkeys(metric for result in results for metric in shown_metrics(result)))
    rows = []
    for metric in metrics:
        chance = dict.fromkeys(result["protocol"].get("chance", {}).get(metric) for result in results)
        texts = [_number(value) for value in chance if value is not None]
        rows.append(
            [breakable(metric), *(figure_cell(result, metric) for result in results), " or ".join(texts) or "–"]
        )
    if any("ties" in result for result in results):
        rows.append(["ties", *(result.get("ties", "–") for result in results), "–"])
    header = ["metric", *(breakable(model_name(result)) for result in results), "chance"]
    return table(f"All metrics on {name}, with 95 % intervals, and what guessing gives", header, rows)


def _curves(results: Sequence[Result]) -> list[Markup]:
    drawn = []
    for start in range(0, len(results), MODELS_A_CHART):
        lines = [
            charts.Line(f"{model_name(result)}, {text.format(result['model'])}", colour, bool(place % 2), points)
            for colour, result in enumerate(results[start : start + MODELS_A_CHART])
            for place, (direction, text) in enumerate(DIRECTIONS.items())
            if (points := result.get("curves", {}).get(direction))
        ]
        drawn += [charts.curves(lines)] if lines else []
    return drawn


def _model(name: str, result: Result) -> Markup | None:
    """What is known of one model alone: its classes, what it confuses, its best and worst samples."""
    parts = [*_classes(result), *_confusion(result), _calibration(result), *_examples(result)]
    return tag("section", tag("h3", f"{model_name(result)} on {name}"), *parts) if any(parts) else None


def _classes(result: Result) -> list[Markup]:
    classes = result.get("classes")
    if not classes:
        return []
    metric = "AP" if result["task"] == "multilabel" else "top1"
    values = [(each["name"], each[metric], each["samples"]) for each in classes if each.get(metric) is not None]
    chance = result["protocol"].get("chance", {}).get(metric)
    columns = list(dict.fromkeys(key for each in classes for key in each if key not in ("name", "label", "samples")))
    rows = [
        [each["name"], each["label"], each["samples"], *(_known(each.get(key)) for key in columns)] for each in classes
    ]
    full = table(
        f"Every class of {result['dataset']}, {model_name(result)}", ["class", "label", "samples", *columns], rows
    )
    absent = len(classes) - len(values)
    return [
        tag("h4", "Classes"),
        charts.bars(values, metric, chance) if values else None,
        tag("p", f"Not drawn: {absent} without a sample", class_="lead") if absent else None,
        details("All classes", full),
    ]


def _known(value: Any) -> str:
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _confusion(result: Result) -> list[Markup]:
    counts = {(true, found): count for true, found, count in result.get("confusion", [])}
    if not counts:
        return []
    classes = result.get("classes") or []
    size = max(len(classes), 1 + max(map(max, counts)))
    names = [classes[k]["name"] if k < len(classes) else f"class {k}" for k in range(size)]
    totals = Counter()
    for (true, _), count in counts.items():
        totals[true] += count
    wrong = sorted(
        ((n, pair) for pair, n in counts.items() if pair[0] != pair[1]), key=lambda item: (-item[0], item[1])
    )
    rows = [
        [names[true], names[found], count, f"{count / totals[true]:.4f}"]
        for count, (true, found) in wrong[:SHOWN_CONFUSIONS]
    ]
    listing = table(
        f"The most frequent confusions on {result['dataset']}, {model_name(result)}",
        ["true", "found", "samples", "share of the true class"],
        rows,
    )
    return [
        tag("h4", "Confusion"),
        charts.heat_map(names, counts),
        details("The most frequent confusions", listing) if rows else None,
    ]


def _calibration(result: Result) -> Markup | None:
    if "calibration" not in result:
        return None
    rows = [
        [f"{confidence:.4f}", f"{right:.4f}", samples] for confidence, right, samples in result["calibration"]["bins"]
    ]
    caption = f"How often {model_name(result)} is right on {result['dataset']} for how sure it is"
    return details(
        f"Calibration: expected error {result['calibration']['ece']:.4f}",
        table(caption, ["mean confidence", "share that is right", "samples"], rows),
    )


def _examples(result: Result) -> list[Markup]:
    thumbnails = Thumbnails(result)
    parts = []
    for kind, title in (("best", "Best examples"), ("worst", "Worst examples")):
        examples = result.get("examples", {}).get(kind)
        if examples:
            cards = [_card(example, thumbnails, result) for example in examples]
            parts += [tag("h4", title), tag("ul", *cards, class_="cards")]
    return parts


def _card(example: Mapping[str, Any], thumbnails: Thumbnails, result: Result) -> Markup:
    asked = "caption" if result["task"] == "retrieval" else "true class"
    facts = {asked: example["text"], "found": example["found"], "rank": example["rank"],
             "score": f"{example['score']:.4f}", "sample": example["key"]}  # fmt: skip
    pairs = [cell for key, value in facts.items() for cell in (tag("dt", key), tag("dd", value, dir="auto"))]
    return tag("li", thumbnails.draw(dict(example)), tag("dl", *pairs))


def _protocols(name: str, results: Sequence[Result]) -> Markup:
    """Every setting: those in which the models differ with a column a model, then those they share."""
    flat = [dict(_leaves(result["protocol"] | {"statistics": result.get("statistics", {})})) for result in results]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [[key, *(settings.get(key, "–") for settings in flat)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if len(set(row[1:])) == 1]
    header = ["setting", *(breakable(model_name(result)) for result in results)]
    return details(
        "Protocol",
        table(f"Settings on {name} in which the models differ", header, differing) if differing else None,
        table(f"How {name} was evaluated", ["setting", "value"], same),
    )


def _leaves(settings: Mapping[str, Any], prefix: str = ""):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
