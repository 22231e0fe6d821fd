"""What must be known before values are compared: missing samples, settings that differ, intervals that overlap."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...config import digest
from ..data.datasets import DatasetConfig
from ..results import COMPARED, Result, leaves, model_name
from ..score.statistics import interval
from .configs import Config, headline
from .markup import shorten

SIGN = "⚠"  # before every caveat in a cell
# How samples are cut and flipped in training, and what a decoder may take: no value depends on it
UNUSED = ("hflip", "random_crop", "max_pixels", "max_seconds")
SHOWN_HASH, SHOWN_PROMPT = 8, 60  # letters
SHOWN_PROMPTS = 2
SHOWN_MODELS = 3  # of those that have what most have


def shortfalls(result: Result, config: Config | None) -> list[str]:
    """In what a result is not of the whole dataset: counts that its config expects, and samples that were left out."""
    protocol = result["protocol"]
    expect = config.expect if isinstance(config, DatasetConfig) else {}
    texts = []
    for what, expected in expect.items():
        count = protocol.get(what, expected)
        if count != expected and not (what == "captions" and texts):  # fewer samples have fewer captions
            texts.append(f"{count:,} {'of' if count < expected else 'in place of'} {expected:,} {what}")
    skipped, unpaired = protocol.get("skipped_samples", 0), protocol.get("unpaired_samples", 0)
    limit = protocol.get("limit")
    if limit and "samples" not in expect and protocol.get("samples", 0) + skipped == limit:
        texts.append(f"limited to {limit:,} samples")
    if missing := protocol.get("missing_samples"):
        texts.append(f"{missing:,} missing from the prepared data")
    if unpaired:
        texts.append(f"{unpaired:,} without a partner")
    if skipped > unpaired:
        texts.append(f"{skipped - unpaired:,} could not be read")
    return texts


def comparable(results: Iterable[Result]) -> list[list[Result]]:
    """Results of one dataset in groups, within which nothing differs that forbids a comparison."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(str(result["protocol"].get(key)) for key in COMPARED), []).append(result)
    return list(groups.values())


def cautions(results: Sequence[Result], config: Config | None) -> list[str]:
    """What to know before comparing the results of one dataset with each other and with published figures."""
    lines = []
    parts = {model_name(result): shortfalls(result, config) for result in results}
    if short := "; ".join(f"{model}: {', '.join(texts)}" for model, texts in parts.items() if texts):
        than = " Published figures are of all of it." if config and config.published else ""
        lines.append(f"Not of the whole dataset: {short}.{than}")
    if tasks := _tasks(results):
        lines.append(f"What was scored differs, so these values cannot be compared: {'; '.join(tasks)}.")
    if settings := _settings(results):
        lines.append(f"Part of a difference may come from how the models were run: {'; '.join(settings)}.")
    metric = headline(config, results)
    if groups := [names for group in comparable(results) for names in _overlapping(group, metric)]:
        texts = "; ".join(", ".join(names) for names in groups)
        where = "in none of these groups is a model" if len(groups) > 1 else "none of these is"
        lines.append(f"Intervals of {metric} overlap, so {where} shown to be better: {texts}.")
    return lines


def _overlapping(results: Sequence[Result], metric: str) -> list[list[str]]:
    """The largest groups of models of which every two have intervals that overlap."""
    ends = {model_name(result): found for result in results if (found := interval(result, metric))}
    # Intervals that overlap two by two have a place in common, which is where one of them starts
    starts = sorted(low for low, _ in ends.values())
    groups = [{name for name, (low, high) in ends.items() if low <= start <= high} for start in starts]
    groups = [group for k, group in enumerate(groups) if group not in groups[:k]]
    largest = [group for group in groups if len(group) > 1 and not any(group < other for other in groups)]
    return [[name for name in ends if name in group] for group in largest]


def _tasks(results: Sequence[Result]) -> list[str]:
    return [
        text
        for key, name in COMPARED.items()
        for text in _differing(name, {model_name(result): _text(result["protocol"].get(key)) for result in results})
    ]


def _settings(results: Sequence[Result]) -> list[str]:
    """Prompts, precision, views, and the options that samples are read with."""
    protocols = {model_name(result): result["protocol"] for result in results}
    prompts = _differing("prompts", {model: _prompts(protocol) for model, protocol in protocols.items()})
    # The hash is of prompts with the classes in them
    hashes = {model: _text(protocol.get("prompts_sha256"))[:SHOWN_HASH] for model, protocol in protocols.items()}
    texts = prompts or _differing("names of the classes", hashes)
    for key in ("precision", "clips", "crops"):
        texts += _differing(key, {model: _text(protocol.get(key)) for model, protocol in protocols.items()})
    if modalities := _differing("modality", {model_name(result): result["model"] for result in results}):
        return texts + modalities  # whose options have little in common
    inputs = {model: dict(leaves(protocol.get("inputs", {}))) for model, protocol in protocols.items()}
    options = []
    for name in next(iter(inputs.values())):
        if name.rpartition(".")[2] not in UNUSED and all(name in given for given in inputs.values()):
            options += _differing(name, {model: given[name] for model, given in inputs.items()})
    shapes = {model: _text(protocol.get("input_shape")) for model, protocol in protocols.items()}
    return texts + (options or _differing("input shape", shapes))


def _differing(name: str, values: Mapping[str, str]) -> list[str]:
    """`precision fp32 (a, b), amp_bf16 (c)`, of values by model; nothing where all are the same."""
    models: dict[str, list[str]] = {}
    for model, value in values.items():
        models.setdefault(value, []).append(model)
    if len(models) < 2:
        return []
    parts = sorted(models.items(), key=lambda item: len(item[1]))
    texts = [f"{value} ({', '.join(those)})" for value, those in parts[:-1]]
    value, those = parts[-1]
    texts.append(f"{value} ({', '.join(those) if len(those) <= SHOWN_MODELS else 'the others'})")
    return [f"{name} {', '.join(texts)}"]


def _prompts(protocol: Mapping[str, Any]) -> str:
    templates = protocol.get("templates")
    if not templates:
        return "none"
    shown = ", ".join(f"“{shorten(template, SHOWN_PROMPT)}”" for template in templates[:SHOWN_PROMPTS])
    if len(templates) <= SHOWN_PROMPTS:
        return shown
    return f"{shown} and {len(templates) - SHOWN_PROMPTS} more (hash {digest(templates)[:SHOWN_HASH]})"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " + ".join(f"{name} × {weight}" for name, weight in value.items())
    if isinstance(value, list):
        return " × ".join(map(str, value))
    return "none" if value is None else str(value)
