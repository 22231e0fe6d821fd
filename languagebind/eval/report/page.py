"""Make the page of results: prepare the data for the templates, and define the functions that they call."""

import base64
import hashlib
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..data.datasets import NOT_FRACTIONS, DatasetConfig, load_dataset_config
from ..data.pairing import PairsConfig, load_pairs_config
from ..results import COMPARED, Result, ceiling_note, model_name, shown_metrics
from ..score.statistics import interval
from . import caveats
from .charts import recall_curves
from .examples import illustrated

Config = DatasetConfig | PairsConfig
TEMPLATES = Path(__file__).parent / "templates"
# Characters that HTML and UTF-8 cannot hold: control characters and halves of surrogate pairs
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# Headline metrics of datasets whose config names none: the first of these that the results have
HEADLINES = ("top1", "mAP", "mIoU", "text_to_modality/R@1", "query_to_gallery/R@1")
SHOWN_CLASSES, SHOWN_CONFUSIONS = 30, 50


class Dataset:
    """The facts that the templates show of the results on a dataset, keyed by model, and of its config if any."""

    def __init__(self, name: str, results: dict[str, Result], config: Config | None):
        self.name, self.results, self.config = name, results, config
        self.modality = next(iter(results.values()))["model"]
        self.metrics = list(dict.fromkeys(metric for result in results.values() for metric in shown_metrics(result)))
        default = next((metric for metric in HEADLINES if metric in self.metrics), HEADLINES[0])
        self.metric = (config and config.metric) or default
        self.lower_is_better = self.metric.endswith("_rank")

        pick = min if self.lower_is_better else max
        values = {model: result["metrics"].get(self.metric) for model, result in results.items()}
        known = [value for value in values.values() if value is not None]
        compared = len(known) > 1 and len(caveats.comparable(results)) == 1
        self.best = {model for model, value in values.items() if compared and value == pick(known)}
        entries = [entry for entry in (config.published if config else ()) if self.metric in entry["values"]]
        models = [entry["model"] for entry in entries]
        names = [f"{x['model']} ({x['where']})" if models.count(x["model"]) > 1 else x["model"] for x in entries]
        published = {name: entry["values"][self.metric] for name, entry in zip(names, entries, strict=True)}
        self.published = dict(sorted(published.items(), key=lambda item: item[1], reverse=pick is max))

        expect = config.expect if isinstance(config, DatasetConfig) else {}
        shortfalls = {model: caveats.shortfalls(result, expect) for model, result in results.items()}
        self.partial = {model: texts for model, texts in shortfalls.items() if texts}
        counts = dict.fromkeys(result["protocol"].get("samples") for result in results.values())
        self.samples = " or ".join(f"{count:,}" for count in counts if count is not None)
        if "samples" in expect and list(counts) != [expect["samples"]]:
            self.samples += f" of {expect['samples']:,}"


class Confusion:
    """A confusion matrix, the most confused classes in class order, and the most frequent errors."""

    def __init__(self, result: Result):
        true, found, counts = np.array(result["confusion"]).T
        self.names = [each["name"] for each in result["classes"]]
        self.counts = np.zeros((len(self.names), len(self.names)), int)
        self.counts[true, found] = counts
        self.totals = self.counts.sum(axis=1)
        errors = self.counts - np.diag(self.counts.diagonal())
        most = np.argsort(-errors.sum(axis=0) - errors.sum(axis=1), kind="stable")[:SHOWN_CLASSES]
        self.shown = sorted(most.tolist())
        self.errors = sorted(np.argwhere(errors).tolist(), key=lambda pair: -errors[tuple(pair)])[:SHOWN_CONFUSIONS]


def make_page(results: Sequence[Result], folder: Path) -> str:
    """Return the HTML page of results from `read_results`, with the published results in the configs of a folder."""
    environment = open_templates()
    environment.policies["urlize.rel"] = "noreferrer"
    environment.filters["ceiling_note"] = ceiling_note
    environment.globals |= {"interval": interval, "illustrated": illustrated, "recall_curves": recall_curves,
                            "Confusion": Confusion, "caveats": caveats, "COMPARED": COMPARED}  # fmt: skip
    script = Markup((TEMPLATES / "sort.js").read_text("utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    every: list[Config] = [load_dataset_config(file, prepared=False) for file in sorted(folder.glob("[!.]*.yaml"))]
    every += [load_pairs_config(file, there=False) for file in sorted(folder.glob("pairs/[!.]*.yaml"))]
    configs = {config.name: config for config in every}
    groups = groupby(results, key=lambda result: result["dataset"])
    datasets = [Dataset(name, {model_name(each): each for each in group}, configs.get(name)) for name, group in groups]
    template = environment.get_template("report.html")
    return template.render(datasets=datasets, configs=folder, script=script, script_hash=digest)


def open_templates(*folders: Path) -> Environment:
    """Return the templates in some folders, then in this package's, with the style of all pages."""
    environment = Environment(loader=FileSystemLoader([*folders, TEMPLATES]), autoescape=True, finalize=clean,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"figure": figure, "breakable": breakable}
    environment.globals["style"] = Markup((TEMPLATES / "style.css").read_text("utf-8"))
    return environment


def figure(value: float | None, metric: str = "") -> str:
    """Return the text of a value: fractions in percent, other metrics unchanged."""
    if value is None:
        return "not finite"
    share = not metric.endswith(NOT_FRACTIONS)
    return (f"{100 * value:.1f}" if share else f"{value:.5g}" if value < 1e4 else f"{value:.0f}").replace("inf", "∞")


def breakable(name: str) -> Markup:
    """Return a name that the browser may break after underscores, slashes and plus signs."""
    return Markup(re.sub("([_/+])", r"\1<wbr>", str(escape(clean(name)))))


def clean(value: object) -> object:
    """Return a template's value without the characters that a page cannot hold."""
    return FORBIDDEN.sub("\ufffd", value) if type(value) is str else value
