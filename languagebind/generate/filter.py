"""Measure videos and titles, then mark the entries to leave out, with the reasons. Nothing is deleted.

Measures are kept as fields, and the marks depend on them and the options alone. So other bounds need no new measures.
"""

import html
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..config import UserError, at_least, package
from ..data.tables import VALUE, Format, read_records
from ..data.tally import Tally, count
from ..data.vidal import LEFT_OUT, MEASURED, NUM_FRAMES, SOURCE, read_annotation, texts_of
from ..distributed import own_device
from ..eval.cache import weights_digest
from ..hub.encoders import load
from ..modalities._containers import read_packets
from .annotation import write_entries
from .models import EXTRA, HubModel
from .runners import FOLDER
from .steps import VIDEO, Entry, FileStep, Made

PACKAGES = {"cuts": "scenedetect", "language": "py3langid", "hash": "imagehash"}  # of the measures
needed = partial(package, user="this filter", install=EXTRA)
SURE, UNSURE = 0.4, ("und", "zxx")  # probability that a title's language needs; codes of titles without a language
FLAT, BLANK = 4, "0" * 16  # a frame is blank if its brightness (0..255) deviates less; the hash of blank frames
PARTS = 25  # of a hash, each with a table in FAISS: if fewer bits of two hashes differ, they have one part in common
# A part has bits of all frames, from different places, so that neither blank frames nor still clips fill a table
ORDER = [64 * k + (place + 8 * k) % 64 for place in range(64) for k in range(NUM_FRAMES)]


@dataclass(frozen=True)
class FilterOptions:
    """What to leave out. Each run marks all entries anew, so give every filter that should hold."""

    min_seconds: float = 0.0
    """leave out shorter videos"""
    max_seconds: float = math.inf
    """leave out longer videos"""
    max_cuts: int | None = None
    """leave out videos with more cuts, as the AdaptiveDetector of scenedetect finds them"""
    languages: tuple[str, ...] = ()
    """leave out titles in languages other than these, such as en de; titles too short to tell stay"""
    near_duplicates: int | None = None
    """leave out copies of earlier entries, whose hashes differ in at most so many of 512 bits; try 24"""
    safety_model: str | None = None
    """image-classification model of transformers for the frames: a folder or hub id"""
    unsafe_labels: tuple[str, ...] = ()
    """leave out entries with a frame to which the safety model gives one of these labels"""
    unsafe_above: float = 0.5
    """probability above which a frame has a label"""
    features: str | None = None
    """checkpoint for languagebind.load: leave out copies of earlier entries by features of its modality"""
    similar: float = 0.95
    """smallest cosine between the features of copies"""
    exclude_features: tuple[Path, ...] = ()
    """leave out copies of evaluation sets: .npy files of their features (N, D) by the same checkpoint"""
    exclude_ids: tuple[Path, ...] = ()
    """leave out evaluation sets: files with one id a line, of entries or videos; YouTube ids match what they begin"""
    device: str | None = None
    """device of the models; None: a GPU if there is one"""

    def __post_init__(self):
        at_least(0, min_seconds=self.min_seconds, max_cuts=self.max_cuts, near_duplicates=self.near_duplicates)
        if not (self.measures or self.features or self.exclude_ids):
            raise UserError("name what to leave out, such as --min-seconds 2")
        if bool(self.safety_model) != bool(self.unsafe_labels) or (self.exclude_features and not self.features):
            raise UserError("--unsafe-labels go with --safety-model, and --exclude-features with --features")

    @property
    def measures(self) -> list[str]:
        """Names of the measures that the filters need."""
        needs = {"seconds": self.min_seconds > 0 or self.max_seconds < math.inf, "cuts": self.max_cuts is not None}
        needs |= {"language": bool(self.languages), "hash": self.near_duplicates is not None}
        return [name for name, needed in needs.items() if needed] + [str(self.safety_model)] * bool(self.safety_model)


class Copies(NamedTuple):
    """Entries in a FAISS index, and the reason to leave out the copies of each."""

    read: Callable[[Entry], np.ndarray | None]
    index: Any
    near: Callable[[Any], bool]
    reasons: list[str]

    def add(self, row: np.ndarray, reason: str) -> None:
        self.index.add(row[None])
        self.reasons.append(reason)

    def reason(self, row: np.ndarray) -> str | None:
        (distance,), (place,) = (found[0] for found in self.index.search(row[None], 1))
        return self.reasons[place] if place >= 0 and self.near(distance) else None


