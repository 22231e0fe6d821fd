"""The results of several models side by side, as plain text."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from ..statistics import interval, overlaps
from . import aligned, number
from .results import differing, model_name, shown_metrics

Result = dict[str, Any]


def comparison(results: Sequence[Result]) -> str:
    """A table with a column for each model, its value and 95 % interval; then warnings: of datasets where the values
    cannot be compared, and of every two models whose intervals overlap."""
    models = list(dict.fromkeys(map(model_name, results)))
    datasets: dict[str, dict[str, Result]] = {}
    for result in results:
        datasets.setdefault(result["dataset"], {})[model_name(result)] = result
    lines, warnings = [("dataset", "metric", *models, "chance")], []
    for dataset, found in datasets.items():
        for metric in dict.fromkeys(metric for result in found.values() for metric in shown_metrics(result)):
            chance = next(iter(found.values()))["protocol"].get("chance", {}).get(metric)
            lines.append((dataset, metric, *(_cell(found.get(model), metric) for model in models), number(chance)))
        if keys := differing(list(found.values())):
            warnings.append(
                f"warning: {dataset}: the models differ in {', '.join(keys)}, so their values cannot be compared"
            )
            continue
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
    ends = interval(result, metric)
    return number(result["metrics"][metric]) + (f" ({' to '.join(map(number, ends))})" if ends else "")
