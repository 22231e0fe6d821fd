"""Result files, one JSON object a run, and the table that is printed at the end; run as a module, a page of them."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...config import UserError
from ...files import write_atomic
from ..statistics import interval


def result_path(output: Path, dataset: str, model: str) -> Path:
    return Path(output) / f"{dataset}_{model}.json"


def checkpoint_name(checkpoint: str) -> str:
    """A short name for a checkpoint: `logs/depth/checkpoints/epoch_1.pt` is `depth-epoch_1`, `org/model` is `model`."""
    path = Path(checkpoint).absolute()
    name = path.stem if path.is_file() else path.name
    return f"{path.parent.parent.name}-{name}" if path.parent.name == "checkpoints" else name


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
