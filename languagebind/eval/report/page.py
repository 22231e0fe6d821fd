"""The page: an overview of all results, then a section for each dataset."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ..results import Result, model_name
from .caveats import cautions
from .configs import Config
from .markup import Markup, details, table, tag
from .overview import overview
from .sections import dataset_section
from .style import STYLE

# Nothing is loaded and nothing runs, whatever a class name or a caption holds
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def make_page(results: Sequence[Result], described: Mapping[str, Config], about: str) -> str:
    """The whole HTML file.

    Args:
        results: as `read_results` gives them.
        described: the configs of the datasets that have one, by name.
        about: what to say of the published figures.
    """
    datasets = {name: list(group) for name, group in groupby(results, key=lambda result: result["dataset"])}
    models = list(dict.fromkeys(model_name(result) for result in results))
    counts = f"{_count(len(models), 'model')} on {_count(len(datasets), 'dataset')}"
    body = [
        tag("h1", "Zero-shot evaluation"),
        tag("p", f"{counts}. Values are fractions, not percent. {about}", class_="lead"),
        *overview(datasets, described),
        *_before_comparing(datasets, described),
        _origins(described),
        *(dataset_section(name, group, described.get(name)) for name, group in datasets.items()),
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Evaluation of {', '.join(models)}"),
        tag("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *body)), lang="en") + "\n"


def _before_comparing(datasets: Mapping[str, list[Result]], described: Mapping[str, Config]) -> list[Markup]:
    """What must not be read out of the table."""
    lines = {name: cautions(group, described.get(name)) for name, group in datasets.items()}
    rows = [cell for name, texts in lines.items() if texts
            for cell in (tag("dt", name), tag("dd", tag("ul", *(tag("li", text) for text in texts))))]  # fmt: skip
    if not rows:
        return []
    about = (
        "An interval is where the value could lie on another test set of the same size and kind. Where the intervals"
        " of two models overlap, these results do not tell which is better; that does not mean that they are equal."
    )
    some = any("intervals" in result for group in datasets.values() for result in group)
    return [
        tag("h3", "Before comparing"),
        tag("p", about, class_="lead") if some else None,
        tag("dl", *rows, class_="cautions"),
    ]


def _origins(described: Mapping[str, Config]) -> Markup | None:
    rows: list[list[Any]] = [
        [name, entry["model"], metric, f"{value:.4f}", entry["where"]]
        for name, config in described.items()
        for entry in config.published
        for metric, value in entry["values"].items()
    ]
    if not rows:
        return None
    header = ["dataset", "model", "metric", "value", "where"]
    return details("Where the published figures are from", table("Published figures", header, rows))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
