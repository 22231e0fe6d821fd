"""CLIP_benchmark's webdataset folders and names for metrics; run as a module, CLIP_benchmark itself with our models.

    python -m languagebind.eval.clip_benchmark eval --model_type languagebind --pretrained CHECKPOINT --dataset wds/NAME

takes the flags of `clip_benchmark`, and for CHECKPOINT what `--checkpoint` of `python -m languagebind.eval` takes, or
MODULE:FUNCTION. CLIP_benchmark hands over RGB pictures of 8 bits, so this is for encoders of images and infrared; depth
is refused. Its folders:

FOLDER/test/nshards.txt, FOLDER/test/0.tar, 1.tar, ...      (or another split)
FOLDER/classnames.txt                                       in the order of the `.cls` labels
FOLDER/zeroshot_classification_templates.txt                with {c} for the class
FOLDER/dataset_type.txt                                     retrieval or multilabel; else classification
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import UserError, run
from ..files import check_regular, text_lines
from ..modalities import DecodeError
from ..remote import is_url

if TYPE_CHECKING:
    from .datasets import DatasetConfig

MODEL_TYPE = "languagebind"
SHARDS, TYPE = "nshards.txt", "dataset_type.txt"
TYPES = ("classification", "multilabel", "retrieval")
# Of captions as queries, CLIP_benchmark says image retrieval, whatever the modality is.
METRICS = {
    "acc1": "top1",
    "acc5": "top5",
    "mean_per_class_recall": "mean_per_class",
    "mean_average_precision": "mAP",
    "image_retrieval_recall@5": "text_to_modality/R@5",
    "text_retrieval_recall@5": "modality_to_text/R@5",
}


def with_clip_benchmark_keys(result: dict[str, Any]) -> dict[str, Any]:
    """A result whose metrics are there under CLIP_benchmark's names too."""
    metrics = result["metrics"]
    return result | {"metrics": metrics | {key: metrics[own] for key, own in METRICS.items() if own in metrics}}


def task_of(folder: Path, split: str = "test") -> str:
    """The task of such a folder.

    Raises:
        UserError: it is none.
    """
    if not (folder / split / SHARDS).is_file():
        raise UserError(f"{folder} is no webdataset folder of CLIP_benchmark: it has no {split}/{SHARDS}")
    task = " ".join(_lines(folder / TYPE)).strip().lower() if (folder / TYPE).is_file() else TYPES[0]
    if task not in TYPES:
        raise UserError(f"{folder / TYPE} holds {task!r}, expected one of {', '.join(TYPES)}")
    return task


def fill_in(config: "DatasetConfig") -> "DatasetConfig":
    """The config as it is, unless its data is such a folder: then with its shards, and the classes and templates that
    the config itself does not give.

    Raises:
        UserError: the folder is damaged, or of another task.
    """
    folder = Path(config.data)
    # Unlike Path's, this is False of a name that is too long.
    if is_url(config.data) or not os.path.isfile(folder / config.split / SHARDS):
        return config
    if task_of(folder, config.split) != config.task:
        raise UserError(f"{config.name}: {folder} is for {task_of(folder, config.split)}, not for {config.task}")
    count = " ".join(_lines(folder / config.split / SHARDS)).strip()
    if not count.isdecimal() or len(count) > 6 or int(count) < 1:
        raise UserError(f"{folder / config.split / SHARDS} should hold the number of shards, not {count!r}")
    config = replace(config, data=str(folder / config.split / f"{{0..{int(count) - 1}}}.tar"))
    if config.task == "retrieval":
        return config
    if config.class_names is None:
        # By their numbers, as some datasets have two classes of one name.
        names = _lines(folder / "classnames.txt")
        if "" in names:
            place = f"{folder / 'classnames.txt'}:{names.index('') + 1}"
            raise UserError(f"{place}: a blank line in front of a name: a class's label is the number of its line")
        config = replace(config, class_names={str(number): name for number, name in enumerate(names)})
    templates = folder / "zeroshot_classification_templates.txt"
    # What the config itself gives is another object than the default, even where it is equal to that.
    if config.templates is type(config).templates and templates.is_file():
        config = replace(config, templates=tuple(filter(None, _lines(templates))))
    return config


def _lines(file: Path) -> list[str]:
    """Its lines, without blank ones at the end."""
    try:
        check_regular(file)
        lines = text_lines(file.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    return lines


class ClipBenchmarkModel(nn.Module):
    """A model of `models.load` under the names that CLIP_benchmark calls."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, 1, H, W), as `transform` makes them -> (B, D)."""
        return self.model.encode(images)

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """What `tokenizer` gives for N texts -> (N, D)."""
        return self.model.encode_text(tokens)


def load_model(
    model_name: str = "", pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[ClipBenchmarkModel, Callable[[Any], Tensor], Callable[[list[str]], Any]]:
    """Model, transform of a PIL picture and tokenizer, as CLIP_benchmark's own loaders give them.

    Args:
        model_name: only a name in the results, here.
        pretrained: the checkpoint.
        cache_dir: not used; the hub's own variables say where downloads are kept.
        device: where the model goes.

    Raises:
        UserError: the checkpoint cannot be used, or does not read pictures.
    """
    from PIL import Image
    from transformers import BatchEncoding

    from .models import load

    model, modality = load(pretrained, torch.device(device))
    try:
        modality.preprocess(Image.new("RGB", (32, 32)))
    except DecodeError as error:
        raise UserError(f"{pretrained} does not read RGB pictures, all that CLIP_benchmark has: {error}") from error
    return ClipBenchmarkModel(model), modality.preprocess, lambda texts: BatchEncoding(model.tokenize(texts))


def main() -> None:
    try:
        from clip_benchmark import cli, models
    except ImportError as error:
        raise UserError(f"this needs CLIP_benchmark: pip install clip-benchmark ({error})") from error
    models.TYPE2FUNC[MODEL_TYPE] = load_model
    models.MODEL_TYPES.append(MODEL_TYPE)
    cli.main()


if __name__ == "__main__":
    run(main)
