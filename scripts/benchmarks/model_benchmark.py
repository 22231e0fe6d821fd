"""Measure training steps of an encoder on random data: forward pass, loss, backward pass and optimizer.

The table has a row per combination of --batch-size, --num-frames, --torchcompile and --inputs. Each row is measured in
its own process.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from languagebind.configs import find
from languagebind.distributed import Precision, close_process, init_process
from languagebind.model import DualEncoder
from languagebind.text import ClipText, ClipTextConfig
from languagebind.timm_tower import TIMM
from languagebind.tuning import TuningConfig, apply_tuning
from languagebind.vit import EncoderConfig
from training.engines import EngineConfig, make_engine
from training.loader import copied_ahead
from training.optim import OptimConfig
from training.train import train_step

from .rows import Row, measure_rows, measure_steps

Shape = tuple[int, int, int, int]
Tuning = Literal["lora", "partial", "full", "head"]
EMBED_DIM = 768
# Dense bfloat16 TFLOP/s from the vendors' data sheets. The first name that the device's name contains is used.
PEAK_TFLOPS = {"H200": 989.4, "H100 PCIe": 756.5, "H100 NVL": 835.5, "H100": 989.4, "B200": 2250.0, "A100": 311.9}


def add_options(add: Callable[..., object]) -> None:
    add("--model", default="vit-l-14", help="a model in configs/model, or timm/NAME (default %(default)s)")
    add("--input-shape", default="3,1,224,224", help="shape C,T,H,W (default %(default)s)")
    add("--num-frames", type=int, nargs="+", help="frames T instead of the shape's, one row per value")
    add("--batch-size", type=int, nargs="+", default=[8], help="samples per step, one row per value")
    add("--temporal-attention", action="store_true", help="attend over frames")
    add("--tuning", choices=get_args(Tuning), default="lora")
    add("--patch-dropout", type=float, default=0.0)
    add("--grad-checkpointing", action="store_true")
    add("--precision", choices=get_args(Precision), default="amp_bf16")
    compiled = ("no", "encoder", "step")
    add("--torchcompile", choices=compiled, nargs="+", default=["no"], help="as in training, one row per value")
    add("--engine", choices=("ddp", "fsdp"), default="ddp", help="as in training, on one rank")
    where = "inputs are on the device, or in pinned memory and copied during the step before (ahead) or in the step"
    add("--inputs", choices=("device", "ahead", "host"), nargs="+", default=["device"], help=where)
    add("--text", choices=("cached", "live"), default="cached", help="features in the batch, or a text tower that runs")
    add("--text-width", type=int, default=768, help="width of the text tower of 12 blocks (default: ViT-L/14's)")
    add("--steps", type=int, default=10, help="timed steps")
    add("--warmup-steps", type=int, default=3, help="steps before the timed ones")
    add("--device", choices=("cuda", "cpu"))
    add("--kernels", type=int, default=0, help="also list as many kernels, by share of a step's time")
    add("--peak-tflops", type=float, help="dense bfloat16 peak of the device, for the MFU (default: as listed)")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    options.input_shape = tuple(map(int, options.input_shape.split(",")))
    options.num_frames = options.num_frames or [options.input_shape[1]]
    chosen = ("temporal_attention", "patch_dropout", "grad_checkpointing")
    options.encoder = EncoderConfig(**read_sizes(options.model), **{name: getattr(options, name) for name in chosen})
    width = options.text_width
    tower = ClipTextConfig(width=width, num_heads=max(1, width // 64), mlp_dim=4 * width)
    options.tower = tower if options.text == "live" else None
    names = ["batch_size", "num_frames", "torchcompile", "inputs"]
    return measure_rows(options, names, measure_row, start_method="forkserver")


def measure_row(options: argparse.Namespace) -> Row:
    """Take training steps in this process, and return their time, memory and FLOPs."""
    device, tower, size = init_process(options.device).device, options.tower, options.batch_size
    shape = (options.input_shape[0], options.num_frames, *options.input_shape[2:])
    flops = recipe_flops(shape, options.encoder, options.tuning, EMBED_DIM, tower)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = options.peak_tflops or next((tflops for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    if options.engine == "fsdp":
        dist.init_process_group("nccl" if gpu else "gloo", rank=0, world_size=1, store=dist.HashStore())
    state = build_state(options, shape, EMBED_DIM)
    inputs, text = torch.randn(size, *shape), {"features": torch.randn(size, EMBED_DIM, device=device)}
    inputs = inputs.to(device) if options.inputs == "device" else inputs.pin_memory() if gpu else inputs
    if tower:
        ids = torch.randint(tower.vocab_size, (size, tower.context_length), device=device)
        text = {"input_ids": ids, "caption": torch.arange(size, device=device)}
    batches: Iterator[Any] = itertools.repeat(HostBatch(inputs=inputs, text=text))
    if options.inputs == "ahead":
        batches = copied_ahead(batches, device)

    def step() -> float:
        batch = next(batches)
        return take_step(state, batch.inputs, batch.text)

    figures = measure_steps(step, device, options.steps, options.warmup_steps)
    rate = size / figures["step_ms"] * 1e3
    row = {
        **{name: getattr(options, name) for name in ("tuning", "precision", "engine", "text", "patch_dropout")},
        "samples_per_second": rate,
        **figures,
        "sample_gflop": flops["step"] / 1e9,
        "forward_gflop": flops["forward"] / 1e9,
        "mfu_percent": rate * flops["step"] / (peak * 1e10) if peak else None,
    }
    if options.kernels:
        row |= list_kernels(step, options.kernels, figures["step_ms"])
    close_process()
    return row


class HostBatch(SimpleNamespace):
    """The part of a `Batch` that `copied_ahead` uses. The class itself needs more packages than PyTorch."""

    def to(self, device: torch.device) -> "HostBatch":
        return HostBatch(inputs=self.inputs.to(device, non_blocking=True), text=self.text)

    def tensors(self) -> list[Tensor]:
        return [self.inputs]


def list_kernels(step: Callable[[], object], count: int, step_ms: float) -> Row:
    """Return the kernels, or on a CPU the operators, that take most of a step's time, and how busy the device was."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        step()
    times = {}
    for event in profiler.key_averages():
        if len(activities) == 1:
            times[event.key] = event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.key] = event.self_device_time_total
    total = sum(times.values())
    longest = sorted(times, key=times.__getitem__, reverse=True)[:count]
    kernels = [{"share_percent": 100 * times[name] / total, "kernel": name[:100]} for name in longest]
    return {"busy_percent": total / step_ms / 10, "kernels": kernels}


