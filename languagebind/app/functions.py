"""What the page and its API compute: from encoders, files and texts to plain values. Nothing here keeps a state."""

import csv
import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..config import UserError, load_yaml
from ..data.feature_store import FeatureStore, hash_item, samples_in
from ..data.members import read_captions
from ..data.shards import expand_shards
from ..data.vidal import MissingCaption, all_captions, source_names
from ..eval.report.examples import PALETTE, over
from ..hub.encoders import Encoders, load
from ..index import Hit, Index
from ..modalities import DecodeError
from .drawing import data_uri, draw, draw_matrix

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
    store, texts = FeatureStore(encoders.model(name).text_fingerprint()), dict[Any, str]()
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

    modality: str
    feature: Tensor  # (D,), unit norm
    picture: Image.Image
    meaning: str  # of the colours


@torch.no_grad()
def view(encoders: Encoders, name: str, file: str) -> View:
    """Decode a file once, and return its feature and its picture. Raises `DecodeError` if it cannot be used."""
    model, modality = encoders.model(name), encoders.encoders[name][1]
    raw = modality.load(file)
    x = model.project(modality.transform(raw)[None].to(model.logit_scale.device)).float()
    return View(name, F.normalize(x[0], dim=-1), *draw(modality, raw))


def text_features(encoders: Encoders, texts: Sequence[str], of: str | None) -> Tensor:
    """Return the features (N, D) of texts by the tower of a modality, or by the one that most modalities share."""
    found: Any = encoders.encode(text=texts, of=of)
    return found


def rate(models: Models, name: str, feature: Tensor, texts: Sequence[str]) -> dict[str, Any]:
    """Compare the feature (D,) of a modality with texts; `note` says how to read the figures, if that needs saying."""
    features = text_features(models.encoders, texts, name)
    cosines, scaled = (models.encoders.similarity(feature[None], features, scale)[0] for scale in (None, name))
    figures = {"probabilities": scaled.softmax(dim=0), "cosines": cosines}
    rounded = {key: [round(x, 6) for x in value.tolist()] for key, value in figures.items()}
    return {"modality": name, "texts": [*texts], **rounded, "note": note(models, name, features.cpu(), texts)}


def note(models: Models, name: str, features: Tensor, texts: Sequence[str]) -> str:
    """Name a text that is no more like a training caption than two training captions are like each other.

    Without training captions, say what the probabilities mean.
    """
    known = models.captions.get(name)
    if known is None:
        about = ABOUT.get(name, "what is seen")
        return (
            f"The page does not have this encoder's training captions, so it cannot tell which texts the encoder "
            f"knows: those of {name} say {about}. Probabilities add up to 100 %, even if no text is right."
        )
    best, nearest = (features @ known.features.T).max(dim=1)
    strange, row = int((best < known.alike).sum()), int(best.argmin())
    return "" if not strange else (
        f"{strange} of {len(texts)} texts resemble no caption of this encoder's training, so their figures say little. "
        f"The nearest to “{texts[row]}” is “{known.texts[nearest[row]].strip()}”: cosine {best[row]:.2f}, where "
        f"{1 - ALIKE:.0%} of all pairs of its captions have more than {known.alike:.2f}."
    )


