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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UserError, run
from ..modalities import DecodeError

MODEL_TYPE = "languagebind"
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
