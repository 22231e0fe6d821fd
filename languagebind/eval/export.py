"""Write the features of an evaluation to files, with a description of each row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .data.samples import Sample
from .results import write_output


@dataclass(frozen=True)
class Features:
    """What was compared; all features have unit norm."""

    features: Tensor  # (N, D), float32
    samples: Sequence[Sample]  # N
    text_features: Tensor  # (U, D), float32: of classes, each the mean of its prompts, or of distinct captions
    texts: Sequence[dict[str, Any]]  # U: `text`, and for a class its `label`


def export_features(found: Features, path: Path) -> None:
    """Write the features in the format of the path's extension. Raises `UserError` where that fails.

    `.safetensors` holds the tensors `features` and `text_features`. Beside it, `.jsonl` has a line for each row:
    `{"tensor": "features", "row", "key", "labels", "captions"}` or `{"tensor": "text_features", "row", "text", ...}`.
    `.parquet` holds these lines as a table, with the features in the column `vector`.
    """
    lines = [
        {"tensor": "features", "row": row, "key": sample.key, "labels": sample.labels, "captions": sample.captions}
        for row, sample in enumerate(found.samples)
    ]
    lines += [{"tensor": "text_features", "row": row} | text for row, text in enumerate(found.texts)]
    features, texts = (tensor.detach().cpu().contiguous() for tensor in (found.features, found.text_features))
    if path.suffix == ".parquet":
        write_output(path, _parquet(torch.cat([features, texts]), lines))
        return
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_output(path.with_suffix(".jsonl"), text.encode())
    write_output(path, save({"features": features, "text_features": texts}))


def _parquet(vectors: Tensor, lines: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.list_(pyarrow.string())
    kinds = {"tensor": pyarrow.string(), "row": pyarrow.int64(), "key": pyarrow.string(), "labels": texts,
             "captions": texts, "text": pyarrow.string(), "label": pyarrow.string()}  # fmt: skip
    # Labels may be numbers or texts; a column has one type
    rows = [line | {"labels": list(map(str, line["labels"]))} if "labels" in line else line for line in lines]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(kinds.items()))
    flat = pyarrow.array(vectors.flatten().numpy())
    table = table.append_column("vector", pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()
