"""LoRA adapters on the encoder's attention: injected by PEFT for training, merged into the weights for use."""

import re
from pathlib import Path

from torch import Tensor, nn

from .config import UserError


def inject_lora(encoder: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Put adapters on the four attention projections of every block: over frames where there are any, else over tokens.

    Args:
        encoder: the `Transformer` of a vision encoder, changed in place.
        rank: inner size of an adapter; its output is scaled by alpha / rank.
        dropout: share of an adapter's inputs zeroed in training.

    Raises:
        UserError: PEFT cannot be imported.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"LoRA tuning needs PEFT: pip install peft ({error})") from error

    attention = "temporal_attn" if hasattr(encoder.layers[0], "temporal_attn") else "self_attn"
    targets = rf".*\.{attention}\.(q|k|v|out)_proj"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets), encoder)


def merge_lora(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Fold every adapter into the weight under it: W + alpha / rank * B @ A. Plain states come back as they are.

    Adapters are named as PEFT does, before version 0.7 (`q_proj.weight` beside `q_proj.lora_A…`) and since
    (`q_proj.base_layer.weight`).

    Raises:
        ValueError: half of an adapter is missing, its ranks differ, or it has no weight under it.
    """
    merged = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    adapters = sorted({key.partition(".lora_")[0] for key in state if ".lora_" in key})
    halves = {re.sub(r"(lora_[AB])\.\w+\.weight$", r"\1.weight", key): state[key] for key in state if ".lora_" in key}
    for name in adapters:
        a, b = halves.pop(f"{name}.lora_A.weight", None), halves.pop(f"{name}.lora_B.weight", None)
        weight = merged.get(f"{name}.weight")
        if a is None or b is None or weight is None:
            raise ValueError(f"the LoRA adapter {name} is not whole: lora_A, lora_B and the weight under it are needed")
        if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != weight.shape:
            shapes = f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}, weight {tuple(weight.shape)}"
            raise ValueError(f"the LoRA adapter {name} does not fit: {shapes}")
        merged[f"{name}.weight"] = weight + (alpha / a.shape[0]) * (b @ a)
    if halves:
        raise ValueError(f"unknown LoRA weights: {', '.join(sorted(halves))}")
    return merged


def save_adapter(folder: Path, adapters: dict[str, Tensor], rank: int, alpha: float, dropout: float) -> None:
    """Write adapters as PEFT does, for `PeftModel.from_pretrained(model, folder)`.

    Args:
        adapters: the `lora_A` and `lora_B` weights of a state dict.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    targets = sorted({key.partition(".lora_")[0] for key in adapters})
    LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets).save_pretrained(folder)
    tensors = {
        f"base_model.model.{key.replace('.default.', '.')}": value.contiguous() for key, value in adapters.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
