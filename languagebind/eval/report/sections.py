"""The section of a dataset: metrics, curves and the protocol of all models, then each model's classes and examples."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..data.datasets import DatasetConfig
from ..results import Result, leaves, model_name, shown_metrics
from . import charts
from .cards import example_cards
from .configs import Config, headline
from .markup import Markup, breakable, details, join, linked, table, tag
from .overview import chances, value_cell

log = logging.getLogger(__name__)

# The second of each two is dashed
DIRECTIONS = {
    "text_to_modality": "text to {}",
    "modality_to_text": "{} to text",
    "query_to_gallery": "query to gallery",
    "gallery_to_query": "gallery to query",
}
SHOWN_CONFUSIONS = 50


def dataset_section(name: str, results: Sequence[Result], config: Config | None) -> Markup:
    log.info("drawing %s", name)  # reading the examples may take a while
    first = results[0]
    protocol = first["protocol"]
    counts = dict.fromkeys(result["protocol"].get("samples") for result in results)
    known = [f"{count:,}" for count in counts if count is not None]
    facts = [first["task"], f"{' or '.join(known)} samples" if known else None]
    facts += [f"split {protocol['split']}" if protocol.get("split") else None]
    facts += [f"headline metric {headline(config, results)}"]
    return tag(
        "section",
        tag("h2", name, id=name),
        tag("p", ", ".join(fact for fact in facts if fact), class_="lead"),
        _origin(config) if config else None,
        _metrics(name, results),
        *_curves(results),
        *(_model(name, result, opened=len(results) == 1) for result in results),
        _protocols(name, results),
        aria_labelledby=name,
    )


def _origin(config: Config) -> Markup | None:
    """Where the data is to be had, with links, and its licence."""
    parts = []
    if config.source:
        parts.append(join(["Source: ", linked(config.source)]))
    if isinstance(config, DatasetConfig) and config.licence:
        parts.append(f"Licence: {config.licence}")
    lines = [tag("span", part) for part in parts]
    return tag("p", *lines, class_="origin") if lines else None


def _metrics(name: str, results: Sequence[Result]) -> Markup:
    metrics = list(dict.fromkeys(metric for result in results for metric in shown_metrics(result)))
    rows = [
        [breakable(metric), *(value_cell(result, metric) for result in results), chances(results, metric)]
        for metric in metrics
    ]
    if any("ties" in result for result in results):
        rows.append(["ties", *(result.get("ties", "–") for result in results), "–"])
    header = ["metric", *(breakable(model_name(result)) for result in results), "chance"]
    ranges = ", with 95 % intervals" if any("intervals" in result for result in results) else ""
    return table(f"All metrics on {name}{ranges}, and what guessing gives", header, rows)


def _curves(results: Sequence[Result]) -> list[Markup]:
    """As few charts as there are colours for, with about as many models in each."""
    drawn = []
    curved = [result for result in results if result.get("curves")]
    size = math.ceil(len(curved) / max(1, math.ceil(len(curved) / charts.COLOURS)))
    for start in range(0, len(curved), size or 1):
        lines = [
            charts.Line(f"{model_name(result)}, {text.format(result['model'])}", colour, bool(place % 2), points)
            for colour, result in enumerate(curved[start : start + size])
            for place, (direction, text) in enumerate(DIRECTIONS.items())
            if (points := result["curves"].get(direction))
        ]
        drawn += [charts.curves(lines)] if lines else []
    return drawn


def _model(name: str, result: Result, opened: bool) -> Markup | None:
    """What is known of one model alone: its classes and confusions, folded unless `opened`, and its examples."""
    charted = [*_classes(result), *_confusion(result)]
    titles = ["Classes"] * ("classes" in result) + ["confusion"] * ("confusion" in result)
    classes = details(" and ".join(titles).capitalize(), *charted, open_=opened) if charted else None
    parts = [classes, _calibration(result), example_cards(result)]
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


def _protocols(name: str, results: Sequence[Result]) -> Markup:
    """Every setting: those in which the models differ with a column a model, then those they share."""
    flat = [dict(leaves(result["protocol"] | {"statistics": result.get("statistics", {})})) for result in results]
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