def build_state(options: argparse.Namespace, shape: Shape, embed_dim: int) -> Any:
    """Return the part of a `TrainState` that `train_step` uses. The class itself needs more packages than PyTorch."""
    torch.manual_seed(0)
    process = init_process(options.device)
    with torch.device(process.device):  # drawing the weights takes seconds on a CPU
        model = DualEncoder(shape, options.encoder, build_towers(options.tower, embed_dim))
        apply_tuning(model, TuningConfig(tuning=options.tuning))
    optim = OptimConfig(precision=options.precision, lr=1e-5)
    config = EngineConfig(engine=options.engine, torchcompile=options.torchcompile)
    engine = make_engine(model.train(), optim, process, config)
    return SimpleNamespace(engine=engine, ema=None, partner=None, step=0)


def take_step(state: Any, inputs: Tensor, text: dict[str, Tensor]) -> float:
    """Take a training step and return the loss. Reading the loss waits for the device."""
    batch: Any = SimpleNamespace(inputs=inputs, text=text, groups=None, keys=[])
    return train_step(state, [batch], OptimConfig())[0].item()


def read_sizes(name: str) -> dict[str, Any]:
    """Return the sizes of a model in configs/model. Parse without PyYAML, since PyTorch may be the only package."""
    if name.startswith(TIMM):
        return {"timm_model": name.removeprefix(TIMM)}
    lines = find(name, "model").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(": ") for line in lines)
    return {key: int(value) if value.isdecimal() else value for key, value in pairs}


def build_towers(text: ClipTextConfig | None, embed_dim: int) -> tuple[nn.Module, nn.Module, int]:
    """Return the text model, its projection and the width for `DualEncoder`. Without `text`, the batch has features."""
    if text is None:
        return nn.Identity(), nn.Identity(), embed_dim
    return ClipText(text), nn.Linear(text.width, embed_dim, bias=False), embed_dim


def recipe_flops(
    shape: Shape, encoder: EncoderConfig, tuning: Tuning, embed_dim: int, text: ClipTextConfig | None = None
) -> dict[str, int]:
    """Return the FLOPs of a forward pass and of a training step per sample. A multiply-add counts as two.

    A step is 3 forward passes with full tuning (values, gradients of activations and of weights) and 2 with LoRA, whose
    frozen weights need no gradients and whose adapters are small. `partial` and `head` run their backward pass. A text
    tower that runs at each step adds its forward pass. Recomputation is never counted.
    """
    with torch.device("meta"):
        encoder = dataclasses.replace(encoder, grad_checkpointing=False)
        model = DualEncoder(shape, encoder, build_towers(text, embed_dim)).train()
        inputs = torch.empty(1, *shape)
        forward = count(lambda: model.project(inputs))
        if tuning in ("full", "lora"):
            step = forward * {"full": 3, "lora": 2}[tuning]
        else:
            apply_tuning(model, TuningConfig(tuning=tuning))
            step = count(lambda: model.project(inputs).sum().backward())
        if text:
            ids = torch.zeros(1, text.context_length, dtype=torch.long)
            step += count(lambda: model.project_text({"input_ids": ids}))
    return {"forward": forward, "step": step}


def count(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
