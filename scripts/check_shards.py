"""Check shards and print what they hold; exit status 1 when something is wrong.

python scripts/check_shards.py /data/depth --modality depth --decode
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from languagebind.config import UserError, parse, run
from languagebind.data.checking import Checked, check_shards
from languagebind.data.shards import write_index
from languagebind.modalities import modality_class, modality_names
from languagebind.remote import is_url

FAULTS_SHOWN = 50


@dataclass(frozen=True)
class CheckOptions:
    """Check shards."""

    shards: Annotated[str, tyro.conf.Positional]
    """a folder, a glob or a brace pattern, on the disk or a URL (s3://...); several joined by `::`"""
    modality: str | None = None
    """what each sample must hold"""
    decode: bool = False
    """decode every sample, too; needs --modality"""
    write_index: bool = False
    """write index.json beside shards without a fault"""


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print, and return the exit status."""
    options = parse(CheckOptions, sys.argv[1:] if argv is None else argv, prog="check_shards.py")
    if options.decode and options.modality is None:
        raise UserError("--decode needs --modality: what to decode")
    if options.modality is not None and options.modality not in modality_names():
        raise UserError(f"unknown modality {options.modality!r}, expected one of {modality_names()}")
    if options.write_index and is_url(options.shards):
        raise UserError("--write-index writes beside local shards: check those, then copy index.json to the URL")
    modality = modality_class(options.modality)() if options.modality else None
    checked = check_shards(options.shards, modality, options.decode)
    print_statistics(checked)
    for fault in checked.faults[:FAULTS_SHOWN]:
        print(f"fault: {fault}")
    if len(checked.faults) > FAULTS_SHOWN:
        print(f"... and {len(checked.faults) - FAULTS_SHOWN} more")
    if options.write_index:
        write_indexes(checked)
    print(f"{len(checked.faults)} faults" if checked.faults else "no faults")
    return 1 if checked.faults else 0


def print_statistics(checked: Checked) -> None:
    found = checked.statistics()
    print(f"{found['samples']} samples in {found['shards']} shards, {found['bytes'] / 1e6:.1f} MB")
    for name, (number, *spread) in found["members"].items():
        print(f"  .{name}: {number} members; bytes {' / '.join(f'{x:.0f}' for x in spread)} (least / median / most)")
    for name, (number, *spread) in found["captions"].items():
        print(f"  {name}: {number} captions; words {' / '.join(f'{x:g}' for x in spread)}")
    print(f"  {found['distinct captions']} of {found['captions in all']} captions are distinct")


def write_indexes(checked: Checked) -> None:
    """One index a folder. A shard with a fault must not be counted as whole."""
    if checked.faults:
        raise UserError("no index.json is written for shards with faults")
    for folder in {Path(shard).parent for shard in checked.infos}:
        write_index(folder, [info for shard, info in checked.infos.items() if Path(shard).parent == folder])
        print(f"wrote {folder / 'index.json'}")


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
