"""CLIP_benchmark's names for our metrics, and a command that runs CLIP_benchmark with our models.

    python -m languagebind.eval.clip_benchmark eval --model_type languagebind --pretrained CHECKPOINT --dataset wds/NAME

The flags are those of `clip_benchmark`. CHECKPOINT is a checkpoint as in `python -m languagebind.eval`, or
MODULE:FUNCTION. CLIP_benchmark reads 8-bit RGB pictures, so this works for encoders of images and infrared, but not for
depth. A dataset is a folder with these files:

FOLDER/test/nshards.txt, FOLDER/test/0.tar, 1.tar, ...      (or another split)
FOLDER/classnames.txt                                       in the order of the `.cls` labels
FOLDER/zeroshot_classification_templates.txt                with {c} for the class
FOLDER/dataset_type.txt                                     retrieval or multilabel; else classification
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import UserError, package, run
from ..modalities import DecodeError
from .models import load_eval_model

MODEL_TYPE = "languagebind"
# "Image retrieval" is CLIP_benchmark's name for retrieval with captions as queries, for every modality
METRICS = {
    "acc1": "top1",
    "acc5": "top5",
    "mean_per_class_recall": "mean_per_class",
    "mean_average_precision": "mAP",
    "image_retrieval_recall@5": "text_to_modality/R@5",
    "text_retrieval_recall@5": "modality_to_text/R@5",
}


def with_clip_benchmark_keys(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with its metrics also under CLIP_benchmark's names."""
    metrics = result["metrics"]
    return result | {"metrics": metrics | {key: metrics[own] for key, own in METRICS.items() if own in metrics}}


def load_model(
    model_name: str = "", pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Any, Callable[[Any], Tensor], Callable[[list[str]], Any]]:
    """Return the model, the transform of PIL pictures and the tokenizer, like CLIP_benchmark's own loaders.

    `pretrained` is the checkpoint. `cache_dir` has no effect: the hub's environment variables set the folder for
    downloads. Raises `UserError` if the checkpoint cannot be loaded, or does not read pictures.
    """
    from PIL import Image
    from transformers import BatchEncoding

    model, modality = load_eval_model(pretrained, torch.device(device))
    try:
        modality.preprocess(Image.new("RGB", (32, 32)))
    except DecodeError as error:
        raise UserError(f"{pretrained} does not read the RGB pictures of CLIP_benchmark: {error}") from error
    model.encode_image = model.encode  # the name that CLIP_benchmark calls
    return model, modality.preprocess, lambda texts: BatchEncoding(model.tokenize(texts))


def main() -> None:
    cli, models = (package(f"clip_benchmark.{name}", "this", "clip-benchmark") for name in ("cli", "models"))
    models.TYPE2FUNC[MODEL_TYPE] = load_model
    models.MODEL_TYPES.append(MODEL_TYPE)
    cli.main()


if __name__ == "__main__":
    run(main)
