"""The samples of a dataset, listed once and in a fixed order, to be read at random by any number of workers.

Class folders: `<data>/<label>/**/<file>`, every file that is not hidden, nor in a hidden folder. Links are followed,
but for those to another class's folder, or to one that the class's folder lies in.
Manifest: a .csv or .jsonl file with `path` (from the manifest's folder, or the data root), `label` or `labels`,
`caption` or `captions`, and perhaps `id`, which says what belongs together across modalities (`pairing.py`). In a
.csv the plural columns are separated by `|`. Rows with the same path are one sample.
Shards: .tar files. A sample is its media member and `<key>.json` with `label` or `labels`, `caption` or `captions`;
or CLIP_benchmark's `.cls` (class index), `.npy` (0/1 a class), `.txt` (a caption a line).

A label is a class's label, or its index. Captions are one text, a list, or either of these by caption source.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...config import UserError, digest
from ...distributed import gather_objects
from ...files import check_regular, files_below, is_plain, lies_in, twice
from ...modalities import DecodeError, Modality
from .datasets import DatasetConfig, not_there
from .manifests import read_rows
from .shards import Member, list_shards, read_shard

log = logging.getLogger(__name__)

Source = Path | Member
PREPARED = ".prepare.json"  # of what `prepare` made, beside the data


@dataclass(frozen=True)
class Sample:
    """One thing to encode. `source` is a tuple where every frame is a file, and None where the sample has no media."""

    key: str
    source: Source | tuple[Source, ...] | None
    labels: tuple[str | int, ...] = ()
    captions: tuple[str, ...] = ()
    id: str | None = None

    def load(self, num_frames: int) -> Path | bytes | list[Path | bytes]:
        """What `Modality.decode` takes: a path, the bytes of a member, or a list of these.

        Of frame files, a modality without frames is given the middle one.

        Raises:
            DecodeError: there is no media, or a path leads to no file.
        """
        if self.source is None:
            raise DecodeError(self.key, "the sample holds no file that this modality reads")
        if not isinstance(self.source, tuple):
            return _contents(self.source)
        if num_frames == 1:
            return _contents(self.source[len(self.source) // 2])
        return [_contents(frame) for frame in self.source]


def read_samples(config: DatasetConfig, modality: Modality) -> list[Sample]:
    """Every sample of the dataset; with `limit`, that many, evenly spaced over the data.

    In classification these are evenly spaced within each label, so that each class keeps its share, but for rounding.

    Raises:
        UserError: the data is missing, empty, of no known kind, or lacks the labels or captions of its task.
    """
    samples = list_samples(config, modality)
    if not samples:
        raise UserError(f"{config.name}: no samples in {config.data}")
    warn_of_count(config, "samples", len(samples))
    warn_of_count(config, "captions", sum(len(sample.captions) for sample in samples))
    if config.limit is not None and config.limit < len(samples):
        samples = _evenly_spaced(samples, config.limit, config.task == "classification")
    wanted = "captions" if config.task == "retrieval" else "labels"
    counts = [len(getattr(sample, wanted)) for sample in samples]
    if not any(counts):
        raise UserError(f"{config.name}: the samples in {config.data} have no {wanted}, which {config.task} needs")
    # In multi-label data a sample may well have no label.
    if config.task == "retrieval" and not all(counts):
        raise UserError(f"{config.name}: {samples[counts.index(0)].key} has no caption ({counts.count(0)} have none)")
    if config.task == "classification" and set(counts) != {1}:
        odd = next(i for i, count in enumerate(counts) if count != 1)
        raise UserError(f"{config.name}: {samples[odd].key} has {counts[odd]} labels, classification needs one each")
    return samples


def _evenly_spaced(samples: list[Sample], count: int, by_label: bool) -> list[Sample]:
    """`count` samples in the order of the data; `by_label`, taken label by label."""
    places = list(range(len(samples)))
    if by_label:
        first_seen: dict[tuple, int] = {}
        for sample in samples:
            first_seen.setdefault(sample.labels, len(first_seen))
        places.sort(key=lambda place: first_seen[samples[place].labels])
    step = len(samples) / count
    return [samples[place] for place in sorted(places[int((i + 0.5) * step)] for i in range(count))]


def warn_of_count(config: DatasetConfig, what: str, count: int) -> None:
    """Say where the data has another number of samples, captions or classes than the dataset: it is another task."""
    if count != config.expect.get(what, count):
        log.warning("%s: %d %s, the dataset has %d", config.name, count, what, config.expect[what])


def digest_of_samples(facts: Any, name: str) -> str:
    """A hash of what tells a dataset's samples from others.

    Raises:
        UserError: another rank sees others; every rank must call this.
    """
    found = digest(facts)
    if len(set(gather_objects(found))) > 1:
        raise UserError(f"{name}: the ranks see other samples: have the same data on every node")
    return found


def count_missing(config: DatasetConfig) -> int | None:
    """How many samples `prepare --skip-missing` left out of the data; None where it is not `prepare`'s."""
    report = Path(config.data + PREPARED)
    try:
        missing = len(json.loads(report.read_text(encoding="utf-8"))["missing"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if missing:
        log.warning("%s: prepare left out %d samples whose file was missing (%s)", config.name, missing, report)
    return missing


def check_data(config: DatasetConfig) -> None:
    """What can be said without reading the data: raises UserError if it, or one of its shards, is not there."""
    if not list_shards(config.data) and not os.path.exists(config.data):
        raise not_there(config, Path(config.data))


def class_names(config: DatasetConfig) -> dict[str, str]:
    """Label -> name in prompts, in class order: the config's, else the sorted class folders with spaces for `_`.

    Raises:
        UserError: the config names no classes and the data is no folder of class folders.
    """
    if config.class_names is not None:
        return dict(config.class_names)
    if not Path(config.data).is_dir() or list_shards(config.data):
        raise UserError(f"{config.name}: class_names is needed, as {config.data} is no folder of class folders")
    return {folder.name: folder.name.replace("_", " ") for folder in _class_folders(config)}


def list_samples(config: DatasetConfig, modality: Modality) -> list[Sample]:
    """All there is, perhaps without what the task needs. Raises UserError as `read_samples`."""
    check_data(config)
    data = Path(config.data)
    shards = list_shards(config.data)
    if shards:
        num_classes = len(config.class_names) if config.class_names is not None else None
        return [
            Sample(f"{shard.name}/{key}", source, *_annotation(record, f"{shard.name}/{key}", config))
            for shard in shards
            for key, source, record in read_shard(shard, modality.extensions, num_classes)
        ]
    if data.suffix in (".csv", ".jsonl"):
        return _read_manifest(data, config)
    if data.is_dir():
        folders = _class_folders(config)
        owners = frozenset(map(os.path.realpath, folders))
        return [
            Sample(file.relative_to(data).as_posix(), file, (folder.name,))
            for folder in folders
            for file in visible_files(folder, config.name, owners)
        ]
    raise UserError(f"{config.name}: {config.data} is no .csv or .jsonl manifest, .tar file or folder")


def _class_folders(config: DatasetConfig) -> list[Path]:
    data = os.path.realpath(config.data)
    folders = sorted(f for f in Path(config.data).iterdir() if f.is_dir() and not f.name.startswith("."))
    places = {folder: os.path.realpath(folder) for folder in folders}
    # A link to a folder that the data lies in is a loop, and no class.
    folders = [folder for folder in folders if not lies_in(data, places[folder])]
    if not folders:
        raise UserError(f"{config.name}: {config.data} holds neither class folders nor shards")
    if place := twice(places[folder] for folder in folders):
        names = " and ".join(folder.name for folder in folders if places[folder] == place)
        raise UserError(f"{config.name}: the class folders {names} of {config.data} are one folder: keep one of them")
    return folders


def visible_files(folder: Path, name: str, owners: frozenset[str] = frozenset()) -> Iterable[Path]:
    """`files_below`, for the dataset `name`; a file that cannot be decoded is then reported, not passed over.

    Raises:
        UserError: a folder cannot be listed.
    """
    try:
        yield from files_below(folder, owners=owners)
    except OSError as error:
        raise UserError(f"{name}: cannot list {error.filename}: {error.strerror}") from error


def _read_manifest(manifest: Path, config: DatasetConfig) -> list[Sample]:
    samples: dict[str | tuple[str, ...], Sample] = {}
    for number, row in read_rows(manifest):
        path, where = row.get("path"), f"{manifest}:{number}"
        if not path or not all(isinstance(frame, str) and is_plain(frame) for frame in _as_list(path)):
            raise UserError(f"{where}: a row needs a path (or a list of frames), and label(s) or caption(s)")
        labels, captions = _annotation(row, where, config)
        place = path if isinstance(path, str) else tuple(path)
        key = path if isinstance(path, str) else path[0]
        name = None if row.get("id") is None else str(row["id"])
        old = samples.get(place) or Sample(key, _source(path, manifest, config), id=name)
        # A caption that is there twice is two queries; a label that is there twice is one label.
        samples[place] = replace(old, labels=_unique(old.labels + labels), captions=old.captions + captions)
    return list(samples.values())


def _source(path: str | list[str], manifest: Path, config: DatasetConfig) -> Source | tuple[Source, ...]:
    if not isinstance(path, str):
        return tuple(_source(frame, manifest, config) for frame in path)
    beside = manifest.parent / path
    if config.data_root is None or os.path.exists(beside):
        return beside
    below_root = Path(config.data_root) / path
    return below_root if os.path.exists(below_root) else beside


def _annotation(record: dict[str, Any], where: str, config: DatasetConfig) -> tuple[tuple, tuple[str, ...]]:
    """The labels and captions of a manifest row or of a shard's metadata, under their singular or plural names."""
    labels = _as_list(record.get("label")) + _as_list(record.get("labels"))
    # In Python true and false are numbers too.
    if not all(isinstance(label, (str, int)) and not isinstance(label, bool) for label in labels):
        raise UserError(f"{where}: labels should be text or class indices, not {labels!r}")
    captions: list[Any] = []
    if config.task == "retrieval":  # other tasks need not say which caption source they would mean
        for value in (record.get("caption"), record.get("captions")):
            captions += _as_list(_choose_source(value, where, config))
        if not all(isinstance(caption, str) and is_plain(caption) for caption in captions):
            raise UserError(f"{where}: captions should be text, not {captions!r}")
    return _unique(labels), tuple(text for text in (caption.strip() for caption in captions) if text)


def _choose_source(value: Any, where: str, config: DatasetConfig) -> Any:
    """Captions by source to those of the source asked for; which one to use is never guessed."""
    if not isinstance(value, dict):
        return value
    source = config.caption_source or (next(iter(value)) if len(value) == 1 else None)
    if source is None:
        raise UserError(f"{where}: captions from {', '.join(value)}: choose one with caption_source in the config")
    return value.get(source)


def _contents(source: Source) -> Path | bytes:
    if isinstance(source, Member):
        return source.read()
    try:
        check_regular(source)
    except OSError as error:
        raise DecodeError(source, error.strerror) from error
    return source


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _unique(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))
