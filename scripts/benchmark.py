"""Measure speed and memory, or compare this library with the original LanguageBind code.

    python scripts/benchmark.py NAME --help
    python scripts/benchmark.py model --model vit-l-14 --tuning lora --batch-size 1 8 64 --output model.json

prints a table; --output also writes it as JSON. NAME is one of

    gpu       the next three on one GPU: bash scripts/benchmark_gpu.sh
    model     training steps of an encoder on random data
    loss      the contrastive loss on one of many ranks
    fbank     the filter bank of audio on a device
    scale     what grows with ranks, shards, captions and entries
    loader    batches from shards, and the memory of the loader's processes
    decode    decoding of files to tensors, with every decoder
    compare   training by the original code or by OpenCLIP's trainer and by this library, in turn

`model`, `loss` and `fbank` need only PyTorch. docs/performance.md explains the figures.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = ("gpu", "model", "loss", "fbank", "scale", "loader", "decode", "compare")


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in BENCHMARKS:
        print(__doc__)
        sys.exit(0 if argv in (["-h"], ["--help"]) else 2)
    from scripts.benchmarks.rows import parse, show

    benchmark, options = parse(argv[0], argv[1:])
    show(argv[0], argv, benchmark.measure(options), options.output)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed
    from languagebind.config import run

    run(main)
