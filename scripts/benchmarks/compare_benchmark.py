"""Compare training with the original LanguageBind code, or with OpenCLIP's trainer.

--with original, the default: training steps of both on the same random weights and batch.

The recipe is LoRA training with a frozen text tower, as in the original. Each side pads captions as its tokenizer does:
the original to 77 tokens, ours to the longest caption. First, the losses and gradients of both sides are compared
without patch dropout. Then the variants take turns in new processes. The figures are medians over the rounds.

--with open_clip: whole trainings by OpenCLIP's trainer and by ours, live and with cached text, on the same shards,
model, batch and precision; see trainers.py. Memory is the largest sum of all processes' proportional set sizes (PSS).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from languagebind.config import UserError

from . import trainers
from .rows import Row
from .trainers import ROOT

VARIANTS: dict[str, Row] = {
    "original": {"side": "original"},
    "ours": {"side": "ours", "precision": "fp32", "cached_text": False},
    "ours, amp_bf16, cached text": {"side": "ours", "precision": "amp_bf16", "cached_text": True},
}
RATIOS = {"step_ratio": "step_ms", "step_cpu_ratio": "step_cpu_ms", "memory_ratio": "above_start_mib"}
TOLERANCE = 1e-3  # in float32: absolute for the loss, relative to the norm for a gradient
SIZES = {
    "width": 384, "depth": 12, "num_heads": 6, "patch_size": 14, "num_frames": 8, "image_size": 224, "text_width": 512,
    "text_depth": 12, "embed_dim": 512, "rounds": 3, "steps": 3, "warmup_steps": 1,
}  # fmt: skip


def add_options(add: Callable[..., object]) -> None:
    add("--with", dest="other", choices=("original", "open_clip"), default="original")
    python = ROOT / ".venv-original/bin/python"
    add("--original-python", type=Path, default=python, help="Python interpreter from scripts/setup_original.sh")
    add("--case", choices=("video", "audio"), default="video")
    for name, default in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, default=default, help="(default %(default)s)")
    add("--batch-size", type=int, help="(default 4; with open_clip 64)")
    add("--patch-dropout", type=float, default=0.5)
    add("--original-attention", choices=("eager", "sdpa"), default="eager", help="(default %(default)s)")
    trainers.add_options(add)


def measure(options: argparse.Namespace) -> list[Row]:
    """Return the figures of each variant, and their ratios to the original's figures."""
    open_clip = options.other == "open_clip"
    options.batch_size = options.batch_size or (64 if open_clip else 4)
    if open_clip:
        return trainers.measure(options)
    if not options.original_python.is_file():
        raise UserError(f"there is no interpreter at {options.original_python}; run scripts/setup_original.sh")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = {"case": options.case, **compare_gradients(options, folder)}
        found = [{name: call(options, folder, "measure", name) for name in VARIANTS} for _ in range(options.rounds)]
    rows: list[Row] = []
    for variant in VARIANTS:
        rounds = [each[variant] for each in found]
        row = {key: statistics.median(each[key] for each in rounds) for key in RATIOS.values()}
        base = rows[0] if rows else row
        ratios = {name: row[key] / base[key] for name, key in RATIOS.items()}
        rows.append({"variant": variant, **row, **ratios, "about": about, "rounds": rounds})
    return rows


def compare_gradients(options: argparse.Namespace, folder: Path) -> Row:
    """Return the difference of the losses, and the largest difference of a gradient relative to its norm."""
    losses = [call(options, folder, "check", side)["loss"] for side in ("original", "ours")]
    theirs, ours = (torch.load(folder / f"{side}.gradients.pt") for side in ("original", "ours"))
    if theirs.keys() != ours.keys():
        raise UserError(f"only one side has gradients of {', '.join(sorted(theirs.keys() ^ ours.keys())[:5])}")
    # The gradients of key biases are zero except for rounding errors, so the relative difference needs a minimum norm.
    least = 1e-6 * max(gradient.norm().item() for gradient in theirs.values())
    differences = [((ours[key] - theirs[key]).norm() / (theirs[key].norm() + least)).item() for key in theirs]
    found = {"loss_difference": abs(losses[0] - losses[1]), "gradient_difference": max(differences)}
    if max(found.values()) > TOLERANCE:
        raise UserError(f"the original and this library do not compute the same: {found}")
    return found


def call(options: argparse.Namespace, folder: Path, action: str, variant: str) -> Row:
    """Run `compare_worker.py` in the variant's interpreter, and return the JSON in its last line of output."""
    print(f"{action}: {variant}", file=sys.stderr)
    case = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    clip = (3, options.num_frames, options.image_size, options.image_size)
    case |= {"input_shape": clip if options.case == "video" else (3, 1, 112, 1036), **VARIANTS[variant]}
    case |= {"text_num_heads": max(1, options.text_width // 64)} | ({"patch_dropout": 0.0} if action == "check" else {})
    original = variant == "original"
    python = options.original_python.absolute() if original else sys.executable
    environment = {**os.environ, "PYTHONPATH": "" if original else str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [str(python), str(Path(__file__).with_name("compare_worker.py")), action, json.dumps(case)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{variant}, {action}:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
