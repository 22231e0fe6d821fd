"""What the page is made of: result files, and what the datasets' configs say about them."""

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from types import NoneType
from typing import Any

from ..config import UserError
from ..files import write_atomic
from .score.statistics import interval, overlaps

HEADLINES = {"classification": "top1", "multilabel": "mAP", "retrieval": "text_to_modality/R@1"}
# Keys of a protocol, and what they are called: two results that differ in one are not of the same samples and task
COMPARED = {
    "samples": "samples",
    "limit": "limit",
    "split": "split",
    "data_sha256": "data",
    "caption_source": "caption source",
    "classes": "classes",
    "protocol": "protocol",
    "clip": "part of each video in seconds",
    "query": "query",
    "gallery": "gallery",
    "labels": "labels of",
}
Result = dict[str, Any]

LARGEST = 1e15  # of numbers: what is larger is no count, rank or share

# A type, several types, [what each item is] or [what one is, the next...], {str: what each value is}, or the keys that
# an object has to have; COUNT is a number of things
NUMBER, MAYBE, COUNT = (int, float), (int, float, NoneType), "count"
EXAMPLE = {"key": str, "source": list, "text": str, "found": str, "rank": COUNT, "score": NUMBER}
NEEDED = {"dataset": str, "model": str, "task": tuple(HEADLINES), "metrics": {str: MAYBE}, "protocol": dict}
OPTIONAL = {
    "pretrained": (str, NoneType),
    "intervals": {str: [MAYBE, MAYBE]},
    "statistics": dict,
    "ties": COUNT,
    "classes": [{"label": (str, int), "name": str, "samples": COUNT}],
    "confusion": [[COUNT, COUNT, COUNT]],
    "calibration": {"ece": NUMBER, "bins": [[NUMBER, NUMBER, COUNT]]},
    "curves": {str: [[COUNT, NUMBER]]},
    "examples": {str: [EXAMPLE]},
}
# Of a protocol, all of them optional
SETTINGS = {
    **dict.fromkeys(("samples", "captions", "classes", "skipped_samples", "unpaired_samples"), COUNT),
    "missing_samples": (int, NoneType),
    "limit": (int, NoneType),
    "inputs": dict,
    "query": dict,
    "gallery": dict,
    "templates": [str],
    "prompts_sha256": str,
    "chance": {str: MAYBE},
}


def read_results(folder: Path) -> list[Result]:
    """Every result file of a folder, by dataset and model.

    Raises:
        UserError: there is none, a .json is something else, or two are of the same model and dataset.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name the one that `python -m languagebind.eval --output` wrote")
    files = sorted(folder.glob("[!.]*.json"))
    if not files:
        raise UserError(
            f"no results (*.json) in {folder}: make some with `python -m languagebind.eval --output {folder}`"
        )
    places: dict[tuple[str, str], Path] = {}
    results = []
    for file in files:
        result = read_result(file)
        key = (result["dataset"], model_name(result))
        if key in places:
            raise UserError(f"{places[key]} and {file} are both of {key[1]} on {key[0]}: move one to another folder")
        places[key] = file
        results.append(result)
    return sorted(results, key=lambda result: (result["dataset"], model_name(result)))


def model_name(result: Result) -> str:
    """The checkpoint's name, or where a training loop evaluated without one the modality; and how, if not our way."""
    name = result.get("pretrained") or result["model"]
    return f"{name} (paper protocol)" if result["protocol"].get("protocol") == "paper" else name


def differing(results: Sequence[Result]) -> list[str]:
    """What must agree in results of one dataset before their values are compared, and does not."""
    return [name for key, name in COMPARED.items() if len({str(result["protocol"].get(key)) for result in results}) > 1]


def leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each setting that is none of settings itself, `inputs.num_frames`, and its value as text."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def to_csv(results: Sequence[Result]) -> str:
    """A row for each model, dataset and metric; what is not known, and what is infinite, is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "dataset", "metric", "value", "low", "high", "chance", "samples"])
    for result in results:
        protocol = result["protocol"]
        for metric, value in shown_metrics(result).items():
            ends = interval(result, metric) or (None, None)
            chance = protocol.get("chance", {}).get(metric)
            numbers = (value, *ends, chance, protocol.get("samples"))
            known = ["" if number is None or math.isinf(number) else number for number in numbers]
            # A spreadsheet would run a name that looks like a formula
            names = [f"'{name}" if name[:1] in "=+-@" else name for name in (model_name(result), result["dataset"])]
            writer.writerow([*names, metric, *known])
    return text.getvalue()


def shown_metrics(result: Result) -> dict[str, float | None]:
    """The metrics without `chance`, which is what each of them is measured against."""
    return {metric: value for metric, value in result["metrics"].items() if metric != "chance"}


def read_result(file: Path) -> Result:
    """A result file; raises `UserError` if it cannot be read, or is something else."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): move it out of the folder, or evaluate again") from error
    if not isinstance(result, dict):
        raise UserError(f"{file} is no result of an evaluation: move it out of the folder")
    for key, shape in (NEEDED | OPTIONAL).items():
        if key not in result and key in NEEDED:
            raise UserError(f"{file} is no result of an evaluation, it has no `{key}`: move it out of the folder")
        if key in result and not _fits(result[key], shape):
            raise UserError(f"{file}: `{key}` is not what an evaluation writes: evaluate again, or move the file away")
    for key, shape in SETTINGS.items():
        if key in result["protocol"] and not _fits(result["protocol"][key], shape):
            raise UserError(f"{file}: `protocol.{key}` is not what an evaluation writes: evaluate again")
    return result


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(value, (int, float)) and not -LARGEST <= value <= LARGEST:
        return False
    if shape == COUNT:
        return type(value) is int and value >= 0
    if isinstance(shape, list) and isinstance(value, list):
        shapes = shape if len(shape) > 1 else shape * len(value)
        return len(value) == len(shapes) and all(map(_fits, value, shapes))
    if isinstance(shape, dict) and str in shape:
        return isinstance(value, dict) and all(_fits(item, shape[str]) for item in value.values())
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and _fits(value[key], kind) for key, kind in shape.items())
    if isinstance(shape, tuple) and isinstance(shape[0], str):
        return value in shape
    return not isinstance(shape, list) and isinstance(value, shape)


def result_path(output: Path, dataset: str, model: str) -> Path:
    return Path(output) / f"{dataset}_{model}.json"


def writable(folder: Path) -> bool:
    """Whether results can be written into a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result whole or not at all; an infinite metric or bound becomes null, as JSON has no infinity."""
    finite = {key: _finite(result[key]) for key in ("metrics", "intervals") if key in result}
    text = json.dumps(result | finite, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def table(results: Sequence[dict[str, Any]]) -> str:
    """An aligned plain-text table with a line for each metric, its interval, and what a random guess would give."""
    lines = [("dataset", "task", "samples", "metric", "value", "95 % interval", "chance")]
    for result in results:
        chance = result["protocol"]["chance"]
        for metric, value in result["metrics"].items():
            if metric != "chance":
                head = (result["dataset"], result["task"], str(result["protocol"]["samples"]))
                ends = " to ".join(map(number, interval(result, metric) or ()))
                lines.append((*head, metric, number(value), ends, number(chance.get(metric))))
    return "\n".join(aligned(lines, left=4))


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns of even width: the first `left` start on the left, the others, of numbers, end on the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        for line in lines
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def number(value: float | None) -> str:
    """A number of a table; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"


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
