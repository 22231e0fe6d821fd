"""Check shards and print their contents. The exit status is 1 if there are faults.

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
from languagebind.modalities import modality_class
from languagebind.remote import is_url

FAULTS_SHOWN = 50


@dataclass(frozen=True)
class CheckOptions:
    """Check shards."""

    shards: Annotated[str, tyro.conf.Positional]
    """shards: a folder, a glob or a brace pattern, on disk or at a URL (s3://...); several joined by `::`"""
    modality: str | None = None
    """the modality that each sample must contain"""
    decode: bool = False
    """also decode every sample; needs --modality"""
    write_index: bool = False
    """write index.json beside the shards if there are no faults"""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the shards, print the result, and return the exit status."""
    options = parse(CheckOptions, sys.argv[1:] if argv is None else argv, prog="check_shards.py")
    if options.decode and options.modality is None:
        raise UserError("--decode needs --modality")
    if options.write_index and is_url(options.shards):
        raise UserError("--write-index needs local shards; run it on a local copy, then copy index.json to the URL")
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
    """Print the numbers of samples, files and captions."""
    found = checked.statistics()
    print(f"{found['samples']} samples in {found['shards']} shards, {found['bytes'] / 1e6:.1f} MB")
    for name, (number, *spread) in found["members"].items():
        print(f"  .{name}: {number} members; bytes {' / '.join(f'{x:.0f}' for x in spread)} (min / median / max)")
    for name, (number, *spread) in found["captions"].items():
        print(f"  {name}: {number} captions; words {' / '.join(f'{x:g}' for x in spread)}")
    print(f"  {found['distinct captions']} of {found['captions in all']} captions are distinct")


def write_indexes(checked: Checked) -> None:
    """Write one index per folder, unless a shard has a fault."""
    if checked.faults:
        raise UserError("index.json was not written, because some shards have faults")
    for folder in {Path(shard).parent for shard in checked.infos}:
        write_index(folder, [info for shard, info in checked.infos.items() if Path(shard).parent == folder])
        print(f"wrote {folder / 'index.json'}")


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