class Filter(FileStep):
    """Measures each entry and, at the end, marks all."""

    name, source = "filter", "media"

    def __init__(self, root: Path, options: FilterOptions):
        super().__init__(root, options)
        self.safety: Any = HubModel(options.safety_model) if options.safety_model else None
        self.labels = [*self.safety.config.get("id2label", {}).values()] if self.safety else []
        if unknown := {*options.unsafe_labels} - {*self.labels}:
            raise UserError(f"the labels of {options.safety_model} are {', '.join(self.labels)}, not {min(unknown)}")

    def record(self) -> dict[str, Any]:
        self._sets()  # finds mistakes in these now, not after hours of measuring
        used = {name: other for name, other in PACKAGES.items() if name in self.options.measures}
        found: dict[str, Any] = {name: {other: needed(other).__version__} for name, other in used.items()}
        if self.safety:
            found[self.safety.name] = self.safety.record()
        if self.options.features:
            weights = weights_digest(self._encoders.model(*self._encoders.modalities))
            found["features"] = {"model": self.options.features, "weights_sha256": weights}
        return found

    def skips(self, fields: Mapping[str, Any]) -> bool:
        return False  # other bounds may let an entry in again

    def results(self, entry: Entry) -> list[Path]:
        features = self.root / FOLDER / self.name / "features" / f"{entry.id}.npy"
        return [features] if self.options.features else []

    def is_done(self, entry: Entry) -> bool:
        return super().is_done(entry) and not self._missing(entry)

    def make(self, entry: Entry) -> Made:
        found = {name: self._measure(name, entry) for name in self._missing(entry)}
        files = {path: self._features(entry) for path in self.results(entry) if not path.exists()}
        return Made(files, {MEASURED: entry.fields.get(MEASURED, {}) | found} if found else {})

    def finish(self, annotation: Path) -> dict[str, Any]:
        """Mark the entries to leave out, and no others. Return how many, how many stay, and the numbers by reason."""
        notes: Tally = {}
        write_entries(annotation, self._marked(annotation, notes))
        numbers = {name: notes.pop(name, {"count": 0})["count"] for name in ("left out", "kept")}
        return {**numbers, "notes": notes}

    def _marked(self, annotation: Path, notes: Tally) -> Iterator[Entry]:
        spaces, lists = self._sets()

        def read() -> Iterator[tuple[Entry, list[str], list[tuple[Copies, np.ndarray]]]]:
            for entry in starmap(Entry, read_annotation(annotation)):
                rows = ((space, space.read(entry)) for space in spaces)
                yield entry, listed(entry, lists), [(space, row) for space, row in rows if row is not None]

        # Entries of evaluation sets come first, so that their copies are left out wherever they are
        for entry, reasons, rows in read() if spaces and lists else ():
            for space, row in rows if reasons else ():
                space.add(row, f"copy of one {reasons[0]}: {entry.id}")
        for entry, reasons, rows in read():
            reasons += self._reasons(entry.fields.get(MEASURED, {}))
            reasons = reasons or [reason for space, row in rows if (reason := space.reason(row))]
            for space, row in () if reasons else rows:
                space.add(row, f"copy: {entry.id}")
            unmeasured = () if self.is_done(entry) else ["not measured"]
            for reason in (*reasons, *unmeasured, "left out" if reasons else "kept"):
                count(notes, reason.partition(": ")[0], {"id": entry.id, "detail": f"{entry.id}, {reason}"})
            fields = {name: value for name, value in entry.fields.items() if name != LEFT_OUT}
            yield Entry(entry.id, fields | ({LEFT_OUT: reasons} if reasons else {}))

    def _reasons(self, measured: Mapping[str, Any]) -> Iterator[str]:
        """Yield why the measures of an entry leave it out."""
        options, seconds = self.options, measured.get("seconds", math.nan)
        if seconds < options.min_seconds or seconds > options.max_seconds:
            yield f"too {'short' if seconds < options.min_seconds else 'long'}: {seconds:g} s"
        if options.max_cuts is not None and (cuts := measured.get("cuts", 0)) > options.max_cuts:
            yield f"too many cuts: {cuts}"
        if options.languages and (language := measured.get("language", "und")) not in (*options.languages, *UNSURE):
            yield f"language: {language}"
        for label in options.unsafe_labels:
            if (score := measured.get(str(options.safety_model), {}).get(label, 0)) > options.unsafe_above:
                yield f"{label}: {score:g}"

    def _missing(self, entry: Entry) -> list[str]:
        return [name for name in self.options.measures if name not in entry.fields.get(MEASURED, {})]

    def _measure(self, name: str, entry: Entry) -> Any:
        if name == "language":
            title = html.unescape(" ".join(texts_of(entry.fields.get("raw"))))
            return self._languages.classify(title.partition("#")[0])[0]
        if name in ("seconds", "cuts"):
            video = entry.video(self.root)
            times = np.array(read_packets(video, "video", math.inf).times)  # NaN where unknown; refuses damaged files
            if name == "seconds":
                return round(float(np.nanmax(times) - np.nanmin(times)) * len(times) / max(1, len(times) - 1), 3)
            own = needed("scenedetect")
            scenes = own.detect(str(video), own.AdaptiveDetector(), start_in_scene=True, backend="pyav")
            return len(scenes) - 1
        frames = VIDEO.decode(entry.places(self.root, "video")[1])  # (T, 3, H, W)
        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
        if name == "hash":
            blank = frames.float().mean(dim=1).std(dim=(1, 2)) < FLAT
            hashes = map(needed("imagehash").phash, pictures)
            return "".join(BLANK if flat else str(x) for flat, x in zip(blank, hashes, strict=True))
        found = [each for frame in self._classifier(pictures, top_k=len(self.labels)) for each in frame]
        return {x: round(max(each["score"] for each in found if each["label"] == x), 4) for x in self.labels}

    def _features(self, entry: Entry) -> bytes:
        """Return the features (D,) of an entry's medium, the mean of several pictures, as a NumPy file."""
        (kind,) = self._encoders.modalities
        known = entry.places(self.root, kind)
        files = next((files for files in known if files[0].exists()), known[0])
        items = [files] if kind == "video" and len(files) > 1 else files
        x = self._encoders.encode(**{kind: items}).mean(dim=0)
        file = io.BytesIO()
        np.save(file, (x / x.norm()).cpu().numpy())
        return file.getvalue()

    def _sets(self) -> tuple[list[Copies], list[tuple[str, set[str]]]]:
        """Return the spaces to find copies in, with the features of evaluation sets, and the ids in each file."""
        spaces, options, bits = list[Copies](), self.options, len(ORDER)

        def vector(entry: Entry) -> np.ndarray | None:
            return np.load(path) if (path := self.results(entry)[0]).exists() else None

        if (most := options.near_duplicates) is not None:
            tables = needed("faiss").IndexBinaryMultiHash(bits, PARTS, bits // PARTS)
            tables.nflip = most // PARTS
            spaces.append(Copies(code_of, tables, lambda distance: distance <= most, []))
        if options.features:
            size = self._encoders.model(*self._encoders.modalities).embed_dim
            index = needed("faiss").IndexHNSWFlat(size, 32)
            index.hnsw.efSearch = 128
            spaces.append(Copies(vector, index, lambda squared: 1 - squared / 2 >= options.similar, []))
            for path in options.exclude_features:
                rows = np.load(path).astype(np.float32)
                if rows.ndim != 2 or rows.shape[1] != size or not np.isfinite(rows).all():
                    raise UserError(f"{path} should hold finite features (N, {size}); its shape is {rows.shape}")
                for number, row in enumerate(rows):
                    spaces[-1].add(row / np.linalg.norm(row), f"copy of one in {path.name}: row {number}")
        lines = ((path.name, read_records(path, Format("txt"))) for path in options.exclude_ids)
        return spaces, [(name, {row[VALUE] for _, row in rows}) for name, rows in lines]

    @cached_property
    def _languages(self) -> Any:
        own = needed("py3langid").langid
        return own.LanguageIdentifier.from_model_file(own.MODEL_FILE, norm_probs=True, min_confidence=SURE)

    @cached_property
    def _encoders(self) -> Any:
        found = load(str(self.options.features), device=own_device(self.options.device))
        if len(found.modalities) > 1:
            raise UserError(f"{self.options.features} has {', '.join(found.modalities)}: name a checkpoint of one")
        return found

    @cached_property
    def _classifier(self) -> Any:
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

        device = own_device(self.options.device)
        model, processor = self.safety.load(AutoModelForImageClassification, AutoImageProcessor, device)
        return pipeline("image-classification", model, image_processor=processor, device=model.device)


def listed(entry: Entry, lists: list[tuple[str, set[str]]]) -> list[str]:
    """Return a reason for each list that has an entry's id, its video's name, or the YouTube id that begins one."""
    names = {entry.id, Path(entry.fields.get(SOURCE, entry.id)).stem}
    names |= {name[:11] for name in names if not name[11:12].isalnum()}
    return [f"in {name}" for name, ids in lists if not ids.isdisjoint(names)]


def code_of(entry: Entry) -> np.ndarray | None:
    """Return the bits of an entry's hash in ORDER, packed (64,), or None if it has none or most frames are blank."""
    text = entry.fields.get(MEASURED, {}).get("hash", "")
    if sum(text[k : k + 16] != BLANK for k in range(0, len(text), 16)) < NUM_FRAMES // 2:
        return None
    return np.packbits(np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[ORDER])
