"""The configs that come with the package, by name: the folder `configs/`, which a wheel holds as `_configs`."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from .config import UserError

FOLDER = Path(__file__).resolve().parent / "_configs"
if not FOLDER.is_dir():
    FOLDER = FOLDER.parents[1] / "configs"  # of a checkout
# Of each kind, the folder that names start from, the files in it, and the flag that takes a name
KINDS = {
    "recipe": ("", "*.yaml demo/*.yaml", "python -m training.main --config"),
    "model": ("model", "*.yaml", "python -m training.main --model"),
    "deepspeed": ("deepspeed", "*.json", "python -m training.main --engine deepspeed --deepspeed-config"),
    "dataset": ("eval", "*.yaml", "languagebind eval --config"),
    "comparison": ("eval/pairs", "*.yaml", "languagebind pairs --config"),
}


def list() -> dict[str, dict[str, Path]]:  # noqa: A001 - `configs.list()`
    """Return the configs of each kind: {kind: {name: file}}."""
    found: dict[str, dict[str, Path]] = {}
    for kind, (folder, patterns, _) in KINDS.items():
        files = (file for pattern in patterns.split() for file in sorted((FOLDER / folder).glob(pattern)))
        found[kind] = {file.relative_to(FOLDER / folder).with_suffix("").as_posix(): file for file in files}
    return found


def find(config: str | Path, kind: str) -> Path:
    """Return the path of a config, given as a path or else as a name in `list()[kind]`, or raise `UserError`."""
    config, known = str(config), list()[kind]
    if os.path.exists(config) and not os.path.isdir(config):  # a dataset's data may be in a folder of its name
        return Path(config)
    if config in known:
        return known[config]
    message = f"no {kind} {config!r}; pass a file or one of {', '.join(known)}"
    if other := next((other for other, names in list().items() if config in names and other != kind), None):
        raise UserError(f"{message}. {config} is a {other}: {KINDS[other][2]} {config}")
    close = difflib.get_close_matches(Path(config).name.removesuffix(".yaml"), known, n=1)
    raise UserError(f"{message}. Did you mean {close[0]}?" if close else message)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the names of each kind, or of one."""
    known, wanted = list(), argv or ()
    if unknown := set(wanted) - known.keys():
        raise UserError(f"no kind {min(unknown)!r}: choose from {', '.join(known)}")
    for kind in wanted or known:
        print(f"{kind}: {', '.join(known[kind])}")
