"""Training steps of an encoder on random data: forward, loss, backward, optimizer, as training takes them.

A row for each of --batch-size x --num-frames. Each is measured in a process of its own.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import torch

from languagebind.config import UserError
from languagebind.distributed import Precision, init_process
from languagebind.model import DualEncoder
from languagebind.text import ClipTextConfig
from languagebind.tuning import TuningConfig, apply_tuning
from languagebind.vit import EncoderConfig
from training.engines.base import Engine, EngineConfig
from training.optim import OptimConfig
from training.train import StepOptions, train_step

from .flops import build_towers, peak_flops, recipe_flops
from .memory import PeakMemory, in_fresh_process
from .report import Row, progress, spread

MODELS = Path(__file__).resolve().parent.parent.parent / "configs" / "model"
SIZES = ("patch_size", "width", "depth", "num_heads", "mlp_dim")


@dataclasses.dataclass(frozen=True)
class Case:
    """What one row measures."""

    input_shape: tuple[int, int, int, int]
    encoder: EncoderConfig
    text: ClipTextConfig | None
    embed_dim: int
    tuning: TuningConfig
    precision: str
    batch_size: int
    steps: int
    warmup_steps: int
    torchcompile: str
    device: str | None
    peak_tflops: float | None
    threads: int | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--model", default="vit-l-14", help="a file of sizes in configs/model (default %(default)s)")
    for size in SIZES:
        add(f"--{size.replace('_', '-')}", type=int, help="in place of the model's")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--input-shape", type=_shape, default=(3, 1, 224, 224), help="C,T,H,W (default 3,1,224,224)")
    shape.add_argument("--modality", help="take the shape of this modality")
    add("--num-frames", type=int, nargs="+", help="T of the shape, a row each")
    add("--batch-size", type=int, nargs="+", default=[8], help="a row each")
    add("--temporal-attention", action="store_true", help="attend over frames")
    add("--tuning", choices=("lora", "partial", "full", "head"), default="lora")
    add("--lora-rank", type=int, default=16)
    add("--patch-dropout", type=float, default=0.0)
    add("--grad-checkpointing", action="store_true")
    add("--precision", choices=get_args(Precision), default="amp_bf16")
    add("--torchcompile", choices=("no", "encoder", "step"), default="no", help="as in training")
    add("--text", choices=("cached", "live"), default="cached", help="features come with the batch, or a tower runs")
    add("--text-width", type=int, default=768)
    add("--text-depth", type=int, default=12)
    add("--text-heads", type=int, default=12)
    add("--embed-dim", type=int, default=768, help="size of the shared space")
    add("--steps", type=int, default=10, help="those that are timed")
    add("--warmup-steps", type=int, default=3, help="those before them")
    add("--device", choices=("cuda", "cpu"))
    add("--threads", type=int, help="of the CPU")
    add("--peak-tflops", type=float, help="of the device, dense, for the share that is used (MFU)")


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each batch size and number of frames.

    Raises:
        UserError: sizes that cannot be, an unknown model or modality, or LoRA without PEFT.
    """
    if options.steps < 1 or options.warmup_steps < 0:
        raise UserError("--steps should be at least 1, --warmup-steps at least 0")
    shape = options.input_shape if options.modality is None else modality_shape(options.modality)
    frames = options.num_frames or [shape[1]]
    rows = []
    for batch_size, num_frames in itertools.product(options.batch_size, frames):
        case = make_case(options, (shape[0], num_frames, *shape[2:]), batch_size)
        progress(f"batch size {batch_size}, {num_frames} frames")
        row = {"batch_size": batch_size, "num_frames": num_frames, "tuning": options.tuning}
        row |= {"precision": options.precision, "text": options.text, "patch_dropout": options.patch_dropout}
        rows.append(row | in_fresh_process(measure_case, case))
    return rows


