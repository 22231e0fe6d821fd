"""Prepare a dataset: languagebind prepare NAME --source DOWNLOAD --output DATA_ROOT"""

import importlib
import json
import logging
import pkgutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from ... import __version__, configs
from ...config import UserError, digest, load_yaml, run
from ...files import locked, new_folder, write_atomic
from ..command import parse_command
from ..data.datasets import DatasetConfig, load_dataset_config, naming
from ..data.samples import PREPARED
from ..data.validation import validate
from .writing import Listing, count_captions, list_rows, make_links

log = logging.getLogger(__name__)
NOT_KINDS = ("__main__", "writing")


@dataclass(frozen=True)
class PrepareConfig:
    """Convert the download that a dataset's authors publish into the data that evaluation reads."""

    config: tyro.conf.Positional[Path]
    """the dataset: a name such as msvd (see `languagebind configs`), or a YAML file"""
    source: Path
    """folder with the unpacked download; the keys `layout` and `prepare` in the YAML describe its contents"""
    output: Path
    """data root of the evaluation, its --data-root; media outside this folder are linked, not copied"""
    skip_missing: bool = False
    """leave out rows whose file is missing, and list them in the .prepare.json file"""
    overwrite: bool = False
    """replace the data of an earlier run"""
    strict: bool = False
    """refuse other numbers of samples, captions or classes than the YAML's `expect`; otherwise they are reported"""


def main(argv: Sequence[str] | None = None) -> None:
    report = prepare(parse_command(PrepareConfig, argv, "prepare"))
    counts = [f"{report[key]} {key}" for key in ("samples", "captions", "classes") if report[key]]
    print(f"wrote {report['data']}: {', '.join(counts)}")
    if report["missing"]:
        print(f"left out because the file is missing: {len(report['missing'])}")
    if report["unexpected"]:
        print(f"not the whole dataset, or another version of it: {'; '.join(report['unexpected'])}")


def prepare(options: PrepareConfig) -> dict[str, Any]:
    """Write a dataset's manifest or class folders, its file of class names if the YAML names one, and a report.

    Returns the report, as in `<data>.prepare.json`. Raises `UserError` if the download does not match the YAML, the
    data already exists, or another run is making it.
    """
    options = replace(options, config=configs.find(options.config, "dataset"))
    dataset = load_dataset_config(options.config, options.output, prepared=False)
    kind, values = _kind(dataset, options.config)
    target = Path(dataset.data)
    if target.suffix not in ("", ".jsonl"):
        raise UserError(f"{dataset.name}: prepare writes a .jsonl manifest or class folders, not {target}")
    if not options.source.is_dir():
        raise UserError(f"--source {options.source} is not a folder: download {dataset.source or 'the dataset'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.lock")):
            _refuse_existing(target, options)
            report = _report(dataset, _write(dataset, kind, values, target, options))
            write_atomic(Path(f"{target}{PREPARED}"), json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    except BlockingIOError as error:
        raise UserError(f"another run is making {target}: wait for it to end ({error.filename} is locked)") from error
    except OSError as error:
        raise UserError(f"{dataset.name}: {error.filename or target}: {error.strerror or error}") from error
    except Exception as error:
        error.add_note(f"while preparing {dataset.name} from {options.source}")
        raise
    return report


def _kind(dataset: DatasetConfig, config: Path) -> tuple[ModuleType, Any]:
    """Return the module that `prepare: {kind: ...}` names, and its options."""
    package = importlib.import_module(__package__)
    kinds = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in NOT_KINDS]
    values = dict(dataset.prepare)
    if not values:
        raise UserError(f"{dataset.name}: its YAML has no `prepare`, since evaluation reads the download directly")
    name = values.pop("kind", None)
    if name not in kinds:
        raise UserError(f"{dataset.name}: prepare has no kind {name!r}, only {', '.join(kinds)}")
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"{dataset.name} needs {error.name}: pip install 'languagebind[prepare]'") from error
    where = f"{config}: prepare"
    return module, validate(module.Options, values, where) if hasattr(module, "Options") else values


def _refuse_existing(target: Path, options: PrepareConfig) -> None:
    """Raise `UserError` if the data exists, unless `prepare` made it and `--overwrite` is on."""
    if not target.exists():
        return
    if not options.overwrite:
        raise UserError(f"{target} exists already: --overwrite replaces it")
    if not Path(f"{target}{PREPARED}").is_file():
        raise UserError(f"{target} was not made by prepare: move it away first")
    if target.is_dir() and options.source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"--source {options.source} is inside {target}, which would be replaced: move it out")


def _write(dataset: DatasetConfig, kind: ModuleType, values: Any, target: Path, options: PrepareConfig) -> Listing:
    """Write the class names, the links, and the manifest or the class folders.

    An empty report is written just before the data. If the run stops in between, the report marks the data as made by
    `prepare`, and no old report can be mistaken for the report of the new data.
    """
    source, by_class = options.source, target.suffix == ""
    wanted = load_yaml(options.config).get("class_names")
    # A file of class names that is not beside the YAML is written below the data root
    make_names = isinstance(wanted, str) and not (options.config.parent / wanted).is_file()
    names_file = options.output / str(wanted) if make_names else None
    with new_folder(target) if by_class else nullcontext(target.parent) as folder:
        with naming(dataset.name):
            listing = list_rows(kind.prepare(source, folder, values), source, folder, by_class)
            names = kind.class_names(source, values) if names_file and hasattr(kind, "class_names") else None
        log.info("%s: left out or changed: %s", dataset.name, listing.left_out or "nothing")
        names = names or {label: label for label in sorted(listing.labels)}
        classes = names if names_file else dataset.class_names or names
        listing.check(dataset, classes, source, options.skip_missing, options.strict)
        if names_file:
            contents = "".join(f"{label}\t{name}\n" for label, name in names.items()).encode()
            if names_file.exists() and names_file.read_bytes() != contents and not options.overwrite:
                raise UserError(f"{names_file} exists and differs: --overwrite replaces it")
            names_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(names_file, contents)
        make_links(listing.links)
        write_atomic(Path(f"{target}{PREPARED}"), b"{}\n")
        if not by_class:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in listing.kept]
            write_atomic(target, "".join(lines).encode(errors="backslashreplace"))
    return listing


def _report(dataset: DatasetConfig, listing: Listing) -> dict[str, Any]:
    return {
        "data": dataset.data,
        "kind": dataset.prepare["kind"],
        "samples": len(listing.kept),
        "captions": count_captions(listing.kept),
        "classes": len(listing.labels),
        "missing": list(listing.missing.values()),
        "left_out": listing.left_out,
        "unexpected": listing.unexpected,
        "keys_sha256": digest(sorted(row["path"] for row in listing.kept)),
        "version": __version__,
    }


if __name__ == "__main__":
    run(main)
