"""python -m languagebind.eval.prepare CONFIG.yaml --source DOWNLOAD --output DATA_ROOT"""

import hashlib
import importlib
import json
import logging
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from ... import __version__
from ...config import UserError, load_yaml, parse, run
from ...files import locked, write_atomic
from ..data.datasets import DatasetConfig, load_dataset_config, naming
from ..data.samples import PREPARED
from ..data.validation import validate
from .writing import Listing, count_captions, list_rows, make_links, new_folder, write_manifest

log = logging.getLogger(__name__)
NOT_KINDS = ("__main__", "writing")


@dataclass(frozen=True)
class PrepareConfig:
    """Make the data that a dataset's YAML (see configs/eval/) names from the download that its authors publish."""

    config: tyro.conf.Positional[Path]
    """the dataset's YAML"""
    source: Path
    """folder of the unpacked download; the YAML's `layout` and `prepare` say what it holds"""
    output: Path
    """the data root of evaluation (its --data-root); media outside of it are linked, not copied"""
    skip_missing: bool = False
    """leave out rows whose file is missing, and list them in the .prepare.json"""
    overwrite: bool = False
    """replace what an earlier run made"""


@dataclass(frozen=True)
class Kind:
    """The module that prepares a kind of dataset, and the dataset's options."""

    module: ModuleType
    options: Any


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(
        PrepareConfig,
        sys.argv[1:] if argv is None else argv,
        prog="python -m languagebind.eval.prepare",
        description=PrepareConfig.__doc__,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    report = prepare(options)
    counts = {key: report[key] for key in ("samples", "captions", "classes") if report[key]}
    print(f"wrote {report['data']}: {', '.join(f'{count} {key}' for key, count in counts.items())}")
    if report["missing"]:
        print(f"left out because the file is missing: {len(report['missing'])}")


def prepare(options: PrepareConfig) -> dict[str, Any]:
    """Write a dataset's manifest or class folders, its class names if a file of them is missing, and a report.

    Returns:
        The report, as in `<data>.prepare.json`: data, kind, samples, captions, classes, missing, left_out,
        keys_sha256, version.

    Raises:
        UserError: the download is not what the YAML says, or the data exists already, or another run is making it.
    """
    dataset = load_dataset_config(options.config, options.output, prepared=False)
    kind = _kind(dataset, options.config)
    target = Path(dataset.data)
    if target.suffix not in ("", ".jsonl"):
        raise UserError(f"{dataset.name}: prepare writes a .jsonl manifest or class folders, not {target}")
    if not options.source.is_dir():
        raise UserError(
            f"--source {options.source} is not a folder; {dataset.name} is at {dataset.source or 'its authors'}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.lock")):
            _refuse_existing(target, options)
            report = _report(dataset, _write(dataset, kind, target, options))
            write_atomic(_report_path(target), json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    except BlockingIOError as error:
        raise UserError(f"another run is making {target}: wait for it to end ({error.filename} is locked)") from error
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from error
    return report


def _kind(dataset: DatasetConfig, config: Path) -> Kind:
    """Return the module that `prepare: {kind: ...}` names, with the options beside it."""
    package = importlib.import_module(__package__)
    kinds = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in NOT_KINDS]
    values = dict(dataset.prepare)
    if not values:
        raise UserError(f"{dataset.name}: its YAML has no `prepare`: evaluation reads the download as it is")
    name = values.pop("kind", None)
    if name not in kinds:
        raise UserError(f"{dataset.name}: prepare has no kind {name!r}, only {', '.join(kinds)}")
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"{dataset.name} needs {error.name}: pip install 'languagebind[prepare]'") from error
    where = f"{config}: prepare"
    return Kind(module, validate(module.Options, values, where) if hasattr(module, "Options") else values)


def _refuse_existing(target: Path, options: PrepareConfig) -> None:
    """Refuse to replace what exists unless told to, and always what `prepare` did not make."""
    if not target.exists():
        return
    if not options.overwrite:
        raise UserError(f"{target} exists already: --overwrite makes it again")
    if not _report_path(target).is_file():
        raise UserError(f"{target} was not made by prepare: move it away first")
    if target.is_dir() and options.source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"--source {options.source} lies in {target}, which would be replaced")


