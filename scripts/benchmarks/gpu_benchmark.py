"""Measure this library on one GPU in less than eight minutes, what matters most first.

Needs PyTorch, torchvision, transformers, timm and PEFT, and no network. Each part has a time limit. A part that fails
or takes longer is reported, the others continue, and the exit status is 2.
"""

import argparse
import multiprocessing
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from languagebind.config import UserError, first_line

from .rows import Row, parse

SECONDS = 460  # for all parts
# Name, time limit in seconds and command. The limits are at least twice the expected times.
PARTS = (
    ("full", 120, "model --tuning full --batch-size 256 --torchcompile no encoder --kernels 15"),
    ("depth", 80, "model --tuning lora --patch-dropout 0.5 --batch-size 512 --torchcompile no encoder --kernels 15"),
    ("video", 80, "model --tuning lora --patch-dropout 0.3 --num-frames 8 --temporal-attention --batch-size 32 "
     "--torchcompile no encoder --kernels 15"),
    ("huge", 60, "model --model vit-h-14 --tuning full --grad-checkpointing --batch-size 256 --torchcompile encoder"),
    ("pe-core", 90, "model --model timm/vit_pe_core_large_patch14_336 --input-shape 3,1,336,336 --tuning full "
     "--batch-size 128 --torchcompile no encoder"),
    ("batches", 120, "model --tuning full --batch-size 64 128 384 --torchcompile encoder"),
    ("live text", 60, "model --tuning full --batch-size 256 --torchcompile encoder --text live"),
    ("loss", 30, "loss --local-batch 1024 --global-batch 65536 --chunk-size 0 1024"),
    ("filter banks", 40, "fbank --device cpu cuda --rows 256 100000"),
    ("fsdp", 40, "model --tuning full --batch-size 256 --engine fsdp"),
    ("copying", 60, "model --tuning lora --patch-dropout 0.5 --batch-size 512 --inputs ahead host"),
    ("whole step", 150, "model --tuning full --batch-size 256 --torchcompile step"),
)  # fmt: skip
# Options of each benchmark at toy size, on the CPU, without a compiler
TOY = {
    "model": "--input-shape 3,1,32,32 --torchcompile no --batch-size 2 --text-width 16 --steps 1 --warmup-steps 0 "
    "--device cpu --peak-tflops 1",
    "loss": "--local-batch 32 --global-batch 128 --chunk-size 0 --embed-dim 8 --steps 1 --device cpu",
    "fbank": "--device cpu --clips 1 --seconds 1 --rows 256 --steps 1",
}


def add_options(add: Callable[..., object]) -> None:
    add("--toy", action="store_true", help="try all parts at toy size on the CPU, without compiling")
    add("--parts", nargs="+", choices=[name for name, *_ in PARTS], help="only these parts")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of all parts. Raises `UserError` at the end if a part failed."""
    # Processes start as forks of a server that has imported this much. It must not use the GPU.
    modules = ["torch", "scripts.benchmarks.model_benchmark", *(["peft", "timm"] if options.toy else [])]
    multiprocessing.set_forkserver_preload(modules)
    end, failed = time.monotonic() + SECONDS, []
    for name, seconds, command in PARTS:
        if options.parts and name not in options.parts:
            continue
        words = shlex.split(command)
        if options.toy:
            words += shlex.split(TOY[words[0]])
            if words[0] == "model":
                words += ["--model", "timm/vit_pe_core_tiny_patch16_384" if "timm/" in command else "vit-tiny-demo"]
        print(f"\n{name}: benchmark.py {shlex.join(words)}", flush=True)
        for row in limited(words, max(0, min(seconds, end - time.monotonic()))):
            failed += [name] if "error" in row else []
            yield {"part": name, **row}
    if failed:
        raise UserError(f"not all could be measured: {', '.join(dict.fromkeys(failed))}")


def limited(words: list[str], seconds: float) -> Iterator[Row]:
    """Yield the rows of a benchmark. If it fails or takes longer than so many seconds, the last row has the error."""
    try:
        benchmark, options = parse(words[0], words[1:])
        options.limit = seconds
        yield from benchmark.measure(options)
    except Exception as error:  # reported, so that the other parts continue
        traceback.print_exc(file=sys.stderr)
        yield {"error": first_line(error)}
