"""Write, read and check result files, and print them as tables."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ..config import UserError
from ..files import write_atomic
from .data.datasets import DIRECTIONS
from .score.statistics import interval, overlaps, settings

log = logging.getLogger(__name__)

# Settings of a protocol: results that differ in one of them are not of the same samples and task
COMPARED = ("samples", "limit", "split", "data_sha256", "caption_source", "classes", "protocol", "clip", "query",
            "gallery", "labels", "relevance")  # fmt: skip
Result = dict[str, Any]

LARGEST = 1e15  # more than any count, rank or share
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


class ResultProtocol(BaseModel):
    """The settings of a result that tables and the report rely on."""

    samples: Count | None = None
    captions: Count | None = None
    classes: Count | None = None
    skipped_samples: Count = 0
    unpaired_samples: Count = 0
    missing_samples: Count | None = None
    limit: Count | None = None
    expected: dict[str, Count] = {}
    bad_captions: Count = 0
    inputs: dict[str, Any] = {}
    templates: list[str] | None = None
    chance: dict[str, Number | None] = {}
    captions_of_several_samples: Count = 0
    ceiling: dict[str, Number] = {}


class ResultFile(BaseModel):
    """The keys of a result file; other keys are allowed."""

    dataset: str
    model: str
    task: Literal["classification", "multilabel", "retrieval", "segmentation"]
    metrics: dict[str, Number | None]
    protocol: ResultProtocol
    pretrained: str | None = None
    intervals: dict[str, tuple[Number | None, Number | None]] = {}
    statistics: dict[str, Any] = {}
    ties: Count = 0
    classes: list[dict[str, Any]] = []
    confusion: list[tuple[Count, Count, Count]] = []
    calibration: dict[str, Any] = {}
    curves: dict[str, list[tuple[Count, Number]]] = {}
    gap: dict[str, Number | None] = {}
    examples: dict[str, list[dict[str, Any]]] = {}


def new_result(config: Any, model: str, found: dict[str, Any], details: dict[str, Any] | None) -> Result:
    """Return the contents of a result file from metrics and protocol (`found`) and more statistics (`details`)."""
    result = {
        "dataset": config.name,
        "model": model,
        "pretrained": None,
        "task": config.task,
        "metrics": found["metrics"],
        "language": config.language,
        "protocol": found["protocol"],
    }
    return result if details is None else result | {"statistics": settings()} | details


def read_result(file: Path) -> Result | None:
    """Return the result in a file, or None for another file. Raises `UserError` if one of its values is wrong."""
    errors: list[Any] = []
    try:
        data = file.read_bytes()
        ResultFile.model_validate_json(data, strict=True)
        return json.loads(data)
    except OSError as error:
        reason = error.strerror
    except ValidationError as error:
        errors = error.errors()
        reason = ": ".join(filter(None, [".".join(map(str, errors[0]["loc"])), errors[0]["msg"]]))
    message = f"{file} is not a valid result ({reason}): evaluate again, or move the file elsewhere"
    missing = sum(each["type"] == "missing" and len(each["loc"]) == 1 for each in errors)
    if not missing and not (errors and errors[0]["type"] == "model_type"):
        raise UserError(message)
    # A file with most of a result's keys was meant to be one
    log.log(logging.WARNING if missing in (1, 2) else logging.INFO, "skipped: %s", message)
    return None


def read_results(*folders: Path) -> list[Result]:
    """Return all results below some folders, sorted by dataset and model, or raise `UserError` if there are none."""
    found: dict[tuple[str, str], tuple[Path, Result]] = {}
    for folder in folders:
        some = False
        for file in sorted(folder.rglob("*.json")):
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if hidden or (result := read_result(file)) is None:
                continue
            some, key = True, (result["dataset"], model_name(result))
            known = found.setdefault(key, (file, result))[0]
            if known.resolve() != file.resolve():
                raise UserError(f"{known} and {file} are both results of {key[1]} on {key[0]}: move one away")
        if not some:
            raise UserError(f"no results below {folder}: run `languagebind eval --output {folder}` first")
    return [result for _, (_, result) in sorted(found.items(), key=lambda item: item[0])]


def model_name(result: Result) -> str:
    """Return the name of the checkpoint, or else the modality. A protocol of others is added in parentheses."""
    name = result.get("pretrained") or result["model"]
    protocol = result["protocol"].get("protocol", "ours")
    return name if protocol == "ours" else f"{name} ({protocol} protocol)"


def ceiling_note(protocol: Mapping[str, Any]) -> str | None:
    """Return a sentence on the captions that several samples share, or None if they do not bound recall."""
    ceiling = protocol.get("ceiling")
    if not ceiling:
        return None
    # Rounded down, because a bound of 0.999 is not 1.00
    bounds = " / ".join(f"{math.floor(100 * ceiling[f'{name}/R@1'] + 1e-9) / 100:.2f}" for name in DIRECTIONS)
    shared = f"{protocol['captions_of_several_samples']} of {protocol['captions']} captions belong to several samples"
    return f"{shared}: R@1 cannot exceed {bounds}; `relevant: caption` in the config counts all of them as right"


def setting_name(key: str) -> str:
    """Return the name of a setting in `COMPARED` for use in a sentence."""
    return key.removesuffix("_sha256").replace("_", " ")


def shown_metrics(result: Result) -> dict[str, float | None]:
    """Return the metrics without `chance`, which tables show in a column of its own."""
    return {metric: value for metric, value in result["metrics"].items() if metric != "chance"}


def result_path(output: Path, dataset: str, model: str) -> Path:
    """Return the path of the result file of a model on a dataset."""
    return Path(output) / f"{dataset}_{model}.json"


def write_output(path: Path, data: bytes) -> None:
    """Write a file atomically, and create its folder if needed. Raises `UserError` if writing fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_result(result: Result, path: Path) -> None:
    """Write a result. An infinite metric or bound becomes null. Raises `UserError` if writing fails."""
    numbers = json.dumps({key: result[key] for key in ("metrics", "intervals") if key in result})
    finite = json.loads(numbers, parse_constant=lambda infinity: None)
    text = json.dumps(result | finite, indent=2, ensure_ascii=False, allow_nan=False)
    write_output(path, text.encode(errors="backslashreplace") + b"\n")  # paths that are not UTF-8


