"""The page: an overview of all results, then a section for each dataset."""

from collections.abc import Mapping, Sequence
from itertools import combinations, groupby
from typing import Any

from ..datasets import DatasetConfig
from ..pairing import PairsConfig
from ..statistics import overlaps
from .markup import Markup, breakable, details, join, table, tag
from .results import Result, differing, headline, lower_is_better, model_name
from .sections import dataset_section, figure_cell
from .style import STYLE

Described = Mapping[str, DatasetConfig | PairsConfig]

# Nothing is loaded and nothing runs, whatever a class name or a caption holds
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def make_page(results: Sequence[Result], described: Described, about: str) -> str:
    """The whole HTML file.

    Args:
        results: as `read_results` gives them.
        described: the configs of the datasets that have one, by name.
        about: what to say of the published figures.
    """
    datasets = {name: list(group) for name, group in groupby(results, key=lambda result: result["dataset"])}
    models = list(dict.fromkeys(model_name(result) for result in results))
    body = [
        tag("h1", "Zero-shot evaluation"),
        tag("p", f"{_count(len(models), 'model')} on {_count(len(datasets), 'dataset')}. Values are fractions, not "
            f"percent; in brackets their 95 % bootstrap intervals. {about}", class_="lead"),
        _overview(datasets, models, described),
        *_comparisons(datasets, described),
        _origins(described),
        *(dataset_section(name, group, described.get(name)) for name, group in datasets.items()),
    ]  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Evaluation of {', '.join(models)}"),
        tag("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *body)), lang="en") + "\n"


def _overview(datasets: Mapping[str, list[Result]], models: Sequence[str], described: Described) -> Markup:
    """Datasets by models: the headline metric of each, and what was published, best first."""
    rows = []
    for name, group in datasets.items():
        metric = headline(described.get(name), group[0]["task"])
        found = {model_name(result): result for result in group}
        title = join([tag("a", name, href=f"#{name}"), tag("span", metric, class_="range")])
        rows.append([title, *(figure_cell(found.get(model), metric) for model in models)])
        rows[-1].append(_published_cell(described[name].published if name in described else (), metric))
    caption = "Headline metric of each dataset, with its 95 % interval"
    if not any(row[-1] for row in rows):
        return table(caption, ["dataset", *map(breakable, models)], [row[:-1] for row in rows])
    return table(caption + "; ★ is the best published figure", ["dataset", *map(breakable, models), "published"], rows)


def _published_cell(published: Sequence[Mapping[str, Any]], metric: str) -> Markup | None:
    figures = [(entry["values"][metric], entry["model"]) for entry in published if metric in entry["values"]]
    figures.sort(key=lambda figure: figure[0], reverse=not lower_is_better(metric))
    best = figures[0][0] if figures else None
    lines = [
        tag("div", f"{'★ ' if value == best else ''}{value:.4f} {model}", class_="best" if value == best else None)
        for value, model in figures
    ]
    return tag("div", *lines, class_="published") if lines else None


def _comparisons(datasets: Mapping[str, list[Result]], described: Described) -> list[Markup]:
    """What must not be read out of the table: differences within the intervals, and results of other samples."""
    lines = []
    for name, group in datasets.items():
        if keys := differing(group):
            lines.append(f"{name}: the models differ in {', '.join(keys)}, so their values cannot be compared")
            continue
        metric = headline(described.get(name), group[0]["task"])
        partners: dict[str, list[str]] = {}
        for first, second in combinations(group, 2):
            if metric in overlaps(first, second):
                partners.setdefault(model_name(first), []).append(model_name(second))
        if partners:
            texts = "; ".join(f"{first} with {', '.join(others)}" for first, others in partners.items())
            lines.append(f"{name}: intervals overlap, so neither is shown to be better: {texts}")
    if not lines:
        return []
    about = "Overlap is a cautious test: one of each sample under both models can be sharper."
    return [
        tag("h3", "Before comparing"),
        tag("p", about, class_="lead"),
        tag("ul", *(tag("li", line) for line in lines)),
    ]


def _origins(described: Described) -> Markup | None:
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