def _write(dataset: DatasetConfig, kind: Kind, target: Path, options: PrepareConfig) -> Listing:
    """Write the class names and the links, and the manifest or the class folders.

    An empty report is written just before the data: if the run is stopped in between, the data is known as `prepare`'s,
    and an old report is not taken for one of it.
    """
    by_class = target.suffix == ""
    with new_folder(target) if by_class else nullcontext(target.parent) as folder:
        listing, names = _list(dataset, kind, folder, by_class, options)
        if names:
            _write_names(names, options)
        make_links(listing.links)
        write_atomic(_report_path(target), b"{}\n")
        if not by_class:
            write_manifest(listing.rows, target)
    return listing


def _list(
    dataset: DatasetConfig, kind: Kind, folder: Path, by_class: bool, options: PrepareConfig
) -> tuple[Listing, dict[str, str] | None]:
    """Return what the kind lists, with its counts and labels checked, and the class names to write, if any."""
    read = _files_read(dataset, options.source)
    try:
        with naming(dataset.name):
            rows = kind.module.prepare(options.source, folder, kind.options)
            listing = list_rows(rows, options.source, folder, by_class)
            names = _class_names(kind, listing, options)
    except Exception as error:
        error.add_note(f"while {dataset.name} was prepared from {options.source}{read}")
        raise
    if listing.reasons:
        log.info("%s: left out or changed: %s", dataset.name, listing.reasons)
    if not (options.skip_missing and listing.rows):
        listing.refuse_missing(options.source, dataset.name)
    listing.check_counts(dataset.expect, dataset.name, read)
    if not listing.rows:
        raise UserError(f"{dataset.name}: no samples in {options.source}{read}")
    if classes := names or dataset.class_names:
        listing.check_labels(classes, dataset.name, read)
    return listing, names


def _files_read(dataset: DatasetConfig, source: Path) -> str:
    """Return, for messages, which files of the download the options name."""
    classes = dataset.prepare.get("classes")
    values = [*dataset.prepare.values(), *(classes.values() if isinstance(classes, dict) else ())]
    files = [value for value in values if isinstance(value, str) and os.path.isfile(source / value)]
    return f"; it was read from {', '.join(files)}" if files else ""


def _class_names(kind: Kind, listing: Listing, options: PrepareConfig) -> dict[str, str] | None:
    """Return the class names to write, label -> name, None unless the YAML asks for a file that `prepare` makes."""
    if not _names_file(options):
        return None
    names = kind.module.class_names(options.source, kind.options) if hasattr(kind.module, "class_names") else None
    return names or {label: label for label in sorted(listing.labels)}


def _names_file(options: PrepareConfig) -> str | None:
    """Return the file of class names that `prepare` makes below the data root; one beside the YAML is not its own."""
    value = load_yaml(options.config).get("class_names")
    return value if isinstance(value, str) and not (options.config.parent / value).is_file() else None


def _write_names(names: Mapping[str, str], options: PrepareConfig) -> None:
    file = options.output / str(_names_file(options))
    contents = "".join(f"{label}\t{name}\n" for label, name in names.items()).encode()
    if file.exists() and file.read_bytes() != contents and not options.overwrite:
        raise UserError(f"{file} exists and differs: --overwrite makes it again")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, contents)


def _report_path(target: Path) -> Path:
    return target.with_name(target.name + PREPARED)


def _report(dataset: DatasetConfig, listing: Listing) -> dict[str, Any]:
    keys = json.dumps(sorted(row["path"] for row in listing.rows))
    return {
        "data": dataset.data,
        "kind": dataset.prepare["kind"],
        "samples": len(listing.rows),
        "captions": sum(map(count_captions, listing.rows)),
        "classes": len(listing.labels),
        "missing": listing.missing,
        "left_out": listing.left_out,
        "keys_sha256": hashlib.sha256(keys.encode()).hexdigest(),
        "version": __version__,
    }


if __name__ == "__main__":
    run(main)
