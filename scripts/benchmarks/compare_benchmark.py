"""The original's package and this library on the same random weights, batch and recipe, in turn.

LoRA training with a frozen text tower, as in the original's recipes. Captions are as each side's tokenizer gives them:
the original pads to 77 tokens, ours cuts after the longest. Three variants: the original in float32; ours in float32
with the text tower at each step; ours in bfloat16 with text features computed beforehand. Losses and gradients of both
sides are compared first, without patch dropout. Then each measurement runs in a process of its own, and the variants
take turns; the figures are medians over the rounds.
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
from languagebind.model import DualEncoder
from languagebind.text import ClipTextConfig
from languagebind.tuning import TuningConfig, apply_tuning
from languagebind.vit import EncoderConfig

from .flops import build_towers
from .report import Row, progress

ROOT = Path(__file__).resolve().parent.parent.parent
VARIANTS = {
    "original": ["original"],
    "ours": ["ours"],
    "ours, amp_bf16, cached text": ["ours", "--precision=amp_bf16", "--cached-text"],
}
RATIOS = {
    "step_ratio": "step_seconds",
    "step_cpu_ratio": "step_cpu_seconds",
    "memory_ratio": "above_model_bytes",
    "load_ratio": "load_seconds",
    "embedding_cpu_ratio": "embeddings_per_cpu_second",
}
TOLERANCE = 1e-3  # for losses, and for gradients as a share of their norm, in float32
SIZES = {
    "width": 384, "depth": 12, "num_heads": 6, "patch_size": 14, "num_frames": 8, "image_size": 224, "text_width": 512,
    "text_depth": 12, "embed_dim": 512, "lora_rank": 16, "batch_size": 4, "rounds": 3, "steps": 3, "warmup_steps": 1,
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("--original-python", type=Path, required=True, help="the interpreter that scripts/setup_original.sh made")
    add("--case", choices=("video", "audio"), default="video")
    for name, default in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, default=default, help="default %(default)s")
    add("--patch-dropout", type=float, default=0.5)
    add("--original-attention", choices=("eager", "sdpa"), default="eager", help="eager is what it was written for")
    add("--threads", type=int, help="threads of each process")


def measure(options: argparse.Namespace) -> list[Row]:
    """Return the figures of each variant and their ratios to the original's.

    Raises:
        UserError: one side cannot run, or the two do not compute the same.
    """
    if not options.original_python.is_file():
        raise UserError(f"no interpreter at {options.original_python}: run scripts/setup_original.sh to make one")
    with tempfile.TemporaryDirectory() as name:
        folder, case = Path(name), make_case(options)
        (folder / "case.json").write_text(json.dumps(case))
        trained = [name for name, value in build_model(case, False).named_parameters() if value.requires_grad]
        (folder / "trained.json").write_text(json.dumps(trained))
        call(options, folder, "prepare", VARIANTS["original"])
        about = {"case": options.case, **compare_gradients(options, folder)}
        progress(str(about))
        rounds: dict[str, list[Row]] = {variant: [] for variant in VARIANTS}
        for number in range(options.rounds):
            for variant, flags in VARIANTS.items():
                rounds[variant].append(call(options, folder, "measure", flags))
                progress(f"round {number + 1} of {options.rounds}: {variant}")
    rows: list[Row] = []
    for variant, found in rounds.items():
        row = {key: statistics.median(each[key] for each in found) for key in RATIOS.values()}
        base = rows[0] if rows else row
        ratios = {name: row[key] / base[key] for name, key in RATIOS.items()}
        rows.append({"variant": variant, **row, **ratios, "about": about, "rounds": found})
    return rows


def make_case(options: argparse.Namespace) -> Row:
    """Return sizes and recipe for both sides; the two configs are in the original's terms."""
    own = {"image_size": options.image_size, "num_frames": options.num_frames, "add_time_attn": True}
    shape = [3, options.num_frames, options.image_size, options.image_size]
    if options.case == "audio":
        own, shape = {"num_mel_bins": 112, "target_length": 1036, "image_size": 224}, [3, 1, 112, 1036]
    text = {"width": options.text_width, "depth": options.text_depth, "num_heads": max(1, options.text_width // 64)}

    def config(width: int, depth: int, num_heads: int, **more: object) -> Row:
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": num_heads}
        return {**sizes, "intermediate_size": 4 * width, "hidden_act": "gelu", "attention_dropout": 0.0, **more}

    vision = config(
        options.width, options.depth, options.num_heads, patch_size=options.patch_size, lora_r=options.lora_rank,
        lora_alpha=16, lora_dropout=0.0, force_patch_dropout=options.patch_dropout, **own,
    )  # fmt: skip
    about = {"modality": options.case, "input_shape": shape, "text": text}
    given = {key: value for key, value in vars(options).items() if key not in ("original_python", "output")}
    return given | about | {"text_config": config(**text), "vision_config": vision}


def build_model(case: Row, patch_dropout: bool) -> DualEncoder:
    """Return this library's model of a case, with its adapters."""
    sizes = {key: case[key] for key in ("patch_size", "width", "depth", "num_heads")}
    shape, text = tuple(case["input_shape"]), ClipTextConfig(**case["text"], mlp_dim=4 * case["text"]["width"])
    share = case["patch_dropout"] if patch_dropout else 0.0
    encoder = EncoderConfig(**sizes, mlp_dim=4 * case["width"], temporal_attention=shape[1] > 1, patch_dropout=share)
    model = DualEncoder(shape, encoder, build_towers(text, case["embed_dim"]))
    apply_tuning(model, TuningConfig(tuning="lora", lora_rank=case["lora_rank"], lora_alpha=16))
    return model


def compare_gradients(options: argparse.Namespace, folder: Path) -> Row:
    """Return the difference of the losses, and the largest of a gradient as a share of its norm.

    Raises:
        UserError: they differ by more than `TOLERANCE`.
    """
    losses = [call(options, folder, "check", [side])["loss"] for side in ("original", "ours")]
    theirs, ours = (torch.load(folder / f"{side}.gradients.pt") for side in ("original", "ours"))
    if theirs.keys() != ours.keys():
        raise UserError(f"only one side has gradients of {', '.join(sorted(theirs.keys() ^ ours.keys())[:5])}")
    # Gradients that should vanish (of a key's bias) are rounding errors on both sides, so the largest sets the scale.
    least = 1e-6 * max(gradient.norm().item() for gradient in theirs.values())
    differences = [((ours[key] - theirs[key]).norm() / (theirs[key].norm() + least)).item() for key in theirs]
    found = {"loss_difference": abs(losses[0] - losses[1]), "gradient_difference": max(differences)}
    if max(found.values()) > TOLERANCE:
        raise UserError(f"the two sides do not compute the same: {found}")
    return found


def call(options: argparse.Namespace, folder: Path, action: str, flags: list[str]) -> Row:
    """Run the worker; return what it prints last.

    Raises:
        UserError: the worker failed.
    """
    original = flags[0] == "original"
    python = options.original_python if original else sys.executable
    environment = {**os.environ, "PYTHONPATH": "" if original else str(ROOT), "HF_HUB_OFFLINE": "1"}
    worker = Path(__file__).with_name("compare_worker.py")
    command = [str(python), str(worker), flags[0], action, str(folder), *flags[1:]]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{flags[0]}, {action}:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
