"""Training steps of an encoder on random data: forward, loss, backward and optimizer, as in training.

One table row for each combination of --batch-size and --num-frames, each measured in a process of its own.
"""

import argparse
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch

from languagebind.config import UserError
from languagebind.distributed import Precision, init_process
from languagebind.model import DualEncoder
from languagebind.text import ClipTextConfig
from languagebind.tuning import TuningConfig, apply_tuning
from languagebind.vit import EncoderConfig
from training.engines.base import Engine, EngineConfig
from training.optim import OptimConfig
from training.train import train_step

from .flops import build_towers, peak_flops, recipe_flops
from .peak_memory import PeakMemory
from .report import Row, measure_rows, spread

MODELS = Path(__file__).resolve().parent.parent.parent / "configs" / "model"
SIZES = ("patch_size", "width", "depth", "num_heads", "mlp_dim")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("--model", default="vit-l-14", help="a file of sizes in configs/model (default %(default)s)")
    for size in SIZES:
        add(f"--{size.replace('_', '-')}", type=int, help="replaces the model's")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--input-shape", default="3,1,224,224", help="C,T,H,W (default %(default)s)")
    shape.add_argument("--modality", help="use this modality's shape")
    add("--num-frames", type=int, nargs="+", help="T of the shape; one table row each")
    add("--batch-size", type=int, nargs="+", default=[8], help="one table row each")
    add("--temporal-attention", action="store_true", help="attend over frames")
    add("--tuning", choices=("lora", "partial", "full", "head"), default="lora")
    add("--lora-rank", type=int, default=16)
    add("--patch-dropout", type=float, default=0.0)
    add("--grad-checkpointing", action="store_true")
    add("--precision", choices=get_args(Precision), default="amp_bf16")
    add("--torchcompile", choices=("no", "encoder", "step"), default="no", help="as in training")
    add("--text", choices=("cached", "live"), default="cached", help="features with the batch, or a tower that runs")
    add("--text-width", type=int, default=768)
    add("--text-depth", type=int, default=12)
    add("--text-heads", type=int, default=12)
    add("--embed-dim", type=int, default=768, help="size of the shared space")
    add("--steps", type=int, default=10, help="timed steps")
    add("--warmup-steps", type=int, default=3, help="steps before the timed ones")
    add("--device", choices=("cuda", "cpu"))
    add("--threads", type=int, help="threads of the CPU")
    add("--peak-tflops", type=float, help="of the device, dense bfloat16, for the MFU")


def measure(options: argparse.Namespace) -> list[Row]:
    """Measure a row for each batch size and number of frames."""
    if options.modality:
        from languagebind.modalities import modality_class  # needs more packages than PyTorch

        options.input_shape = modality_class(options.modality)().input_shape
    else:
        options.input_shape = tuple(map(int, options.input_shape.split(",")))
    options.num_frames = options.num_frames or [options.input_shape[1]]
    sizes = read_sizes(options.model) | {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    options.encoder = EncoderConfig(
        **sizes,
        temporal_attention=options.temporal_attention,
        patch_dropout=options.patch_dropout,
        grad_checkpointing=options.grad_checkpointing,
    )
    width, depth, heads = options.text_width, options.text_depth, options.text_heads
    live = options.text == "live"
    options.tower = ClipTextConfig(width=width, depth=depth, num_heads=heads, mlp_dim=4 * width) if live else None
    return measure_rows(options, ["batch_size", "num_frames"], measure_row)


def measure_row(options: argparse.Namespace) -> Row:
    """Take the steps of one row in this process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = init_process(options.device).device
    channels, _, *size = options.input_shape
    shape = (channels, options.num_frames, *size)
    dtype = torch.float32 if options.precision == "fp32" and device.type == "cpu" else torch.bfloat16
    flops = recipe_flops(shape, options.encoder, options.tuning, options.embed_dim, options.tower)
    peak = 1e12 * options.peak_tflops if options.peak_tflops else peak_flops(device, dtype)
    optim = OptimConfig(precision=options.precision, lr=1e-5)
    state, batch = build_state(options, shape, optim), random_batch(options, shape, device)
    memory, times = PeakMemory(device), []
    for _ in range(options.warmup_steps + options.steps):
        begin = time.perf_counter()
        train_step(state, [batch], optim).item()  # waits for the device
        times.append(time.perf_counter() - begin)
    times, peak_bytes = times[options.warmup_steps :], memory.peak()
    rate = options.batch_size / statistics.median(times)
    return {
        **{name: getattr(options, name) for name in ("tuning", "precision", "text", "patch_dropout")},
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


def build_state(options: argparse.Namespace, shape: tuple[int, int, int, int], optim: OptimConfig) -> Any:
    """Return what `train_step` uses of a `TrainState`, whose own import needs more than PyTorch."""
    torch.manual_seed(0)
    model = DualEncoder(shape, options.encoder, build_towers(options.tower, options.embed_dim))
    apply_tuning(model, TuningConfig(tuning=options.tuning, lora_rank=options.lora_rank))
    compiled = EngineConfig(torchcompile=options.torchcompile)
    engine = Engine(model.train(), optim, init_process(options.device), compiled)
    return SimpleNamespace(engine=engine, ema=None, step=0)


def random_batch(options: argparse.Namespace, shape: tuple[int, int, int, int], device: torch.device) -> Any:
    """Return what `train_step` uses of a `Batch`, on the device."""
    batch_size, tower = options.batch_size, options.tower
    text = {"features": torch.randn(batch_size, options.embed_dim, device=device)}
    if tower:
        ids = torch.randint(tower.vocab_size, (batch_size, tower.context_length), device=device)
        text = {"input_ids": ids, "caption": torch.arange(batch_size, device=device)}
    inputs = torch.randn(batch_size, *shape, device=device)
    return SimpleNamespace(inputs=inputs, text=text, groups=None, keys=[])


def read_sizes(name: str) -> dict[str, int | str]:
    """Read the `key: value` lines of configs/model/NAME.yaml without PyYAML, since PyTorch may be the only package.

    Raises:
        UserError: there is no such model.
    """
    path = MODELS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no model {name!r} in configs/model: {', '.join(sorted(p.stem for p in MODELS.glob('*')))}")
    kinds = get_type_hints(EncoderConfig)
    pairs = (line.split(": ") for line in path.read_text(encoding="utf-8").splitlines())
    return {key: int(value) if kinds[key] is int else value for key, value in pairs}
