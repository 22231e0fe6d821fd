"""python -m languagebind.eval.prepare CONFIG.yaml --source DOWNLOAD --output DATA_ROOT"""

import hashlib
import importlib
import json
import logging
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
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
from ._writing import Tally, count_captions, find_rows, make_links, new_folder, refuse_missing, write_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareConfig:
    """Make the data that a dataset's YAML names (see configs/eval/) of the download that its authors publish."""

    config: tyro.conf.Positional[Path]
    """the dataset's YAML"""
    source: Path
    """folder of the download, unpacked; the YAML's `layout` and `prepare` say what it holds"""
    output: Path
    """the data root of evaluation (its --data-root); media outside of it are linked, not copied"""
    skip_missing: bool = False
    """leave out rows whose file is not there, and list them in the .prepare.json"""
    overwrite: bool = False
    """replace what an earlier run made"""


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
        print(f"left out for want of a file: {len(report['missing'])}")


def prepare(options: PrepareConfig) -> dict[str, Any]:
    """Write a dataset's manifest or class folders, its class names where a file of them is asked for, and a report.

    Returns:
        The report, as in `<data>.prepare.json`: data, kind, samples, captions, classes, missing, left_out,
        keys_sha256, version.

    Raises:
        UserError: the download is not what the YAML says, or the data is there already, or being made.
    """
    dataset = load_dataset_config(options.config, options.output, prepared=False)
    kind, target = _kind(dataset), Path(dataset.data)
    report_path = target.with_name(target.name + PREPARED)
    by_class = target.suffix == ""
    if not by_class and target.suffix != ".jsonl":
        raise UserError(f"{dataset.name}: prepare writes a .jsonl manifest or class folders, not {target}")
    if not options.source.is_dir():
        raise UserError(
            f"--source {options.source} is no folder; {dataset.name} is at {dataset.source or 'its authors'}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.lock")):
            _refuse_existing(target, report_path, options)
            report = _write(dataset, kind, target, report_path, options)
            write_atomic(report_path, json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    except BlockingIOError as error:
        raise UserError(f"another run makes {target}: wait for its end ({error.filename} is locked)") from error
    except OSError as error:
        raise UserError(f"cannot write {error.filename or target}: {error.strerror}") from error
    return report


def _write(
    dataset: DatasetConfig, kind: ModuleType, target: Path, report_path: Path, options: PrepareConfig
) -> dict[str, Any]:
    """The manifest with the links that it needs, or the class folders, and the class names; returns the report.

    An empty report is written just before the data. Should the run be stopped there, the data is known for `prepare`'s,
    and no old report is taken for one of it.
    """
    if target.suffix:
        rows, tally, names, links = _rows(dataset, kind, target, options)
        _write_names(names, options)
        make_links(links)
        write_atomic(report_path, b"{}\n")
        write_manifest(rows, target)
    else:
        with new_folder(target) as folder:
            rows, tally, names, links = _rows(dataset, kind, folder, options)
            make_links(links)
            _write_names(names, options)
            write_atomic(report_path, b"{}\n")
    return _report(dataset, rows, tally)


def _rows(dataset: DatasetConfig, kind: ModuleType, target: Path, options: PrepareConfig):
    """The manifest's rows, the counts, the class names to write, if they are asked for, and the links to make.

    `target` is the manifest to be, or the folder of class folders.
    """
    rest = {key: value for key, value in dataset.prepare.items() if key != "kind"}
    by_class = target.is_dir()
    folder = target if by_class else target.parent
    with naming(dataset.name):
        rows, tally, links = find_rows(kind.prepare(options.source, folder, rest), options.source, folder, by_class)
    read = _files_read(dataset, options.source)
    if not options.skip_missing:
        refuse_missing(tally, options.source, dataset.name)
    tally.check(dataset.expect, dataset.name, read)
    if not rows:
        refuse_missing(tally, options.source, dataset.name)
    if not rows:
        raise UserError(f"{dataset.name}: no samples in {options.source}")
    names = None
    if _names_file(options):
        with naming(dataset.name):
            names = kind.class_names(options.source, rest) if hasattr(kind, "class_names") else None
        names = names or {label: label for label in sorted(tally.labels)}
    if classes := names or dataset.class_names:
        tally.check_labels(classes, dataset.name, read)
    return rows, tally, names, links


def _files_read(dataset: DatasetConfig, source: Path) -> str:
    """For messages: the files of the download that the options name."""
    classes = dataset.prepare.get("classes")
    values = [*dataset.prepare.values(), *(classes.values() if isinstance(classes, dict) else ())]
    files = [value for value in values if isinstance(value, str) and os.path.isfile(source / value)]
    return f"; it was read from {', '.join(files)}" if files else ""


def _names_file(options: PrepareConfig) -> str | None:
    """The file of class names below the data root that is to be written; one beside the YAML is there."""
    value = load_yaml(options.config).get("class_names")
    return value if isinstance(value, str) and not (options.config.parent / value).is_file() else None


def _write_names(names: Mapping[str, str] | None, options: PrepareConfig) -> None:
    if names is None:
        return
    file = options.output / _names_file(options)
    contents = "".join(f"{label}\t{name}\n" for label, name in names.items()).encode()
    if file.exists() and file.read_bytes() != contents and not options.overwrite:
        raise UserError(f"{file} is there and differs: --overwrite makes it again")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, contents)


def _report(dataset: DatasetConfig, rows: Sequence[dict[str, Any]], tally: Tally) -> dict[str, Any]:
    keys = json.dumps(sorted(row["path"] for row in rows))
    return {
        "data": dataset.data,
        "kind": dataset.prepare["kind"],
        "samples": len(rows),
        "captions": sum(map(count_captions, rows)),
        "classes": len(tally.labels),
        "missing": tally.missing,
        "left_out": dict(tally.left_out),
        "keys_sha256": hashlib.sha256(keys.encode()).hexdigest(),
        "version": __version__,
    }


def _kind(dataset: DatasetConfig) -> ModuleType:
    """The module that prepares a dataset."""
    package = importlib.import_module(__package__)
    kinds = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
    kind = dataset.prepare.get("kind")
    if not dataset.prepare:
        raise UserError(f"{dataset.name}: its YAML has no `prepare`: evaluation reads the download as it is")
    if kind not in kinds:
        raise UserError(f"{dataset.name}: prepare has no kind {kind!r}, only {', '.join(kinds)}")
    return importlib.import_module(f"{__package__}.{kind}")


def _refuse_existing(target: Path, report: Path, options: PrepareConfig) -> None:
    """Refuse to replace what is there unless told to, and ever what `prepare` did not make."""
    if not target.exists():
        return
    if not options.overwrite:
        raise UserError(f"{target} is there already: --overwrite makes it again")
    if not report.is_file():
        raise UserError(f"{target} was not made by prepare: move it away first")
    if target.is_dir() and options.source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"--source {options.source} lies in {target}, which would be replaced")


if __name__ == "__main__":
    run(main)
