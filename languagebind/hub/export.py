"""Export a training checkpoint to a folder in the published layout, with tokenizer and model card:

    languagebind export --checkpoint logs/depth-1 --output exports/depth-1 [--adapter]
    languagebind export --checkpoint logs/depth-1 --output exports/depth-onnx --format onnx [--int8]

`languagebind.load`, `LanguageBindDepth.from_pretrained` and `AutoModel` load the folder, and it can be pushed to the
Hugging Face hub as it is. The folder of a new modality, or of towers other than CLIP's, is a run's without the
optimizer, for `languagebind.load` alone. `--format onnx` and `pt2` are for programs without this library; see `deploy`.
"""

import inspect
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..config import UserError, first_line, parse
from ..files import new_folder
from ..lora import save_adapter
from ..modalities import modality_name
from ..text import ClipText
from ..weights import published_names
from .checkpoint import build_checkpoint, read_checkpoint
from .config import KIND_OF, to_published
from .deploy import deploy
from .encoders import load_model
from .processing import PROCESSORS, TOKENIZERS
from .published import build_published


@dataclass(frozen=True)
class ExportOptions:
    """Export a checkpoint to the published layout, our own (new modalities, other encoders), ONNX or torch.export."""

    checkpoint: Path
    """checkpoint, or run folder to export the last checkpoint; with --format, also the published layout or a hub id"""
    output: Path
    """output folder, new or empty"""
    modality: str | None = None
    """modality to export of a run of several"""
    adapter: bool = False
    """write LoRA adapters to adapter/ in PEFT's format, and keep the base weights unchanged"""
    format: Literal["languagebind", "onnx", "pt2"] = "languagebind"
    """layout for this library, ONNX, or torch.export's archive; the last two are compared with PyTorch"""
    int8: bool = False
    """with onnx or pt2: store matrices as int8, about a quarter of the size, and print how far the features move"""

    def __post_init__(self):
        if self.int8 and self.format == "languagebind":
            raise UserError("--int8 needs --format onnx or pt2")
        if self.adapter and self.format != "languagebind":
            raise UserError(f"--adapter and --format {self.format} exclude each other")


def main(argv: Sequence[str] | None = None) -> None:
    """Export the checkpoint."""
    options = parse(ExportOptions, argv, prog="languagebind export")
    output = options.output.absolute()
    try:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise UserError(f"{options.output} exists and is not an empty folder; choose another")
        with new_folder(output) as folder:
            if options.format == "languagebind":
                _write(options, folder)
            else:
                model = load_model(str(options.checkpoint), modality=options.modality)
                deploy(*model, folder, options.format, options.int8)
    except OSError as error:
        raise UserError(f"cannot write {options.output}: {first_line(error)}") from error


def _write(options: ExportOptions, folder: Path) -> None:
    saved = read_checkpoint(options.checkpoint, options.modality)
    model, modality = build_checkpoint(saved, options.checkpoint, None, None)
    if options.modality not in (None, name := modality_name(modality)):
        raise UserError(f"{options.checkpoint} is for {name}, not {options.modality}")
    title, text = options.output.absolute().name, saved["config"]["model"]["text"]
    sizes, clip = model.vision_model.sizes, isinstance(model.text_model, ClipText)
    other = sizes.timm_model or ("a temporal head" if sizes.temporal_head else None if clip else "this text tower")
    other = other if name in KIND_OF else name
    if other is None:
        published = build_published(*to_published(model, modality), str(options.checkpoint))
        if options.adapter:
            separate_adapter(published, saved, folder)
        published.save_pretrained(folder)
        kind = KIND_OF[name]
        PROCESSORS[kind](published.config, TOKENIZERS[kind].from_pretrained(options.checkpoint)).save_pretrained(folder)
        source = f'"ORG/{title}")  # its name on the Hugging Face hub, or its folder'
    else:
        if options.adapter:
            raise UserError(f"--adapter needs the published layout, which does not support {other}")
        (folder / "checkpoints").mkdir()
        kept = {x: saved[x] for x in saved.keys() & {"model", "ema", "step", "text_fingerprint", "partner", "versions"}}
        kept["config"] = {key: saved["config"][key] for key in ("modality", "inputs", "model")}
        torch.save(kept, folder / "checkpoints" / f"step_{saved['step']:08d}.pt")
        source = f'"{title}")  # this folder'
        if name not in KIND_OF:
            shutil.copy(inspect.getfile(type(modality)), folder)
            source += f"; needs the modality {saved['config']['modality']}"
    # Without local folders: local-dir:clip for local-dir:/data/clip
    sources = [text[key] for key in ("text_tower", "text_pretrained") if text[key]]
    sources = [x if x.startswith(("hf-hub:", "package:")) else re.sub(r"[^:]*/", "", x) for x in sources]
    (folder / "README.md").write_text(
        Path(__file__).with_name("card.md").read_text(encoding="utf-8").format(
            name=title, source=source, modality=name, dim=model.embed_dim, steps=saved["step"],
            tower=" ".join(sources), tuning=saved["config"]["model"]["tuning"]["tuning"],
        )
    )  # fmt: skip
    print(f"wrote {options.output}, {sum(each.numel() for each in model.parameters()) / 1e6:.1f} M parameters")


def separate_adapter(model: nn.Module, saved: dict[str, Any], folder: Path) -> None:
    """Restore the base weights in the merged model, and write the adapters to `folder`/adapter."""
    state, tuning = published_names(saved["model"]), saved["config"]["model"]["tuning"]
    adapters = {key: value for key, value in state.items() if ".lora_" in key}
    if not adapters:
        raise UserError("--adapter needs a checkpoint with LoRA adapters; this one has none")
    base = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".base_layer." in key}
    model.load_state_dict(model.state_dict() | base)
    save_adapter(folder / "adapter", adapters, tuning["lora_rank"], tuning["lora_alpha"], tuning["lora_dropout"])
