"""What the page is made of: result files, and what the datasets' configs say about them."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from ...config import UserError
from ..datasets import DatasetConfig, load_dataset_config
from ..pairing import PairsConfig, load_pairs_config
from ..statistics import interval

HEADLINES = {"classification": "top1", "multilabel": "mAP", "retrieval": "text_to_modality/R@1"}
PAIRS_HEADLINE = "query_to_gallery/R@1"
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
Config = DatasetConfig | PairsConfig

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


def headline(config: Config | None, results: Sequence[Result]) -> str:
    """The metric to quote of the results of one dataset: the config's, or that of the task."""
    if config and config.metric:
        return config.metric
    usual = HEADLINES[results[0]["task"]]
    held = {metric for result in results for metric in result["metrics"]}
    return PAIRS_HEADLINE if usual not in held and PAIRS_HEADLINE in held else usual


def lower_is_better(metric: str) -> bool:
    return metric.endswith("_rank")


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


def read_configs(folder: Path, wanted: Sequence[str]) -> dict[str, Config]:
    """By name, those of the wanted results that a folder describes: datasets, and in `pairs` below it comparisons.

    Raises:
        UserError: a config is malformed.
    """
    configs: list[Config] = [load_dataset_config(file, prepared=False) for file in sorted(folder.glob("[!.]*.yaml"))]
    configs += [load_pairs_config(file, there=False) for file in sorted(folder.glob("pairs/[!.]*.yaml"))]
    return {config.name: config for config in configs if config.name in wanted}


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
