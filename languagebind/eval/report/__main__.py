"""python -m languagebind.eval.report results/ [--output report.html] [--configs configs/eval]"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...config import UserError, parse, run
from ...files import write_atomic
from . import writable
from .page import make_page
from .results import read_configs, read_results, to_csv

log = logging.getLogger(__name__)

CONFIGS = Path("configs/eval")


@dataclass(frozen=True)
class ReportConfig:
    """Make one HTML page, and a .csv beside it, of the results in a folder."""

    results: Annotated[Path, tyro.conf.Positional]
    """folder with the .json files that `python -m languagebind.eval` wrote"""
    output: Path | None = None
    """the page; default: report.html in the folder of results. report.csv is written beside report.html"""
    configs: Path | None = None
    """folder of the datasets' configs, for the headline metrics and the published figures; default: configs/eval where
    it exists"""


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = parse(
        ReportConfig,
        sys.argv[1:] if argv is None else argv,
        prog="python -m languagebind.eval.report",
        description=ReportConfig.__doc__,
    )
    output = config.output or config.results / "report.html"
    if output.suffix != ".html":
        raise UserError(f"--output {output} should end in .html; the .csv gets the same name")
    if config.configs and not config.configs.is_dir():
        raise UserError(f"--configs {config.configs} is no folder")
    results = read_results(config.results)
    if not writable(output.parent):
        raise UserError(f"{output.parent} cannot be written: choose another place with --output")
    configs = config.configs or CONFIGS
    described = read_configs(configs, [result["dataset"] for result in results])
    where = f"Published figures are those of the configs in {configs}."
    if not any(config.published for config in described.values()):
        where = f"No published figures: {configs} holds none for these datasets."
    page = make_page(results, described, where)
    for path, text in ((output, page), (output.with_suffix(".csv"), to_csv(results))):
        write_atomic(path, text.encode())
        log.info("wrote %s", path)


if __name__ == "__main__":
    run(main)
