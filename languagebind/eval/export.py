"""Features of an evaluation as files: tensors, and what each of their rows is of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import UserError
from ..files import write_atomic
from .samples import Sample


@dataclass(frozen=True)
class Features:
    """What was compared with what; all features have unit norm."""

    features: Tensor
    """(N, D), float32"""
    samples: Sequence[Sample]
    """N of them"""
    text_features: Tensor
    """(U, D), float32: of classes, each the mean of its prompts, or of distinct captions"""
    texts: Sequence[dict[str, Any]]
    """U of them: `text`, and the class's `label`"""


def export_features(found: Features, path: Path) -> None:
    """Write `<path>.safetensors` with `features` and `text_features`, and `<path>.jsonl` with a line for each row.

    A line is `{"tensor": "features", "row", "key", "labels", "captions"}` or `{"tensor": "text_features", "row",
    "text", ...}`.

    Raises:
        UserError: they cannot be written.
    """
    from safetensors.torch import save

    tensors = {"features": found.features, "text_features": found.text_features}
    lines = [
        {"tensor": "features", "row": row, "key": sample.key, "labels": sample.labels, "captions": sample.captions}
        for row, sample in enumerate(found.samples)
    ]
    lines += [{"tensor": "text_features", "row": row} | text for row, text in enumerate(found.texts)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(path.with_name(f"{path.name}.safetensors"), save(tensors))
        write_atomic(path.with_name(f"{path.name}.jsonl"), text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