def results_table(results: Sequence[Result]) -> str:
    """Return a plain-text table with a row per metric: value, interval and chance."""
    rows = [("dataset", "task", "samples", "metric", "value", "95 % interval", "chance")]
    for result in results:
        chance = result["protocol"]["chance"]
        head = (result["dataset"], result["task"], str(result["protocol"]["samples"]))
        rows += [(*head, x, *_cell(result, x), _number(chance.get(x))) for x in shown_metrics(result)]
    return "\n".join(_aligned(rows, left=4))


def _aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return the rows as lines with aligned columns: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(result: Result, metric: str) -> tuple[str, str]:
    """Return a metric's value and interval as text; empty if the result lacks them."""
    return _number(result["metrics"].get(metric)), " to ".join(map(_number, interval(result, metric) or ()))


def comparison(results: Sequence[Result]) -> str:
    """Return a table with a column per model, with warnings about different settings and overlapping intervals."""
    models = list(dict.fromkeys(map(model_name, results)))
    datasets: dict[str, dict[str, Result]] = {}
    for result in results:
        datasets.setdefault(result["dataset"], {})[model_name(result)] = result
    rows, warnings = [("dataset", "metric", *models, "chance")], []
    for dataset, found in datasets.items():
        for metric in dict.fromkeys(metric for result in found.values() for metric in shown_metrics(result)):
            chance = next(iter(found.values()))["protocol"].get("chance", {}).get(metric)
            cells = (_cell(found.get(model, {"metrics": {}}), metric) for model in models)
            values = (f"{value} ({ends})" if ends else value for value, ends in cells)
            rows.append((dataset, metric, *values, _number(chance)))
        protocols = [result["protocol"] for result in found.values()]
        keys = [setting_name(key) for key in COMPARED if len({str(each.get(key)) for each in protocols}) > 1]
        if keys:
            warnings.append(f"{dataset}: the models differ in {', '.join(keys)}, so their values cannot be compared")
            continue
        for one, other in combinations(found, 2):
            if metrics := overlaps(found[one], found[other]):
                overlap = f"the intervals of {one} and {other} overlap in {', '.join(metrics)}"
                warnings.append(f"{dataset}: {overlap}, so neither is shown to be better there")
    return "\n".join([*_aligned(rows, left=2), *(f"warning: {text}" for text in warnings)])
