"""Segmentation: every pixel belongs to the class that it scores highest for, and masks say which class is right.

mIoU is the mean of the classes' intersection over union, of all samples' pixels together; classes that are neither
there nor predicted are left out. A class in a picture is pointed at if the pixel where its score exceeds the mean over
classes most lies in its mask; of several such pixels, all must. Void pixels count only as outside of a mask.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...config import UserError
from ..data.samples import Sample
from .examples import media
from .statistics import sum_intervals
from .zero_shot import or_none

POINTS = (6, 6)  # rows and columns of the points in each picture whose features a probe classifies
MAP = (128, 128)  # rows and columns of the maps in a result
PICTURES = 6  # with maps, of the best and of the worst


def read_mask(path: Path, shape: Sequence[int], num_classes: int, void: int) -> Tensor:
    """Return the classes (H, W) in a mask of one channel. Raises `UserError` for another shape or other values."""
    with Image.open(path) as image:
        mask = torch.from_numpy(np.array(image).astype(np.int64))
    if tuple(mask.shape) != tuple(shape):
        raise UserError(f"the mask {path} is {tuple(mask.shape)}, but its picture is {tuple(shape)}")
    if len(odd := mask[((mask < 0) | (mask >= num_classes)) & (mask != void)]):
        raise UserError(f"{path} has {odd[0]}, which is neither one of {num_classes} classes nor void ({void})")
    return mask


def count_pixels(scores: Tensor, mask: Tensor, void: int) -> Tensor:
    """Return six counts for each class (6, K), float64, for scores (K, H, W) and a mask (H, W).

    They are its pixels that are right, predicted and true; 1 if it is pointed at; 1 if it is there; its share of area.
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


def take_points(features: Tensor, mask: Tensor) -> Tensor:
    """Return the features (D, *POINTS) with the classes in a mask (H, W) at the same points: (P, D + 1)."""
    classes = F.interpolate(mask[None, None].float(), POINTS, mode="nearest-exact")[0]
    return torch.cat([features.cpu(), classes]).flatten(1).T


def take_maps(scores: Tensor, mask: Tensor, void: int) -> Tensor:
    """Return the predicted and the true classes (2, *MAP), from 1 on, for scores (K, *MAP) and a mask; 0 is void."""
    true = (mask + 1).masked_fill(mask == void, 0)[None, None].float()
    return torch.stack([1 + scores.argmax(dim=0).cpu(), F.interpolate(true, MAP, mode="nearest-exact")[0, 0].long()])


def pick_pictures(counts: Tensor, samples: Sequence[Sample], draw: Callable[..., Tensor]) -> dict[str, list[Any]]:
    """Return the `best` and `worst` pictures by the mean IoU of their classes, for counts (N, 6, K) of N samples.

    `draw` returns the maps (n, 2, *MAP) of `take_maps` for some samples. A result holds both as one PNG, in base64.
    """
    right, predicted, true = counts[:, :3].unbind(dim=1)
    iou = (right / (predicted + true - right)).nanmean(dim=1)
    order = [i for i in iou.argsort(descending=True, stable=True).tolist() if not iou[i].isnan()]
    half = (len(order) + 1) // 2
    chosen = {"best": order[:half][:PICTURES], "worst": order[half:][: -PICTURES - 1 : -1]}
    shown, found = chosen["best"] + chosen["worst"], {}
    for i, maps in zip(shown, draw([samples[i] for i in shown]), strict=True):
        file = io.BytesIO()
        Image.fromarray(maps.flatten(0, 1).numpy().astype(np.uint16)).save(file, "PNG")
        found[i] = media(samples[i]) | {"score": iou[i].item(), "maps": base64.b64encode(file.getvalue()).decode()}
    return {kind: [found[i] for i in places] for kind, places in chosen.items()}


def _metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics of sums (..., 6, K) of `count_pixels` over samples."""
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
    protocol = {"classes": sums.shape[1], "classes_with_samples": int((sums[2] > 0).sum())}
    protocol["chance"] = {"pixel_accuracy": 1 / sums.shape[1], "pointing": sums[5].sum() / sums[4].sum()}
    protocol["ties"] = "the first class; of pointing, against the model"
    return {"metrics": {name: float(value) for name, value in _metrics(sums).items()}, "protocol": protocol}


def describe_segmentation(counts: Tensor, classes: Mapping[str, str]) -> dict[str, Any]:
    """Return the intervals, of resampled samples, and the classes with their figures."""
    right, predicted, true, pointed, there, _ = counts.sum(dim=0)
    iou, share = right / (predicted + true - right), pointed / there
    rows = [
        {"label": label, "name": name, "samples": int(there[k]), "IoU": or_none(iou[k]), "pointing": or_none(share[k])}
        for k, (label, name) in enumerate(classes.items())
    ]
    return {"intervals": sum_intervals(counts.numpy(), _metrics), "classes": rows}
