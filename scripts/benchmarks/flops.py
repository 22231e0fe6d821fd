"""The floating point operations that a recipe needs, and those that a device could do."""

import dataclasses
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from languagebind.config import UserError
from languagebind.model import DualEncoder
from languagebind.text import ClipText, ClipTextConfig
from languagebind.tuning import TuningConfig, apply_tuning
from languagebind.vit import EncoderConfig

# Dense bfloat16, in TFLOP/s, by the vendors' data sheets; the first name found in the device's is taken.
PEAK_TFLOPS = {
    "GH200": 989.4, "H200": 989.4, "H100 PCIe": 756.5, "H100 NVL": 835.5, "H100": 989.4, "H800": 989.4, "H20": 148.0,
    "B200": 2250.0, "A100": 311.9, "A800": 311.9, "A40": 149.7, "A30": 165.0, "A10": 125.0, "L40S": 362.1, "L40": 181.1,
    "L4": 121.0, "RTX 4090": 165.2, "RTX 3090": 71.0, "RTX A6000": 154.8,
}  # fmt: skip


def build_towers(text: ClipTextConfig | None, embed_dim: int) -> tuple[nn.Module, nn.Module, int]:
    """What `DualEncoder` takes as its text; without a tower the features come with the batch."""
    if text is None:
        return nn.Identity(), nn.Identity(), embed_dim
    return ClipText(text), nn.Linear(text.width, embed_dim, bias=False), embed_dim


def recipe_flops(
    input_shape: tuple[int, int, int, int],
    encoder: EncoderConfig,
    tuning: str,
    embed_dim: int,
    text: ClipTextConfig | None = None,
) -> dict[str, int]:
    """FLOPs a sample, a product and a sum counted as two: of a forward pass, and of a training step.

    A step is 3 forward passes in full tuning (values, gradients of activations and of weights) and 2 with LoRA, whose
    frozen weights need no gradients and whose adapters are small. `partial` and `head` are counted as their
    gradients run. Recomputation is never counted: it is no work that the recipe needs. A text tower that is run at
    each step adds its forward pass.
    """
    config = dataclasses.replace(encoder, grad_checkpointing=False)
    with torch.device("meta"):
        model = DualEncoder(input_shape, config, build_towers(text, embed_dim)).train()
        inputs = torch.empty(1, *input_shape)
        tokens = torch.zeros(1, text.context_length, dtype=torch.long) if text else None
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
        with FlopCounterMode(display=False) as counter:
            model.project_text({"input_ids": tokens})
        step += counter.get_total_flops()
    return {"forward": forward, "step": step}


def peak_flops(device: torch.device, dtype: torch.dtype, given: float | None) -> float:
    """FLOP/s that the device could do: `given` in TFLOP/s, a GPU's by its name, a CPU's as large products run on it.

    Raises:
        UserError: the GPU is not known.
    """
    if given is not None:
        return given * 1e12
    if device.type == "cpu":
        return _measured_flops(dtype)
    name = torch.cuda.get_device_name(device)
    found = next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
    if found is None:
        raise UserError(f"the peak of {name} is not known here: give --peak-tflops, dense bfloat16")
    return found * 1e12


def _measured_flops(dtype: torch.dtype, size: int = 1536, repeats: int = 5) -> float:
    a, b = torch.randn(2, size, size).to(dtype)
    fastest = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * size**3 / fastest