def make_case(options: argparse.Namespace, shape: tuple[int, int, int, int], batch_size: int) -> Case:
    """The options of one row."""
    if min(*shape, batch_size) < 1:
        raise UserError(f"batch size {batch_size} and input shape {shape} should be positive")
    sizes = read_sizes(options.model) | {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    encoder = EncoderConfig(
        **sizes,
        temporal_attention=options.temporal_attention,
        patch_dropout=options.patch_dropout,
        grad_checkpointing=options.grad_checkpointing,
    )
    text = None
    if options.text == "live":
        text = ClipTextConfig(
            width=options.text_width,
            depth=options.text_depth,
            num_heads=options.text_heads,
            mlp_dim=4 * options.text_width,
        )
    tuning = TuningConfig(tuning=options.tuning, lora_rank=options.lora_rank)
    made = {"input_shape": shape, "encoder": encoder, "text": text, "tuning": tuning, "batch_size": batch_size}
    names = [field.name for field in dataclasses.fields(Case) if field.name not in made]
    return Case(**made, **{name: getattr(options, name) for name in names})


def measure_case(case: Case) -> Row:
    """Take the steps of one row, in this process."""
    if case.threads:
        torch.set_num_threads(case.threads)
    device = init_process(case.device).device
    dtype = torch.float32 if case.precision == "fp32" and device.type == "cpu" else torch.bfloat16
    flops = recipe_flops(case.input_shape, case.encoder, case.tuning.tuning, case.embed_dim, case.text)
    peak = peak_flops(device, dtype, case.peak_tflops)
    state, batch = build_state(case), random_batch(case, device)
    step = StepOptions(lambda step: 1.0, case.precision, 1, "clip", 1, 1, 1, 1.0)
    memory, times = PeakMemory(device), []
    for number in range(case.warmup_steps + case.steps):
        _synchronize(device)
        begin = time.perf_counter()
        train_step(state, [batch], step, device)
        _synchronize(device)
        if number >= case.warmup_steps:
            times.append(time.perf_counter() - begin)
    rate, peak_bytes = case.batch_size / statistics.median(times), memory.peak()
    return {
        "samples_per_second": rate,
        "step_ms": statistics.median(times) * 1e3,
        "step_spread_share": spread(times),
        "sample_flops": flops["step"],
        "forward_flops": flops["forward"],
        "mfu_share": rate * flops["step"] / peak,
        "peak_tflops": peak / 1e12,
        "model_bytes": memory.before,
        "peak_bytes": peak_bytes,
        "above_model_bytes": peak_bytes - memory.before,
    }


def build_state(case: Case) -> SimpleNamespace:
    """What `train_step` reads of a run: a model of random weights under the engine of one process."""
    torch.manual_seed(0)
    model = DualEncoder(case.input_shape, case.encoder, build_towers(case.text, case.embed_dim))
    apply_tuning(model, case.tuning)
    optim = OptimConfig(precision=case.precision, lr=1e-5)
    engine = Engine(model.train(), optim, init_process(case.device), EngineConfig(torchcompile=case.torchcompile))
    return SimpleNamespace(engine=engine, ema=None, step=0)


def random_batch(case: Case, device: torch.device) -> SimpleNamespace:
    """What `train_step` reads of a batch, on the device already."""
    if case.text is None:
        text = {"features": torch.randn(case.batch_size, case.embed_dim, device=device)}
    else:
        ids = torch.randint(case.text.vocab_size, (case.batch_size, case.text.context_length), device=device)
        text = {"input_ids": ids, "caption": torch.arange(case.batch_size, device=device)}
    inputs = torch.randn(case.batch_size, *case.input_shape, device=device)
    return SimpleNamespace(inputs=inputs, text=text, groups=None, keys=[])


def read_sizes(name: str) -> dict[str, int | str]:
    """The `key: value` lines of configs/model/NAME.yaml; read by hand, since a machine may have PyTorch alone.

    Raises:
        UserError: there is no such model.
    """
    path = MODELS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"no model {name!r} in configs/model: {', '.join(sorted(p.stem for p in MODELS.glob('*.yaml')))}"
        )
    kinds = get_type_hints(EncoderConfig)
    pairs = (line.split(": ") for line in path.read_text(encoding="utf-8").splitlines())
    return {key: int(value) if kinds[key] is int else value for key, value in pairs}


def modality_shape(name: str) -> tuple[int, int, int, int]:
    """(C, T, H, W) of a modality with its default options.

    Raises:
        UserError: there is none of this name, or what it decodes with is not installed.
    """
    try:
        from languagebind.modalities import modality_class

        return modality_class(name)().input_shape
    except ValueError as error:
        raise UserError(str(error)) from error
    except ImportError as error:
        raise UserError(f"--modality {name} needs more than PyTorch ({error}): give --input-shape C,T,H,W") from error


def _shape(text: str) -> tuple[int, int, int, int]:
    numbers = tuple(map(int, text.split(",")))
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError("give C,T,H,W, as 3,1,224,224")
    return numbers


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
