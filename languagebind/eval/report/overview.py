"""The headline figures of all results: datasets by models, beside chance and what was published."""

import math
from collections.abc import Mapping, Sequence

from ..data.datasets import DatasetConfig
from ..results import Result, model_name
from ..score.statistics import interval
from .caveats import SIGN, comparable, shortfalls
from .configs import Config, headline, lower_is_better
from .markup import Markup, breakable, details, join, table, tag

SHOWN_PUBLISHED = 5
STAR = "★"


def overview(datasets: Mapping[str, list[Result]], described: Mapping[str, Config]) -> list[Markup]:
    """A table of every block of datasets that share models, so that few cells are empty; and what its signs mean."""
    metrics = {name: headline(described.get(name), group) for name, group in datasets.items()}
    notes = [f"{STAR}\u00a0the best of several models here, and the best published figure."]
    if any(interval(result, metrics[name]) for name, group in datasets.items() for result in group):
        notes.append("In brackets 95 % intervals: where they overlap, a star does not say that a model is better.")
    if any(shortfalls(result, described.get(name)) for name, group in datasets.items() for result in group):
        notes.append(f"{SIGN}\u00a0not of the whole dataset.")
    blocks = _blocks(datasets)
    tables = [_table(names, datasets, described, metrics, whole=len(blocks) == 1) for names in blocks]
    return [tag("p", " ".join(notes), class_="lead"), tag("div", *tables, class_="headline")]


def value_cell(result: Result | None, metric: str, star: bool = False) -> Markup:
    """A value, starred or not, with its interval below."""
    if result is None or metric not in result["metrics"]:
        return Markup("–")
    ends = interval(result, metric)
    text = shown(result["metrics"][metric])
    return join(
        [
            tag("span", f"{text}\u00a0{STAR}", class_="best") if star else text,
            tag("span", _range(ends), class_="range") if ends else None,
        ]
    )


def shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def chances(results: Sequence[Result], metric: str) -> str:
    """What guessing gives, several values where the results are of different data."""
    values = dict.fromkeys(result["protocol"].get("chance", {}).get(metric) for result in results)
    return " or ".join(shown(value) for value in values if value is not None) or "–"


def _range(ends: tuple[float, float]) -> str:
    return "[{}, {}]".format(*(f"{end:.4f}" if math.isfinite(end) else str(end).replace("inf", "∞") for end in ends))


def _blocks(datasets: Mapping[str, list[Result]]) -> list[list[str]]:
    """Datasets in groups of which no two have a model in common."""
    blocks: list[tuple[set[str], list[str]]] = []
    for name, group in datasets.items():
        models, names = {model_name(result) for result in group}, [name]
        apart = []
        for block in blocks:
            if block[0] & models:
                models, names = models | block[0], block[1] + names
            else:
                apart.append(block)
        blocks = [*apart, (models, names)]
    return [names for _, names in blocks]


def _table(
    names: Sequence[str],
    datasets: Mapping[str, list[Result]],
    described: Mapping[str, Config],
    metrics: Mapping[str, str],
    whole: bool,
) -> Markup:
    models = list(dict.fromkeys(model_name(result) for name in names for result in datasets[name]))
    rows = []
    for name in names:
        group, config, metric = datasets[name], described.get(name), metrics[name]
        found = {model_name(result): result for result in group}
        best = _best(group, metric)
        title = join([tag("a", breakable(name), href=f"#{name}"), tag("span", breakable(metric), class_="range")])
        cells = [_cell(found.get(model), config, metric, model in best) for model in models]
        chance = tag("div", chances(group, metric), class_="number range")
        rows.append([title, tag("div", _samples(group, config), class_="number"), chance, *cells])
        rows[-1].append(_published(group, config, metric))
    numbers = [tag("div", text, class_="number") for text in ("samples", "chance")]
    header = ["dataset", *numbers, *map(breakable, models)]
    caption = "Headline metric of each dataset" if whole else f"Headline metric of {', '.join(names)}"
    if not any(row[-1] for row in rows):
        return table(caption, header, [row[:-1] for row in rows])
    return table(caption, [*header, "published"], rows)


def _best(results: Sequence[Result], metric: str) -> set[str]:
    """The models with the best value of several; none where what was scored differs."""
    values = {model_name(result): result["metrics"].get(metric) for result in results}
    known = [value for value in values.values() if value is not None]
    if len(known) < 2 or len(comparable(results)) > 1:
        return set()
    best = min(known) if lower_is_better(metric) else max(known)
    return {model for model, value in values.items() if value == best}


def _samples(results: Sequence[Result], config: Config | None) -> str:
    """How many were scored, in order of the results where they differ, and of how many."""
    counts = dict.fromkeys(result["protocol"].get("samples") for result in results)
    text = " or ".join(f"{count:,}" for count in counts if count is not None) or "–"
    expected = config.expect.get("samples") if isinstance(config, DatasetConfig) else None
    return text if expected is None or list(counts) == [expected] else f"{text} of {expected:,}"


def _cell(result: Result | None, config: Config | None, metric: str, star: bool) -> Markup:
    missing = shortfalls(result, config) if result else []
    note = tag("span", f"{SIGN}\u00a0{', '.join(missing)}", class_="caveat") if missing else None
    return join([value_cell(result, metric, star), note])


def _published(results: Sequence[Result], config: Config | None, metric: str) -> Markup | None:
    """Best first; what is too many is folded."""
    entries = config.published if config else ()
    figures = [(entry["values"][metric], entry["model"]) for entry in entries if metric in entry["values"]]
    if not figures:
        return None
    figures.sort(key=lambda figure: figure[0], reverse=not lower_is_better(metric))
    lines = []
    for value, model in figures:
        best = value == figures[0][0]
        text = f"{value:.4f} {model}" + (f"\u00a0{STAR}" if best else "")
        lines.append(tag("div", text, class_="best" if best else None))
    first, rest = lines[:SHOWN_PUBLISHED], lines[SHOWN_PUBLISHED:]
    parts = [model_name(result) for result in results if shortfalls(result, config)]
    unlike = "these results" if len(parts) == len(results) else ", ".join(parts)
    note = tag("span", f"{SIGN}\u00a0of the whole dataset, unlike {unlike}", class_="caveat") if parts else None
    more = details(f"{len(rest)} more", *rest) if rest else None
    return tag("div", *first, more, note, class_="published")
