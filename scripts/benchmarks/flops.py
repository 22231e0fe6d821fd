"""The floating point operations that training needs, and those that a device can do."""

import dataclasses
import time
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from languagebind.config import UserError
from languagebind.model import DualEncoder
from languagebind.text import ClipText, ClipTextConfig
from languagebind.tuning import TuningConfig, apply_tuning
from languagebind.vit import EncoderConfig

# Dense bfloat16 TFLOP/s from the vendors' data sheets. The first name that the device's name contains is used.
PEAK_TFLOPS = {
    "GH200": 989.4, "H200": 989.4, "H100 PCIe": 756.5, "H100 NVL": 835.5, "H100": 989.4, "H800": 989.4, "H20": 148.0,
    "B200": 2250.0, "A100": 311.9, "A800": 311.9, "A40": 149.7, "A30": 165.0, "A10": 125.0, "L40S": 362.1, "L40": 181.1,
    "L4": 121.0, "RTX 4090": 165.2, "RTX 3090": 71.0, "RTX A6000": 154.8,
}  # fmt: skip


def build_towers(text: ClipTextConfig | None, embed_dim: int) -> tuple[nn.Module, nn.Module, int]:
    """Return what `DualEncoder` takes as its text tower; None stands for features that come with the batch."""
    if text is None:
        return nn.Identity(), nn.Identity(), embed_dim
    return ClipText(text), nn.Linear(text.width, embed_dim, bias=False), embed_dim


def recipe_flops(
    input_shape: tuple[int, int, int, int],
    encoder: EncoderConfig,
    tuning: Literal["lora", "partial", "full", "head"],
    embed_dim: int,
    text: ClipTextConfig | None = None,
) -> dict[str, int]:
    """Return the FLOPs of a forward pass and of a training step for one sample; a multiply-add counts as two.

    A step is 3 forward passes with full tuning (values, gradients of activations and of weights) and 2 with LoRA, whose
    frozen weights need no gradients and whose adapters are small. `partial` and `head` are counted by running their
    backward pass. A text tower that runs at each step adds its forward pass. Recomputation is never counted.
    """
    config = dataclasses.replace(encoder, grad_checkpointing=False)
    with torch.device("meta"):
        model = DualEncoder(input_shape, config, build_towers(text, embed_dim)).train()
        inputs = torch.empty(1, *input_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.project(inputs)
    forward = counter.get_total_flops()
    if tuning in ("full", "lora"):
        step = forward * {"full": 3, "lora": 2}[tuning]
    else:
        apply_tuning(model, TuningConfig(tuning=tuning))
        with FlopCounterMode(display=False) as counter:
            model.project(inputs).sum().backward()
        step = counter.get_total_flops()
    if text:
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            model.project_text({"input_ids": torch.zeros(1, text.context_length, dtype=torch.long)})
        step += counter.get_total_flops()
    return {"forward": forward, "step": step}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's FLOP/s: a GPU's from its data sheet, a CPU's as measured on a large matrix product.

    Raises:
        UserError: the GPU is not listed here.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops * 1e12
        raise UserError(f"the peak of {name} is not known: set --peak-tflops (dense bfloat16)")
    size, seconds = 1536, []
    a, b = torch.randn(2, size, size).to(dtype)
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
