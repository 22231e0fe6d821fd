"""LoRA adapters on the encoder's attention. PEFT injects them for training, and they are merged before use."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .config import package


def inject_lora(encoder: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Add LoRA adapters to the attention projections of every block: over frames if present, else over tokens.

    The encoder, or its `Transformer`, is changed in place. The output of the adapters is scaled by alpha / rank.
    """
    peft = package("peft", "LoRA tuning", "peft")
    temporal = any(name.endswith("temporal_attn") for name, _ in encoder.named_modules())
    attention = "temporal_attn" if temporal else r"(self_attn|blocks\.[\w.]+\.attn)"  # ours, or that of timm's models
    targets = rf".*\.{attention}\.(qkv|proj|[a-z]+_proj)"
    # PEFT annotates lora_alpha as int, but accepts any number.
    sizes: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    peft.inject_adapter_in_model(peft.LoraConfig(**sizes, target_modules=targets), encoder)


def merge_lora(state: dict[str, Tensor], alpha: float, rank: int | None = None) -> dict[str, Tensor]:
    """Return the state with every adapter merged into its weight: W + alpha / rank * B @ A.

    A state without adapters is returned unchanged. The names may be those of PEFT before version 0.7 (`q_proj.weight`
    beside `q_proj.lora_A…`) or those of later versions (`q_proj.base_layer.weight`). By default, any rank is accepted.
    Raises `ValueError` if an adapter lacks lora_A, lora_B or its weight, or has another rank, or the shapes do not fit.
    """
    ranks = {value.shape[0] for key, value in state.items() if ".lora_A." in key}
    if rank is not None and (ranks or any(".base_model.model." in key for key in state)) and ranks != {rank}:
        found = f"adapters of rank {sorted(ranks)}" if ranks else "no adapters"
        raise ValueError(f"it was saved with LoRA, but has {found}; its config says lora_r {rank}")
    merged = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    adapters = sorted({key.partition(".lora_")[0] for key in state if ".lora_" in key})
    halves = {re.sub(r"(lora_[AB])\.\w+\.weight$", r"\1.weight", key): state[key] for key in state if ".lora_" in key}
    for name in adapters:
        a, b = halves.pop(f"{name}.lora_A.weight", None), halves.pop(f"{name}.lora_B.weight", None)
        weight = merged.get(f"{name}.weight")
        if a is None or b is None or weight is None:
            raise ValueError(f"the LoRA adapter {name} is incomplete: it needs lora_A, lora_B and its weight")
        if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != weight.shape:
            shapes = f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}, weight {tuple(weight.shape)}"
            raise ValueError(f"the LoRA adapter {name} does not fit: {shapes}")
        merged[f"{name}.weight"] = weight + (alpha / a.shape[0]) * (b @ a)
    if halves:
        raise ValueError(f"unknown LoRA weights: {', '.join(sorted(halves))}")
    return merged


def save_adapter(folder: Path, adapters: dict[str, Tensor], rank: int, alpha: float, dropout: float) -> None:
    """Write the `lora_A` and `lora_B` weights of a state dict for `PeftModel.from_pretrained(model, folder)`."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    targets = sorted({key.partition(".lora_")[0] for key in adapters})
    sizes: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    LoraConfig(**sizes, target_modules=targets).save_pretrained(str(folder))
    named = {f"base_model.model.{key.replace('.default.', '.')}": value.contiguous() for key, value in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
