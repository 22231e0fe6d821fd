"""Make webdataset shards from VIDAL's annotation, a table, JSON lines or class folders.

    python scripts/make_shards.py vidal --annotation vidal.json --root /data/vidal --modality depth --output shards/
    python scripts/make_shards.py csv --manifest m.csv --root DIR --modality audio --output shards/
    python scripts/make_shards.py jsonl --manifest m.jsonl --root DIR --modality depth infrared --output shards/
    python scripts/make_shards.py folder --root DIR --modality depth --output shards/

`--frames 8` stores a video as eight pictures, which are much faster to read.
Run the command again to resume a stopped run. `SOURCE --help` lists the options.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Any

from languagebind.config import UserError, expand_config, parse, run, to_dict
from languagebind.data.making import MakeOptions, make_shards
from languagebind.data.packing import has_frames
from languagebind.data.sources import SOURCES
from languagebind.modalities import modality_class


def main(argv: Sequence[str] | None = None) -> None:
    """Make shards with the options of the command line, and print a report."""
    argv = list(sys.argv[1:] if argv is None else argv)
    kind, argv = (argv[0], argv[1:]) if argv else ("", [])
    if kind in ("-h", "--help"):
        print(__doc__)
        return
    if kind not in SOURCES:
        raise UserError(f"the first argument should be one of {', '.join(SOURCES)}, got {kind!r}")
    fields = [("source", SOURCES[kind]), ("making", MakeOptions)]
    config: Any = parse(dataclasses.make_dataclass("Options", fields), expand_config(argv), f"make_shards.py {kind}")
    kinds = [modality_class(name) for name in config.source.modality]
    if config.making.packing.frames and not any(map(has_frames, kinds)):
        raise UserError("--frames needs a modality with frames, such as video")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print_report(make_shards(config.source.samples(), {"kind": kind, **to_dict(config.source)}, config.making))


def print_report(report: dict[str, Any]) -> None:
    """Print the number of packed samples, and the samples left out with the reasons."""
    made = f"{report['samples']} samples in {report['shards']} shards, {report['bytes'] / 1e6:.1f} MB"
    print(f"{made}; {sum(reason['count'] for reason in report['left_out'].values())} left out")
    for name, reason in report["left_out"].items():
        print(f"  {name}: {reason['count']}")
        for example in reason["examples"]:
            print(f"    {example['id']}: {example['detail']}")
    if not report["samples"]:
        raise UserError("no sample was packed; check --root and --modality")


if __name__ == "__main__":
    run(main)
