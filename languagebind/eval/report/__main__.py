"""Make an HTML page: languagebind report results/ [more/ ...] [--output report.html]"""

import csv
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...config import UserError, run
from ...configs import FOLDER
from ..command import parse_command
from ..results import Result, model_name, read_results, shown_metrics, write_output
from ..score.statistics import interval
from .page import make_page

log = logging.getLogger(__name__)
MARK = 40  # characters at the start of the file, which all pages share, and all CSV tables


@dataclass(frozen=True)
class ReportConfig:
    """Make one HTML page, and a .csv file beside it, of all results below some folders."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("results"),)
    """folders with the .json files that `languagebind eval` wrote"""
    output: Path | None = None
    """HTML file to write, with a .csv file beside it; None: report.html in the first folder"""
    configs: Path = FOLDER / "eval"
    """folder of the datasets' configs, which name the headline metrics and the published results"""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_command(ReportConfig, argv, "report")
    if not config.configs.is_dir():
        raise UserError(f"--configs {config.configs} is not a folder")
    results = read_results(*config.results)
    output = config.output or config.results[0] / "report.html"
    if output.suffix != ".html":
        output = output.with_name(f"{output.name}.html")
    texts = {output.with_suffix(".csv"): to_csv(results), output: make_page(results, config.configs)}
    for path, text in texts.items():
        if path.is_file() and path.read_text("utf-8", "replace")[:MARK] != text[:MARK]:
            raise UserError(f"{path} exists and is not a report: move it away, or choose another --output")
    for path, text in texts.items():
        write_output(path, text.encode("utf-8", "replace"))
        log.info("wrote %s", path)


def to_csv(results: Sequence[Result]) -> str:
    """Return CSV text with a row per model, dataset and metric, as fractions. Unknown or infinite values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "dataset", "metric", "value", "low", "high", "chance", "samples"])
    for result in results:
        # A spreadsheet would evaluate a name that looks like a formula
        names = [f"'{name}" if name[:1] in "=+-@" else name for name in (model_name(result), result["dataset"])]
        for metric, value in shown_metrics(result).items():
            chance = result["protocol"].get("chance", {}).get(metric)
            numbers = (value, *(interval(result, metric) or (None, None)), chance, result["protocol"].get("samples"))
            known = ["" if number is None or math.isinf(number) else number for number in numbers]
            writer.writerow([*names, metric, *known])
    return text.getvalue()


if __name__ == "__main__":
    run(main)
