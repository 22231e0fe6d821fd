"""Write the features of an evaluation to files, with a description of each row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..files import printable
from .data.samples import Sample
from .results import write_output


@dataclass(frozen=True)
class Features:
    """The features that an evaluation compares, all of unit norm, and the samples and texts that they belong to."""

    features: Tensor  # (N, D), float32
    samples: Sequence[Sample]  # N
    text_features: Tensor  # (U, D), float32: one per class (the mean over its prompts) or one per distinct caption
    texts: Sequence[dict[str, Any]]  # U, each with `text`, and with `label` for a class


def export_features(found: Features, path: Path) -> None:
    """Write the features in the format of the path's extension. Raises `UserError` if writing fails.

    A `.safetensors` file holds the tensors `features` and `text_features`. A `.jsonl` file describes each row:
    `{"tensor": "features", "row", "key", "labels", "captions"}` or `{"tensor": "text_features", "row", "text", ...}`.
    A `.parquet` file holds these lines as a table, with the features in the column `vector`.
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
    write_output(path.with_suffix(".jsonl"), text.encode(errors="backslashreplace"))
    write_output(path, save({"features": features, "text_features": texts}))


def _parquet(vectors: Tensor, lines: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.list_(pyarrow.string())
    kinds = {"tensor": pyarrow.string(), "row": pyarrow.int64(), "key": pyarrow.string(), "labels": texts,
             "captions": texts, "text": pyarrow.string(), "label": pyarrow.string()}  # fmt: skip
    rows = [{name: printable(value) if isinstance(value, str) else value for name, value in x.items()} for x in lines]
    for row in rows:
        if "labels" in row:  # labels may be numbers or text, but a column has one type
            row["labels"] = [printable(str(label)) for label in row["labels"]]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(kinds.items()))
    flat = pyarrow.array(vectors.flatten().numpy())
    table = table.append_column("vector", pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()
