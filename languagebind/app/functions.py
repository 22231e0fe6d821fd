"""What the page and its API compute: from encoders, files and texts to plain values. Nothing here keeps state."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import to_hex
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ..config import UserError, load_yaml
from ..data.feature_store import FeatureStore
from ..data.shards import expand_shards
from ..eval.report.examples import PALETTE, data_uri, over
from ..files import printable
from ..hub.encoders import TEXT, Encoders, load
from ..index import Hit, Index
from ..modalities import DecodeError, with_options
from .drawing import draw, draw_matrix

MOST_TEXTS, MOST_FILES, MOST_LETTERS = 100, 24, 10_000  # in one request
MOST_SCORES = 2**28  # of the texts for each pixel, 4 bytes each
ALIKE = 0.95  # share of the pairs of training captions that a text and its nearest caption should exceed


class Models(NamedTuple):
    """The encoders of the page, and what is known of their training."""

    encoders: Encoders
    captions: Mapping[str, Tensor] = {}  # by modality, the features (N, D) of training captions that are at hand
    of_world: Collection[str] = ()  # modalities whose runs trained on the sample world, as the demo's do


def load_models(sources: Sequence[str], **options: Any) -> Models:
    """Load encoders, and for runs whose shards have text features beside them, those of the first shard."""
    encoders, captions, of_world = load(*sources, **options), {}, list[str]()
    for run in map(Path, sources):
        with suppress(UserError, OSError, LookupError, TypeError, SafetensorError):
            config = load_yaml((run if run.is_dir() else run.parent.parent) / "config.yaml")
            name, place = config["modality"].rpartition(".")[2], config["data"]["train_data"]
            if "/world-" in place:
                of_world.append(name)
            shards = expand_shards(place)
            store = FeatureStore(encoders.model(name).text_fingerprint())
            captions[name] = F.normalize(load_file(store.path(shards[0]))["features"].float(), dim=-1)
    return Models(encoders, captions, of_world)


def lines(texts: str, least: int = 1) -> list[str]:
    """Return the lines of a text that are not blank. Raises `UserError` if there are too few or too many."""
    found = [line.strip() for line in (texts or "").splitlines() if line.strip()]
    if not least <= len(found) <= MOST_TEXTS:
        raise UserError(f"write texts, one a line, at most {MOST_TEXTS}: there are {len(found)}")
    return found


@torch.no_grad()
def view(encoders: Encoders, name: str, file: str) -> tuple[Tensor, Image.Image, str]:
    """Decode a file once, and return its feature (D,) with unit norm, its picture, and what its colours mean."""
    model, modality = encoders.model(name), encoders.encoders[name][1]
    raw = modality.load(file)
    x = model.project(modality.transform(raw)[None].to(model.logit_scale.device)).float()
    return F.normalize(x[0], dim=-1), *draw(modality, raw)


def text_features(encoders: Encoders, texts: Sequence[str], of: str) -> Tensor:
    """Return the features (N, D) of texts by the tower of a modality, or for `text` the one that most of them share."""
    found: Any = encoders.encode(text=texts, of=of)
    return found


def rate(models: Models, name: str, feature: Tensor, texts: Sequence[str]) -> dict[str, Any]:
    """Compare the feature (D,) of a modality with texts; `note` says how to read the figures, if that needs saying."""
    features = text_features(models.encoders, texts, name)
    cosines, scaled = (models.encoders.similarity(feature[None], features, scale)[0] for scale in (None, name))
    figures = {"probabilities": scaled.softmax(dim=0).tolist(), "cosines": cosines.tolist()}
    return {"modality": name, "texts": [*texts], **figures, "note": note(models, name, features.cpu(), texts)}


def note(models: Models, name: str, features: Tensor, texts: Sequence[str]) -> str:
    """Say how many texts are unlike all training captions: less alike than the most similar pairs of captions are."""
    if (known := models.captions.get(name)) is None:
        sense = "heard" if name == "audio" else "seen"
        return f"Training captions are not at hand: use words for what is {sense}. Shares add up to 100 % in any case."
    usual = (known * known.roll(len(known) // 2, 0)).sum(dim=1).quantile(ALIKE)
    nearest = (features @ known.T).amax(dim=1)
    strange, row = int((nearest < usual).sum()), int(nearest.argmin())
    return "" if not strange else (
        f"{strange} of {len(texts)} texts resemble no caption of this encoder's training, so their figures say little. "
        f"To “{texts[row]}”, the nearest of {len(known)} captions has cosine {nearest[row]:.2f}, while "
        f"{1 - ALIKE:.0%} of the pairs of these captions have more than {usual:.2f}."
    )  # fmt: skip


def matrix(encoders: Encoders, files: Sequence[tuple[str, str]], texts: Sequence[str]) -> tuple[Image.Image, str, bool]:
    """Return the cosines between files, pairs of a modality and a path, and texts: as a picture, and as CSV.

    The last result tells whether all are known: between modalities whose text towers differ, none are. Texts are
    encoded for the modality of the file, and for each other by the tower that most modalities share.
    """
    count, size = len(files), len(files) + len(texts)
    if size < 2 or count > MOST_FILES:
        raise UserError(f"give two things to compare or more, with at most {MOST_FILES} files")
    views, found = [view(encoders, name, file) for name, file in files], np.full((size, size), np.nan)
    things = [(name, Path(file).name) for name, file in files] + [(TEXT, text) for text in texts]
    kinds, names = [kind for kind, _ in things], [": ".join(thing) for thing in things]
    towers = {name: id(encoders.model(name).text_model) for name in (TEXT, *dict(files))}
    for tower, name in reversed({tower: name for name, tower in towers.items()}.items()):  # that of TEXT comes last
        rows = [row for row, kind in enumerate(kinds) if kind == TEXT or towers[kind] == tower]
        x = torch.cat([*(views[row][0][None] for row in rows if row < count), text_features(encoders, texts, name)])
        found[np.ix_(rows, rows)] = (x @ x.T).cpu()
    drawn = draw_matrix([*(picture for _, picture, _ in views), *texts], kinds, found)
    return drawn, pd.DataFrame(found, names, names).to_csv(), not np.isnan(found).any()


def segment(encoders: Encoders, name: str, file: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return the share of a picture for which each text is the best, its colour, and the map of the texts' numbers."""
    modality, inputs = encoders.encoders[name][1], dict[str, Any]({name: [file]})
    height, width = (raw := modality.load(file)).shape[-2:]
    if height * width * len(texts) > MOST_SCORES:
        raise UserError(f"{len(texts)} texts are too many for {width} x {height} pixels: give fewer of either")
    classes = encoders.segment(texts, **inputs)[0].cpu().numpy()
    return {
        "texts": [*texts],
        "shares": (np.bincount(classes.ravel(), minlength=len(texts)) / classes.size).round(6).tolist(),
        "colours": [to_hex(PALETTE(number + 1)) for number in range(len(texts))],
        "picture": data_uri(over(draw(modality, raw)[0], classes + 1)),
        "classes": data_uri(Image.fromarray(classes.astype(np.uint8)), "png"),
    }