def matrix(
    encoders: Encoders, files: Sequence[tuple[str, str]], texts: Sequence[str]
) -> tuple[Image.Image, str, bool]:
    """Return the cosines between files, pairs of a modality and a path, and texts: as a picture, and as CSV.

    The last result tells whether all cosines are known: modalities whose text towers differ have none. Texts are
    encoded for the modality of the file, and for each other by the tower that most modalities share.
    """
    if not 2 <= len(files) + len(texts) or len(files) > MOST_FILES:
        raise UserError(f"give two things to compare or more, with at most {MOST_FILES} files")
    views = [view(encoders, name, file) for name, file in files]
    count, towers = len(views), [id(encoders.model(name).text_model) for name, _ in files]
    found = np.full((count + len(texts),) * 2, np.nan)
    for row, column in np.ndindex(count, count):
        if towers[row] == towers[column]:
            found[row, column] = float(views[row].feature @ views[column].feature)
    for row, own in enumerate(views if texts else ()):
        found[row, count:] = (text_features(encoders, texts, own.modality) @ own.feature).cpu()
    found[count:, :count] = found[:count, count:].T
    if texts:
        features = text_features(encoders, texts, None)
        found[count:, count:] = (features @ features.T).cpu()
    kinds = [name for name, _ in files] + ["text"] * len(texts)
    labels = [f"{kind}: {x}" for kind, x in zip(kinds, [*(Path(file).name for _, file in files), *texts], strict=True)]
    sheet = io.StringIO()
    rows = ([label, *("" if np.isnan(x) else x for x in row)] for label, row in zip(labels, found, strict=True))
    csv.writer(sheet).writerows([["", *labels], *rows])
    edges = [*(own.picture for own in views), *texts]
    return draw_matrix(edges, kinds, found), sheet.getvalue(), not np.isnan(found).any()


def segmentable(encoders: Encoders) -> list[str]:
    """Return the modalities of pictures whose encoders have dense features."""
    stills = [name for name, (_, kind) in encoders.encoders.items() if hasattr(kind, "resize_mode")]
    stills = [name for name in stills if encoders.encoders[name][1].input_shape[1] == 1]
    return [name for name in sorted(stills) if hasattr(encoders.model(name).vision_model, "feature_map")]


def segment(encoders: Encoders, name: str, file: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return the share of a picture for which each text is the best, its colour, and the map of the texts' numbers."""
    if name not in segmentable(encoders):
        raise UserError(f"{name} has no maps of classes: choose from {', '.join(segmentable(encoders))}")
    inputs: Any = {name: [file]}
    classes = encoders.segment(texts, **inputs)[0].cpu().numpy()
    shares = np.bincount(classes.ravel(), minlength=len(texts)) / classes.size
    return {
        "texts": [*texts],
        "shares": shares.round(6).tolist(),
        "colours": [to_hex(PALETTE(number + 1)) for number in range(len(texts))],
        "picture": data_uri(over(view(encoders, name, file).picture, classes + 1)),
        "classes": data_uri(Image.fromarray(classes.astype(np.uint8)), lossless=True),
    }


def arithmetic(encoders: Encoders, own: View, plus: str, minus: str) -> Tensor:
    """Return the feature (D,) of a file plus that of a text minus that of another, with unit norm."""
    total = own.feature
    for sign, text in ((1, plus), (-1, minus)):
        if text.strip():
            total = total + sign * text_features(encoders, [text], own.modality)[0]
    if total.norm() < 1e-3:
        raise UserError("the sum is zero, which has no direction: choose other texts")
    return F.normalize(total, dim=-1)


def shown_hit(index: Index, hit: Hit) -> dict[str, Any]:
    """Return what a search found, with its path below the indexed folder, and a small picture if it can be read."""
    modality, picture = index.encoders.encoders[hit.modality][1], None
    with suppress(DecodeError):  # it may have gone since
        picture = draw(modality, part(modality, hit))[0]
        picture.thumbnail((240, 240))
    when = "" if hit.start is None else f"{hit.start:g} to {hit.end:g} s"
    shown = {"picture": picture and data_uri(picture), "when": when, "path": os.path.relpath(hit.path, index.folder)}
    return hit._asdict() | {"score": round(hit.score, 6)} | shown


def part(modality: Any, hit: Hit) -> Any:
    """Return the raw signal of what a search found: a file, or its seconds from `start` to `end`."""
    if hit.start is None or hit.end is None:
        return modality.load(hit.path)
    if hasattr(modality, "read_part"):
        return modality.read_part(hit.path, hit.start, hit.end)
    samples, rate = modality.load(hit.path)
    return samples[:, round(hit.start * rate) : round(hit.end * rate)], rate
