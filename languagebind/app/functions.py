"""What the page and its API compute: from encoders, files and texts to plain values. Nothing here keeps a state."""

import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..config import UserError, load_yaml
from ..data.feature_store import FeatureStore, hash_item, samples_in
from ..data.members import read_captions
from ..data.shards import expand_shards
from ..data.vidal import MissingCaption, all_captions, source_names
from ..eval.report.examples import over
from ..hub.encoders import TEXT, Encoders, load
from .drawing import draw

MOST_TEXTS, MOST_FILES = 100, 24  # in one request
ALIKE = 0.95  # share of the pairs of training captions that are less alike than a text and its nearest caption
ABOUT = {"audio": "what is heard", "video": "what is seen and what happens"}


class Captions(NamedTuple):
    """Some of the captions that an encoder was trained with."""

    texts: list[str]
    features: Tensor  # (N, D), unit norm
    alike: float  # the cosine below which `ALIKE` of the pairs of captions lie


@dataclass(frozen=True)
class Models:
    """The encoders of the page, and by modality the training captions that are at hand."""

    encoders: Encoders
    captions: Mapping[str, Captions] = field(default_factory=dict)


def load_models(sources: Sequence[str | Path], **options: Any) -> Models:
    """Load the encoders of some sources, and captions that they were trained with, where their shards are at hand."""
    encoders = load(*sources, **options)
    captions = {}
    for source in sources:
        with suppress(UserError, OSError, LookupError, TypeError, tarfile.TarError):
            name, found = _training_captions(Path(source), encoders)
            captions[name] = found
    return Models(encoders, captions)


