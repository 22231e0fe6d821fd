"""Export an encoder and its text tower for ONNX Runtime (onnx) or PyTorch without this library (pt2, torch.export).

The folder has `encoder.<format>`, which takes `inputs` (B, C, T, H, W), and `text.<format>`, which takes `input_ids`
(B, L). B may be any number, and so may L where the tower does not depend on the padding. Both return `features`
(B, D), unit norm. `config.json` has the preprocessing, the text tower's tokenizer and context length, the logit scale
and bias, and the differences from PyTorch.
"""

import importlib.util
import json
from copy import copy
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from ..config import UserError, to_dict
from ..modalities import Modality, modality_name
from ..model import DualEncoder
from ..temporal import PairHead
from ..text import Tokenizer, is_clip_tokens

Format = Literal["onnx", "pt2"]
LARGEST_DIFFERENCE = 1e-4  # between the features of a file and those of PyTorch, in any dimension
SIZES = (1, 5, 3)  # batches to compare; the last is the example for the export
SINGLE_FILE = 1 << 30  # bytes of weights above which ONNX stores them beside the graph; protobuf ends at 2 GB


class Side(nn.Module):
    """One side of a model, without the weights of the other, from one input to unit-norm features (B, D)."""

    def __init__(self, model: DualEncoder, text: bool):
        super().__init__()
        self.text, self.model = text, copy(model)  # the parts are shared, the list of them is not
        self.model._modules = {name: part for name, part in model._modules.items() if name.startswith("text_") == text}

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode_text({"input_ids": x}) if self.text else self.model.encode(x)


class Int8(nn.Module):
    """A weight (rows, columns) as int8 with a scale for each row; it is multiplied out for each use."""

    def forward(self, rows: Tensor, scales: Tensor) -> Tensor:
        return rows * scales

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        return (weight / scales).round().to(torch.int8), scales


@torch.no_grad()
def deploy(model: DualEncoder, modality: Modality, folder: Path, kind: Format, int8: bool) -> None:
    """Write both sides of a model to `folder`, and compare each file's features with PyTorch's on random inputs.

    With `int8`, the matrices of linear layers, embeddings and attention are stored as int8, and the cosines with the
    features of the full weights are printed. Raises `UserError` if a package is missing, or a file's features differ by
    more than `LARGEST_DIFFERENCE`.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if kind == "onnx" and missing:
        raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install 'languagebind[onnx]'")
    if isinstance(model.temporal_head, PairHead):
        raise UserError("a model that scores pairs has no embedding to export")
    torch.manual_seed(0)
    model = model.eval().float().requires_grad_(False)
    sides = {"encoder": Side(model, text=False), "text": Side(model, text=True)}
    words = [[" ".join(map(str, torch.randperm(2 + row).tolist())) for row in range(count)] for count in SIZES]
    inputs = {
        "encoder": [torch.randn(count, *modality.input_shape) for count in SIZES],
        "text": [model.tokenize(texts)["input_ids"] for texts in words],
    }
    full = {name: [side(x) for x in inputs[name]] for name, side in sides.items()}
    if int8:
        for module in list(model.modules()):
            if isinstance(module, (nn.Linear, nn.Embedding, nn.MultiheadAttention)):
                matrix = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
                register_parametrization(module, matrix, Int8())
    found: dict[str, Any] = {"modality": modality_name(modality), "inputs": to_dict(modality), "int8": int8}
    encode: Any = cast(Tokenizer, model.text_model.tokenizer).encode
    tokenizer = "CLIP" if is_clip_tokens(encode) else encode.tokenizer.name_or_path
    found |= {"text_tower": {"tokenizer": tokenizer, "context_length": encode.context_length}}
    bias = None if model.logit_bias is None else model.logit_bias.item()
    found |= {"input_shape": modality.input_shape, "logit_scale": model.logit_scale.item(), "logit_bias": bias}
    for name, side in sides.items():
        path = folder / f"{name}.{kind}"
        _write(side, path, inputs[name][-1])
        read, now = _read(path), [side(x) for x in inputs[name]]
        difference = max((read(x) - y).abs().max().item() for x, y in zip(inputs[name], now, strict=True))
        line = f"{path.name}: {sum(file.stat().st_size for file in folder.glob(f'{path.name}*')) / 1e6:.1f} MB"
        line += f", largest difference from PyTorch {difference:.1e}"
        if not difference <= LARGEST_DIFFERENCE:
            raise UserError(f"{line}, above {LARGEST_DIFFERENCE:.0e}: nothing was kept")
        found[name] = {"largest_difference": difference}
        if int8:
            cosines = F.cosine_similarity(torch.cat(now), torch.cat(full[name]))
            found[name]["int8_cosine"] = cosines.mean().item()
            line += f"; int8: cosine with the full weights {cosines.mean():.5f}, at least {cosines.min():.5f}"
        print(line)
    (folder / "config.json").write_text(json.dumps(found, indent=2) + "\n")


def _write(side: Side, path: Path, example: Tensor) -> None:
    trimmed = side.text and cast(Tokenizer, side.model.text_model.tokenizer).cut
    sizes = dict.fromkeys(range(2 if trimmed else 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(side, (example,), dynamic_shapes=(sizes,))
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return
    large = sum(value.nbytes for value in side.state_dict().values()) > SINGLE_FILE
    names = {"input_names": ["input_ids" if side.text else "inputs"], "output_names": ["features"]}
    torch.onnx.export(program, (example,), path, external_data=large, verbose=False, **names)  # type: ignore[arg-type]


def _read(path: Path) -> Any:
    """Return the function in a file, from and to tensors."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
