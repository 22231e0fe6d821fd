"""Shared code of the evaluation commands: parse the flags, run on all ranks, write and print the results."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from ..config import UserError, gather_flags, parse
from ..distributed import Process, joined, on_main
from ..files import twice
from .features import EncodeOptions
from .results import Result, results_table, write_result

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    output: Path = Path("results")
    """folder for the result files"""
    data_root: Path | None = None
    """base folder for the data paths in the configs; None: each config's own folder"""
    overwrite: bool = False
    """replace existing result files"""
    encode: EncodeOptions = field(default_factory=EncodeOptions)


def parse_command(cls: type[T], argv: Sequence[str] | None, command: str, *lists: str) -> T:
    """Return the options of a command from its flags, and set up logging. Flags in `lists` may be repeated."""
    words = gather_flags(sys.argv[1:] if argv is None else argv, *lists)
    options = parse(cls, words, prog=f"languagebind {command}", description=cls.__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return options


def check_output(paths: Sequence[Path], overwrite: bool) -> None:
    """Check that the files are distinct, do not exist, and can be written. Raises `UserError` if not."""
    if name := twice(map(str, paths)):
        raise UserError(f"two results would be {name}: name the models (--model NAME=...) or the datasets (`name:`)")
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists: --overwrite replaces it, --output FOLDER writes elsewhere")
    for folder in {path.parent for path in paths}:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(f"{folder} cannot be written: use another folder")


def evaluate_each(
    options: CommandOptions,
    load: Callable[[torch.device], T],
    jobs: Sequence[tuple[Path, Callable[[T, EncodeOptions], Result]]],
) -> None:
    """Load the models once, run each job with them, write its result to its path, and print a table."""
    check_output([path for path, _ in jobs], options.overwrite)
    with joined(options.encode.device) as process:
        models, results = load(process.device), []
        for path, evaluate in jobs:
            results.append(evaluate(models, replace(options.encode, device=str(process.device))))
            save(results[-1], path, process, options.overwrite)
        if process.is_main:
            print(results_table(results))


def save(result: Result, path: Path, process: Process, overwrite: bool) -> None:
    """Write a result on the first rank. Raises `UserError` on all ranks if another run has written the file."""

    def write() -> None:
        check_output([path], overwrite)
        write_result(result, path)
        log.info("wrote %s", path)

    on_main(process, write)
