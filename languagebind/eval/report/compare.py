"""The results of several models side by side, as plain text."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from ..statistics import overlaps
from . import aligned, number
from .results import model_name, shown_metrics

Result = dict[str, Any]


def comparison(results: Sequence[Result]) -> str:
    """A table with a column for each model, its value and 95 % interval; then a line for every two models whose
    intervals overlap on a dataset.

    Raises:
        UserError: two results of a dataset are of different data.
    """
    models = list(dict.fromkeys(map(model_name, results)))
    datasets: dict[str, dict[str, Result]] = {}
    for result in results:
        datasets.setdefault(result["dataset"], {})[model_name(result)] = result
    lines, warnings = [("dataset", "metric", *models, "chance")], []
    for dataset, found in datasets.items():
        for metric in dict.fromkeys(metric for result in found.values() for metric in shown_metrics(result)):
            chance = next(iter(found.values()))["protocol"]["chance"].get(metric)
            lines.append((dataset, metric, *(_cell(found.get(model), metric) for model in models), number(chance)))
        for one, other in combinations(found, 2):
            if metrics := overlaps(found[one], found[other]):
                warnings.append(
                    f"warning: {dataset}: the intervals of {one} and {other} overlap in {', '.join(metrics)}:"
                    " there neither is shown to be better"
                )
    return "\n".join([*aligned(lines, left=2), *warnings])


def _cell(result: Result | None, metric: str) -> str:
    if result is None or metric not in result["metrics"]:
        return ""
    interval = result.get("intervals", {}).get(metric)
    ends = f" ({' to '.join(map(number, interval))})" if interval else ""
    return number(result["metrics"][metric]) + ends