def arithmetic(encoders: Encoders, name: str, x: Tensor, plus: str, minus: str) -> Tensor:
    """Return the feature (D,) of a file plus that of a text minus that of another, with unit norm; either may be ""."""
    terms = [sign * text_features(encoders, [text], name)[0] for sign, text in ((1, plus), (-1, minus)) if text]
    return F.normalize(sum(terms, x), dim=-1)


def shown_hit(index: Index, hit: Hit) -> dict[str, Any]:
    """Return what a search found: its file below the indexed folder, and a small picture if that can be read."""
    modality: Any = with_options(index.encoders.encoders[hit.modality][1], index.limits)
    picture, (path, _, score, start, end) = "", hit
    with suppress(DecodeError, StopIteration):  # the file may have gone or changed since
        if hasattr(modality, "read_part"):  # without what precedes it
            raw = modality.read_part(path, start or 0, end)
        else:
            raw = next(raw for begin, _, raw in modality.windows(path, index.window) if begin == start)
        picture = data_uri(draw(modality, raw, 240)[0])
    when = "" if end is None else f"{start:g} to {end:g} s"
    file = printable(os.path.relpath(path, index.folder))  # no "path": Gradio would take that for a file to serve
    return {"file": file, "score": score, "start": start, "end": end, "when": when, "picture": picture}
