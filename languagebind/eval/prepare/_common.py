"""What the kinds share: options, MATLAB's files, PNG."""

import importlib
import io
import logging
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...config import UserError, first_line
from ..data.values import refuse_unknown

log = logging.getLogger(__name__)

READ_MAT = """
import pickle, sys, scipy.io
values = scipy.io.loadmat(sys.argv[1], variable_names=[sys.argv[2]])
pickle.dump({name: value for name, value in values.items() if name == sys.argv[2]}, sys.stdout.buffer)
"""


def check_options(options: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise `UserError` for an option that is not among `known`; `kind` is every kind's."""
    refuse_unknown(options, (*known, "kind"), "prepare", "option")


def need(module: str) -> Any:
    """Import a module of an optional package.

    Raises:
        UserError: the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"this dataset needs the package {package}: pip install {package}, or languagebind[prepare]"
        raise UserError(f"{message} ({first_line(error)})") from error


def load_mat(path: Path, variable: str) -> np.ndarray:
    """One variable of a MATLAB file up to version 7; a cell array is an array of objects.

    Raises:
        UserError: the file is missing, is no such file, or lacks the variable.
    """
    need("scipy.io")
    if not path.is_file():
        raise UserError(f"{path} does not exist: --source is the folder of the download")
    # In a process of its own: scipy's reader crashes on some damaged files
    done = subprocess.run([sys.executable, "-c", READ_MAT, str(path), variable], capture_output=True)
    if done.returncode:
        error = done.stderr.decode(errors="replace").strip().splitlines() or [f"its reader ends with {done.returncode}"]
        raise UserError(f"{path} cannot be read as a MATLAB file: {error[-1]}; download it again")
    values = pickle.loads(done.stdout)  # noqa: S301 - written two lines above
    if variable not in values:
        raise UserError(f"{path} has no variable {variable}: is it the file of the release?")
    return values[variable]


def write_png(image: Image.Image, target: Path) -> None:
    """Store a picture as PNG, and its folder where that is not there."""
    data = io.BytesIO()
    image.save(data, "PNG")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error


def log_counts(what: str, counts: Mapping[str, int]) -> None:
    """Say what does not become a row as it is, so that no count is smaller in silence."""
    if counts:
        log.info("%s: %s", what, ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())))
