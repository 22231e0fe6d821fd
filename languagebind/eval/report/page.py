"""The page: an overview of all results, then a section for each dataset."""

from collections.abc import Mapping, Sequence
from itertools import combinations, groupby
from typing import Any

from .markup import Markup, details, join, table, tag
from .results import DatasetNotes, Result, headline, interval, lower_is_better, model_name
from .sections import dataset_section, figure_cell
from .style import STYLE

# Nothing is loaded and nothing runs, whatever a class name or a caption holds
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
COMPARED = ("data_sha256", "split", "limit", "caption_source")


def make_page(results: Sequence[Result], notes: Mapping[str, DatasetNotes], configs: str) -> str:
    """The whole HTML file.

    Args:
        results: as `read_results` gives them.
        notes: of the datasets that have any.
        configs: where the notes were read, for the reader.
    """
    datasets = {name: list(group) for name, group in groupby(results, key=lambda result: result["dataset"])}
    models = list(dict.fromkeys(model_name(result) for result in results))
    known = {name: notes.get(name, DatasetNotes()) for name in datasets}
    links = [tag("a", name, href=f"#{name}") for name in datasets]
    body = [
        tag("h1", "Zero-shot evaluation"),
        tag("p", f"{_count(len(models), 'model')} on {_count(len(datasets), 'dataset')}. Values are fractions, not "
            f"percent; in brackets their 95 % bootstrap intervals. {configs}", class_="lead"),
        tag("nav", *(join([link, " "]) for link in links), aria_label="Datasets"),
        _overview(datasets, models, known),
        *_comparisons(datasets, known),
        _origins(known),
        *(dataset_section(name, group, known[name]) for name, group in datasets.items()),
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


def _overview(datasets: Mapping[str, list[Result]], models: Sequence[str], notes: Mapping[str, DatasetNotes]) -> Markup:
    """Models by datasets: the headline metric of each, those measured here above the published ones."""
    metrics = {name: headline(notes[name], group[0]["task"]) for name, group in datasets.items()}
    header = ["model", *(join([name, tag("span", metrics[name], class_="range")]) for name in datasets)]
    found = {(name, model_name(result)): result for name, group in datasets.items() for result in group}
    here = [[model, *(figure_cell(found.get((name, model)), metrics[name]) for name in datasets)] for model in models]
    papers = list(dict.fromkeys(entry.model for note in notes.values() for entry in note.published))
    there = [[model, *(_published_cell(notes[name], model, metrics[name]) for name in datasets)] for model in papers]
    there = [row for row in there if any(row[1:])]
    groups = [("Evaluated here" if there else "", here), *([("Published", there)] if there else [])]
    caption = "Headline metric of each dataset with its 95 % interval"
    return table(caption + ("; ★ is the best published figure" if there else ""), header, groups)


def _published_cell(note: DatasetNotes, model: str, metric: str) -> Markup | None:
    figures = [(entry.model, entry.values[metric]) for entry in note.published if metric in entry.values]
    best = (min if lower_is_better(metric) else max)((value for _, value in figures), default=None)
    cells = [
        tag("span", f"{value:.4f}", class_="best" if value == best else None)
        for name, value in figures
        if name == model
    ]
    return Markup(" ".join(cells)) if cells else None


def _comparisons(datasets: Mapping[str, list[Result]], notes: Mapping[str, DatasetNotes]) -> list[Markup]:
    """What must not be read out of the table: differences within the intervals, and results of other samples."""
    lines = []
    for name, group in datasets.items():
        metric = headline(notes[name], group[0]["task"])
        pairs = [pair for pair in combinations(group, 2) if _overlap(*pair, metric)]
        if pairs:
            texts = ", ".join(f"{model_name(a)} and {model_name(b)}" for a, b in pairs)
            lines.append(f"{name}: the intervals of {texts} overlap, so the difference is not significant.")
        for key in COMPARED:
            if len({str(result["protocol"].get(key)) for result in group}) > 1:
                lines.append(f"{name}: the models differ in {key}, so their values cannot be compared.")
                break
    if not lines:
        return []
    return [tag("h3", "Before comparing"), tag("ul", *(tag("li", line) for line in lines))]


def _overlap(first: Result, second: Result, metric: str) -> bool:
    ranges = (interval(first, metric), interval(second, metric))
    if None in ranges:
        return False
    (low, high), (other_low, other_high) = ranges
    return low <= other_high and other_low <= high


def _origins(notes: Mapping[str, DatasetNotes]) -> Markup | None:
    rows: list[list[Any]] = [
        [name, entry.model, metric, f"{value:.4f}", entry.where]
        for name, note in notes.items()
        for entry in note.published
        for metric, value in entry.values.items()
    ]
    if not rows:
        return None
    header = ["dataset", "model", "metric", "value", "where"]
    return details("Where the published figures are from", table("Published figures", header, [("", rows)]))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
