"""The original's package and this library on the same random weights, batch and recipe, in turn.

LoRA training with the text tower frozen, as the original's recipes do; captions as each side's tokenizer gives them,
padded to 77 tokens by the original's, cut after the longest by ours. Three variants: the original in float32; ours in
float32 with the text tower at each step; ours in bfloat16 with the features of the captions computed beforehand.
Each measurement is a process of its own, A B C A B C ...; the figures are medians over the rounds. Losses and gradients
of both sides are compared first, without patch dropout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from languagebind.config import UserError

from .report import Row, progress

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = Path(__file__).with_name("compare_worker.py")
VARIANTS = {
    "original": ("original",),
    "ours": ("ours",),
    "ours, amp_bf16, cached text": ("ours", "--precision=amp_bf16", "--cached-text"),
}
FIGURES = (
    "step_seconds", "step_cpu_seconds", "above_model_bytes", "load_seconds", "import_seconds", "embeddings_per_second",
    "embeddings_per_cpu_second",
)  # fmt: skip
TOLERANCE = 1e-3  # of a gradient's norm, in float32


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--original-python", type=Path, required=True, help="interpreter that scripts/setup_original.sh made")
    add("--case", choices=("video", "audio"), default="video")
    add("--width", type=int, default=384)
    add("--depth", type=int, default=12)
    add("--num-heads", type=int, default=6)
    add("--patch-size", type=int, default=14)
    add("--num-frames", type=int, default=8, help="of a clip")
    add("--image-size", type=int, default=224, help="of a clip")
    add("--text-width", type=int, default=512)
    add("--text-depth", type=int, default=12)
    add("--embed-dim", type=int, default=512)
    add("--lora-rank", type=int, default=16)
    add("--patch-dropout", type=float, default=0.5)
    add("--batch-size", type=int, default=4)
    add("--rounds", type=int, default=3, help="processes for each variant")
    add("--steps", type=int, default=3, help="timed in each process")
    add("--warmup-steps", type=int, default=1)
    add(
        "--original-attention", choices=("eager", "sdpa"), default="eager",
        help="eager: as in the transformers that it was written for; sdpa: PyTorch's fused kernel",
    )  # fmt: skip
    add("--threads", type=int, help="of each process")
    add("--profile", action="store_true", help="also print where the time of one step goes")


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each variant, and its ratios to the original.

    Raises:
        UserError: one side cannot run, or the two do not compute the same.
    """
    if not options.original_python.is_file():
        raise UserError(f"no interpreter at {options.original_python}: scripts/setup_original.sh makes one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = make_case(options)
        (folder / "case.json").write_text(json.dumps(case))
        for side in ("original", "ours"):
            call(options, folder, "prepare", VARIANTS[side])
        agreement = compare_gradients(options, folder)
        progress(", ".join(f"{key} {value:.2g}" for key, value in agreement.items()))
        if options.profile:
            for variant, flags in VARIANTS.items():
                progress(f"{variant}\n{call(options, folder, 'profile', flags)['table']}")
        rounds = {variant: [] for variant in VARIANTS}
        for number in range(options.rounds):
            for variant, flags in VARIANTS.items():
                rounds[variant].append(call(options, folder, "measure", flags))
                seconds = rounds[variant][-1]["step_seconds"]
                progress(f"round {number + 1} of {options.rounds}: {variant} {seconds:.2f} s a step")
    return summarise(rounds, {"case": options.case, "original_attention": options.original_attention, **agreement})


def make_case(options: argparse.Namespace) -> Row:
    """Sizes and recipe, for both sides. Raises `UserError` where they cannot be."""
    same = ("width", "depth", "num_heads", "patch_size", "embed_dim", "lora_rank", "patch_dropout", "batch_size")
    if min(options.rounds, options.steps, options.batch_size) < 1:
        raise UserError("--rounds, --steps and --batch-size should be at least 1")
    if options.case == "video":
        shape = [3, options.num_frames, options.image_size, options.image_size]
        own = {"image_size": options.image_size, "num_frames": options.num_frames, "add_time_attn": True}
    else:
        shape, own = [3, 1, 112, 1036], {"num_mel_bins": 112, "target_length": 1036, "image_size": 224}
    heads = max(1, options.text_width // 64)
    return {
        "modality": options.case,
        "input_shape": shape,
        "original": own,
        "mlp_dim": 4 * options.width,
        "text": {"width": options.text_width, "depth": options.text_depth, "num_heads": heads},
        **{key: getattr(options, key) for key in (*same, "original_attention", "threads", "steps", "warmup_steps")},
    }


def compare_gradients(options: argparse.Namespace, folder: Path) -> Row:
    """The difference of losses, and the largest of a gradient as a share of its norm.

    Raises:
        UserError: they are not the same.
    """
    losses = {side: call(options, folder, "check", VARIANTS[side])["loss"] for side in ("original", "ours")}
    theirs = torch.load(folder / "Original.gradients.pt")
    ours = torch.load(folder / "Ours.gradients.pt")
    if theirs.keys() != ours.keys():
        raise UserError(f"gradients of one side alone: {', '.join(sorted(theirs.keys() ^ ours.keys())[:5])}")
    scale = max(gradient.norm().item() for gradient in theirs.values())
    # Gradients that should vanish (of a key's bias) are rounding errors on both sides: weighed against the largest.
    difference = {
        key: ((ours[key] - theirs[key]).norm() / (theirs[key].norm() + 1e-6 * scale)).item() for key in theirs
    }
    worst = max(difference, key=difference.get)
    found = {
        "loss_difference": abs(losses["ours"] - losses["original"]),
        "gradient_difference": difference[worst],
    }
    if max(found.values()) > TOLERANCE:
        raise UserError(f"the two sides differ: losses {losses}, gradient of {worst} by {difference[worst]:.2g}")
    return found


def call(options: argparse.Namespace, folder: Path, action: str, flags: tuple[str, ...]) -> Row:
    """Run the worker; what it prints last.

    Raises:
        UserError: it failed.
    """
    original = flags[0] == "original"
    python = options.original_python if original else sys.executable
    environment = {**os.environ, "PYTHONPATH": "" if original else str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [str(python), str(WORKER), flags[0], action, str(folder), *flags[1:]]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{flags[0]}, {action}:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarise(rounds: dict[str, list[Row]], about: Row) -> list[Row]:
    """Medians of each variant, ratios to the original, and in the JSON file every round."""
    medians = {
        variant: {key: statistics.median(found[key] for found in each) for key in FIGURES}
        for variant, each in rounds.items()
    }
    base, rows = medians["original"], []
    for variant, found in medians.items():
        ratios = {
            name: found[key] / base[key]
            for name, key in {
                "step_ratio": "step_seconds",
                "step_cpu_ratio": "step_cpu_seconds",
                "memory_ratio": "above_model_bytes",
                "load_ratio": "load_seconds",
                "embedding_cpu_ratio": "embeddings_per_cpu_second",
            }.items()
        }
        rows.append({"variant": variant, **found, **ratios, "about": about, "rounds": rounds[variant]})
    return rows
