"""Warnings for readers who compare values: missing samples, different settings, overlapping intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...modalities import UNUSED
from ..data.datasets import Counted
from ..results import COMPARED, Result, setting_name
from ..score.statistics import interval

RUN = ("modality", "templates", "prompts_sha256", "precision", "clips", "crops", "inputs", "input_shape")
UNSET = "not set"
SHOWN_MODELS = 3  # of the largest group; a larger one is "the others"


def shortfalls(result: Result, expect: Mapping[Counted, int]) -> list[str]:
    """Return the differences of a result from the full dataset: unexpected counts, and samples left out."""
    protocol, texts = result["protocol"], list[str]()
    expect = protocol.get("expected", {}) | expect
    for what, expected in expect.items():
        count = protocol.get(what, expected)
        if count != expected and not (what == "captions" and texts):  # Fewer samples have fewer captions
            texts.append(f"{count:,} {'of' if count < expected else 'instead of'} {expected:,} {what}")
    skipped, unpaired = protocol.get("skipped_samples", 0), protocol.get("unpaired_samples", 0)
    limit = protocol.get("limit")
    if limit and "samples" not in expect and protocol.get("samples", 0) + skipped == limit:
        texts.append(f"limited to {limit:,} samples")
    missing, bad = protocol.get("missing_samples"), protocol.get("bad_captions")
    left_out = {"missing from the prepared data": missing, "without a partner": unpaired,
                "could not be read": skipped - unpaired, "captions are not valid text": bad}  # fmt: skip
    return texts + [f"{count:,} {why}" for why, count in left_out.items() if count]


def comparable(results: Mapping[str, Result]) -> list[dict[str, Result]]:
    """Return the results of one dataset in groups whose settings in COMPARED agree. Results are keyed by model."""
    groups: dict[str, dict[str, Result]] = {}
    for model, result in results.items():
        groups.setdefault(str([result["protocol"].get(key) for key in COMPARED]), {})[model] = result
    return list(groups.values())


def overlapping(results: Mapping[str, Result], metric: str) -> list[list[str]]:
    """Return the largest groups of comparable models in which every two intervals of a metric overlap."""
    found = []
    for alike in comparable(results):
        ends = {model: known for model, result in alike.items() if (known := interval(result, metric))}
        # Intervals that overlap pairwise share a point, which is the start of one of them
        starts = sorted(low for low, _ in ends.values())
        groups = [[model for model, (low, high) in ends.items() if low <= start <= high] for start in starts]
        groups = [group for k, group in enumerate(groups) if len(group) > 1 and group not in groups[:k]]
        found += [group for group in groups if not any(set(group) < set(other) for other in groups)]
    return found


def settings(results: Mapping[str, Result]) -> dict[str, list[str]]:
    """Return the settings of a dataset's results, each with one value per model."""
    flat = [
        dict(_leaves({"modality": each["model"]} | each["protocol"] | {"statistics": each.get("statistics", {})}))
        for each in results.values()
    ]
    return {key: [each.get(key, UNSET) for each in flat] for key in dict.fromkeys(key for each in flat for key in each)}


def differences(results: Mapping[str, Result], keys: Sequence[str]) -> list[str]:
    """Return a text such as `precision fp32 (a, b), amp_bf16 (c)` for each setting in `keys` that differs."""
    texts = []
    for name, values in settings(results).items():
        key, _, option = name.partition(".")
        if key not in keys or len(set(values)) == 1:
            continue
        # Options that only some results have belong to another modality
        if key == "inputs" and (UNSET in values or option.rpartition(".")[2] in UNUSED):
            continue
        models: dict[str, list[str]] = {}
        for model, value in zip(results, values, strict=True):
            models.setdefault(value, []).append(model)
        groups = sorted(models.items(), key=lambda item: len(item[1]))
        if len(groups[-1][1]) > SHOWN_MODELS:
            groups[-1] = (groups[-1][0], ["the others"])
        cut = 8 if "sha256" in key else 60
        shown = [f"{value[:cut]}{'…' * (len(value) > cut)} ({', '.join(those)})" for value, those in groups]
        texts.append(f"{setting_name(name.removeprefix('inputs.'))} {', '.join(shown)}")
    return texts


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path of each setting (`inputs.num_frames`) and its value as text."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield prefix + key, UNSET if value is None else text