def _training_captions(run: Path, encoders: Encoders) -> tuple[str, Captions]:
    """Return a run's modality, and the captions of its first shard whose features lie beside it."""
    config = load_yaml((run if run.is_dir() else run.parent.parent) / "config.yaml")
    name, data = config["modality"].rpartition(".")[2], config["data"]
    shard = expand_shards(data["train_data"])[0]
    store, texts = FeatureStore(encoders.model(name).text_fingerprint()), {}
    if not store.sources(shard):
        raise LookupError(shard)
    for sample in samples_in(shard, ("json", "txt")):
        with suppress(MissingCaption):
            own = read_captions(sample)
            texts |= {hash_item(x): x for key in source_names(data["caption_source"]) for x in all_captions(own, key)}
    features = F.normalize(torch.stack([store.find(shard, text) for text in texts.values()]).float(), dim=-1)
    pairs = (features @ features.roll(len(features) // 2, 0).T).diagonal()
    return name, Captions([*texts.values()], features, pairs.quantile(ALIKE).item())


def lines(texts: str, least: int = 1) -> list[str]:
    """Return the lines of a text that are not blank. Raises `UserError` if there are too few or too many."""
    found = [line.strip() for line in (texts or "").splitlines() if line.strip()]
    if len(found) < least:
        raise UserError("write texts, one a line")
    if len(found) > MOST_TEXTS:
        raise UserError(f"there are {len(found)} texts: give at most {MOST_TEXTS} at a time")
    return found


class View(NamedTuple):
    """A file as the encoder sees it."""

    feature: Tensor  # (D,), unit norm
    picture: Image.Image
    meaning: str  # of the colours


@torch.no_grad()
def view(encoders: Encoders, name: str, file: str) -> View:
    """Decode a file once, and return its feature and its picture. Raises `DecodeError` if it cannot be used."""
    model, modality = encoders.model(name), encoders.encoders[name][1]
    raw = modality.load(file)
    x = model.project(modality.transform(raw)[None].to(model.logit_scale.device)).float()
    return View(F.normalize(x[0], dim=-1), *draw(modality, raw))


def rate(models: Models, name: str, feature: Tensor, texts: Sequence[str]) -> dict[str, Any]:
    """Compare the feature (D,) of a modality with texts; `note` says how to read the figures, if that needs saying."""
    features: Any = models.encoders.encode(text=texts, of=name)
    cosines = models.encoders.similarity(feature[None], features)[0]
    scaled = models.encoders.similarity(feature[None], features, calibrated=name)[0]
    return {
        "modality": name,
        "texts": list(texts),
        "probabilities": [round(x, 6) for x in scaled.softmax(dim=0).tolist()],
        "cosines": [round(x, 6) for x in cosines.tolist()],
        "note": note(models, name, features.cpu(), texts),
    }


def note(models: Models, name: str, features: Tensor, texts: Sequence[str]) -> str:
    """Name the texts that are no more like a training caption than two training captions are like each other.

    Without training captions, say what the probabilities mean.
    """
    known = models.captions.get(name)
    if known is None:
        about = ABOUT.get(name, "what is seen")
        return (
            f"The captions that this encoder was trained with are not here, so the page cannot tell which texts it "
            f"knows; those of {name} say {about}. The probabilities always add up to 100 %, even if no text is right."
        )
    best = (features @ known.features.T).max(dim=1)
    strange = [row for row in range(len(texts)) if best.values[row] < known.alike]
    if not strange:
        return ""
    row = min(strange, key=lambda row: best.values[row].item())
    nearest, which = known.texts[int(best.indices[row])].strip(), "No text" if len(strange) == len(texts) else ""
    which = which or f"Not every text ({len(strange)} of {len(texts)} do not)"
    return (
        f"{which} resembles a caption of this encoder's training: for “{texts[row]}” the nearest of "
        f"{len(known.texts)} is “{nearest}”, cosine {best.values[row]:.2f}; {1 - ALIKE:.0%} of the pairs of training "
        f"captions exceed {known.alike:.2f}. Such figures say little: the encoder may not know these words."
    )


def same_space(encoders: Encoders, a: str, b: str) -> bool:
    """Tell whether two modalities, one of which may be text, have equal text towers, so that cosines mean something."""
    return TEXT in (a, b) or encoders.model(a).text_model is encoders.model(b).text_model


def matrix(encoders: Encoders, names: Sequence[str], views: Sequence[View], texts: Sequence[str]) -> np.ndarray:
    """Return the cosines (N + M, N + M) of N files of the modalities `names`, and M texts.

    They are NaN between modalities whose text towers differ. Texts are encoded for the modality of the file, and for
    each other by the tower that most modalities share.
    """
    count, size = len(names), len(names) + len(texts)
    found = np.full((size, size), np.nan)
    for row, (name, own) in enumerate(zip(names, views, strict=True)):
        for column, (other, its) in enumerate(zip(names, views, strict=True)):
            if same_space(encoders, name, other):
                found[row, column] = float(own.feature @ its.feature)
    if texts:
        for name in set(names):
            rows = [row for row, other in enumerate(names) if other == name]
            own = torch.stack([views[row].feature for row in rows])
            found[rows, count:] = encoders.similarity(own, encoders.encode(text=texts, of=name)).cpu()
        found[count:, :count] = found[:count, count:].T
        features: Any = encoders.encode(text=texts)
        found[count:, count:] = (features @ features.T).cpu()
    return found


def segmentable(encoders: Encoders) -> list[str]:
    """Return the modalities of pictures whose encoders have dense features."""

    def dense(model: Any, modality: Any) -> bool:
        still = hasattr(modality, "resize_mode") and modality.input_shape[1] == 1
        return still and hasattr(model.vision_model, "feature_map")

    return [name for name in encoders.modalities if dense(*encoders.encoders[name])]


def segment(encoders: Encoders, name: str, file: str, texts: Sequence[str]) -> tuple[Image.Image, list[float]]:
    """Return the picture of a file with each pixel's best text over it in colours, and the share of each text."""
    picture, classes = view(encoders, name, file).picture, encoders.segment(text=texts, **{name: [file]})[0]
    shares = torch.bincount(classes.flatten(), minlength=len(texts)) / classes.numel()
    return over(picture, classes.cpu().numpy() + 1), [round(x, 6) for x in shares.tolist()]


def arithmetic(encoders: Encoders, name: str, feature: Tensor, plus: str, minus: str) -> Tensor:
    """Return a feature (D,) plus that of one text, minus that of another, scaled to unit norm; a text may be blank."""
    for sign, text in ((1, plus), (-1, minus)):
        if text.strip():
            feature = feature + sign * encoders.encode(text=[text.strip()], of=name)[0]
    if feature.norm() < 1e-3:
        raise UserError("the sum is zero, which has no direction: choose other texts")
    return F.normalize(feature, dim=-1)
