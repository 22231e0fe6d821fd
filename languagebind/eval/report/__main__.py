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
from ..results import read_results, to_csv, writable
from .configs import read_configs
from .page import make_page

log = logging.getLogger(__name__)

CONFIGS = Path("configs/eval")
MARK = 40  # letters: as many as all reports, and all of their tables, have in common


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
    texts = {output: make_page(results, described, where), output.with_suffix(".csv"): to_csv(results)}
    for path, text in texts.items():
        _check_ours(path, text[:MARK])
    for path, text in texts.items():
        try:
            write_atomic(path, text.encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}: choose another place with --output") from error
        log.info("wrote %s", path)


def _check_ours(path: Path, start: str) -> None:
    """Raise `UserError` rather than write over a file that does not start as ours do."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            ours = file.read(len(start)) == start
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}: choose another place with --output") from error
    if not ours:
        raise UserError(f"{path} is there, and is no report: move it away, or choose another place with --output")


if __name__ == "__main__":
    run(main)
