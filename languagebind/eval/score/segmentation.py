"""Segmentation: every pixel belongs to the class that it scores highest for, and masks say which class is right.

mIoU is the mean of the classes' intersection over union, of all samples' pixels together; classes that are neither
there nor predicted are left out. A class in a picture is pointed at if the pixel where its score exceeds the mean over
classes most lies in its mask; of several such pixels, all must. Void pixels count only as outside of a mask.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...config import UserError
from .statistics import sum_intervals
from .zero_shot import or_none


def read_mask(path: Path, shape: Sequence[int], num_classes: int, void: int) -> Tensor:
    """Return the classes (H, W) in a mask of one channel. Raises `UserError` for another shape or other values."""
    with Image.open(path) as image:
        mask = torch.from_numpy(np.array(image).astype(np.int64))
    if tuple(mask.shape) != tuple(shape):
        raise UserError(f"the mask {path} is {tuple(mask.shape)}, but its picture is {tuple(shape)}")
    if len(odd := mask[((mask < 0) | (mask >= num_classes)) & (mask != void)]):
        raise UserError(
            f"the mask {path} has {odd[0]}, which is neither one of {num_classes} classes nor void ({void})"
        )
    return mask


def count_pixels(scores: Tensor, mask: Tensor, void: int) -> Tensor:
    """Return six rows of counts (6, K), float64, for scores (K, H, W) and a mask (H, W).

    They are each class's pixels that are right, predicted and true, whether it is pointed at, and whether it is there
    (0 or 1 each), and its share of the area.
    """
    mask, classes = mask.to(scores.device), torch.arange(len(scores), device=scores.device)
    labelled = mask != void
    true, predicted = mask[labelled], scores.argmax(dim=0)[labelled]
    pixels = [x.bincount(minlength=len(classes)) for x in (true[true == predicted], predicted, true)]
    contrast = (scores - scores.mean(dim=0) * (len(scores) > 1)).flatten(1)
    best = contrast == contrast.amax(dim=1, keepdim=True)
    missed = (best & (mask.flatten() != classes[:, None])).any(dim=1)
    there = pixels[2] > 0
    return torch.stack([*pixels, there & ~missed, there, pixels[2].double() / mask.numel()]).double().cpu()


def segmentation_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return mIoU, pixel accuracy and pointing for sums (..., 6, K) of `count_pixels` over samples."""
    right, predicted, true, pointed, there, _ = np.moveaxis(sums, -2, 0)
    with np.errstate(invalid="ignore"):
        return {
            "mIoU": np.nanmean(right / (predicted + true - right), axis=-1),
            "pixel_accuracy": right.sum(-1) / true.sum(-1),
            "pointing": pointed.sum(-1) / there.sum(-1),
        }


def score_segmentation(counts: Tensor) -> dict[str, Any]:
    """Return the metrics and protocol for the counts (N, 6, K) of N samples."""
    sums = counts.sum(dim=0).numpy()
    if not sums[2].any():
        raise UserError("no pixel has a class: check the masks, `class_names` and `void`")
    chance = {"pixel_accuracy": 1 / counts.shape[2], "pointing": sums[5].sum() / sums[4].sum()}
    protocol = {"classes": counts.shape[2], "classes_with_samples": int((sums[2] > 0).sum()), "chance": chance}
    metrics = {name: float(value) for name, value in segmentation_metrics(sums).items()}
    return {"metrics": metrics, "protocol": protocol | {"ties": "the first class; of pointing, against the model"}}


def describe_segmentation(counts: Tensor, classes: Mapping[str, str]) -> dict[str, Any]:
    """Return the intervals, of resampled samples, and the classes with their figures."""
    right, predicted, true, pointed, there, _ = counts.sum(dim=0)
    rows = zip(classes.items(), there.int().tolist(), right / (predicted + true - right), pointed / there, strict=True)
    return {
        "intervals": sum_intervals(counts.numpy(), segmentation_metrics),
        "classes": [
            {"label": label, "name": name, "samples": samples, "IoU": or_none(iou), "pointing": or_none(share)}
            for (label, name), samples, iou, share in rows
        ],
    }
