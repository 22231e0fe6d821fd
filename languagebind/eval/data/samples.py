"""List the samples of a dataset once in a fixed order, so that any number of workers can read them at random.

Class folders: `<data>/<label>/**/<file>`, except hidden files and files in hidden folders. Links are followed.
Manifest: a .csv, .tsv or .jsonl file with `path` (below the manifest's folder or the data root), `label` or `labels`,
`caption` or `captions`, or `mask`, a picture of class indices; and optionally `id`, which matches samples across
modalities (`pairing.py`). In a .csv, `|` separates the values of a plural column. Rows with one path are one sample.
Shards: .tar files. A sample is its media member and `<key>.json` with `label` or `labels`, `caption` or `captions`,
or CLIP_benchmark's `.cls` (class index), `.npy` (0 or 1 per class), `.txt` (one caption per line).

A label is the label or the index of a class. Captions are one text, a list of texts, or either of these per source.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...config import UserError, digest
from ...data.tables import as_list, columns_of, read_manifest
from ...data.vidal import NOT_TEXT, caption_fault
from ...distributed import gather_objects
from ...files import files_below, is_plain, mend
from ...modalities import DecodeError, Modality
from .datasets import Counted, DatasetConfig, find, not_there
from .shards import Member, list_shards, read_shard

log = logging.getLogger(__name__)

Source = Path | Member
MANIFESTS = (".csv", ".tsv", ".jsonl")
PREPARED = ".prepare.json"  # ending of the report that `prepare` writes beside the data


@dataclass(frozen=True)
class Sample:
    """One thing to encode. `source` is a tuple if each frame is a file, and None if the sample has no media."""

    key: str
    source: Source | tuple[Source, ...] | None
    labels: tuple[str | int, ...] = ()
    captions: tuple[str, ...] = ()
    bad_captions: int = 0  # left out, because they are not valid text
    id: str | None = None
    held: str = ""  # what a sample without media holds instead, for messages
    masks: tuple[Path, ...] = ()  # one for segmentation

    def load(self, num_frames: int) -> Path | bytes | list[Path | bytes]:
        """Return what `Modality.decode` reads; only the middle frame if `num_frames` is 1. May raise `DecodeError`."""
        if not isinstance(self.source, tuple):
            return self._contents(self.source)
        if num_frames == 1:
            return self._contents(self.source[len(self.source) // 2])
        return [self._contents(frame) for frame in self.source]

    def is_there(self) -> bool:
        """Tell whether all of the sample's files exist, and it has some."""
        sources = self.source if isinstance(self.source, tuple) else (self.source,)
        return all(isinstance(source, Member) or (source is not None and source.is_file()) for source in sources)

    def _contents(self, source: Source | None) -> Path | bytes:
        if isinstance(source, Member):
            return source.read()
        if source is None or not source.is_file():
            absent = f"the sample holds no file that this modality reads{self.held and f'; {self.held}'}"
            reason = absent if source is None else f"No such file: {source}; is --data-root right?"
            raise DecodeError(source or self.key, reason)
        return source


def read_samples(config: DatasetConfig, modality: Modality, skip_bad: bool = False) -> list[Sample]:
    """Return the samples of a dataset, or with `limit` that many of them, evenly spaced over the data.

    For classification they are evenly spaced within each label, so that each class keeps its share, up to rounding.
    With `skip_bad`, samples without the labels or captions of the task are left out with a warning, unless all are.
    Raises `UserError` if the data is missing, empty, of an unknown kind, or lacks the labels or captions of its task.
    """
    samples = list_samples(config, modality)
    if not samples:
        raise UserError(f"{config.name}: no samples in {config.data}")
    warn_of_count(config, "samples", len(samples))
    warn_of_count(config, "captions", sum(len(sample.captions) for sample in samples))
    if config.limit is not None and config.limit < len(samples):
        samples = _evenly_spaced(samples, config.limit, config.task == "classification")
    what = {"retrieval": "captions", "segmentation": "masks"}.get(config.task, "labels")
    counts = [len(getattr(sample, what)) for sample in samples]
    wrong = {i for i, count in enumerate(counts) if count == 0 or (config.task == "classification" and count > 1)}
    if bad := [sample for sample in samples if sample.bad_captions]:
        number = sum(sample.bad_captions for sample in bad)
        log.warning("%s: left out %d captions that are %s, the first of %s", config.name, number, NOT_TEXT, bad[0].key)
        wrong = wrong if len(wrong) == len(samples) else {i for i in wrong if not samples[i].bad_captions}
    # Some samples of multi-label data have no label
    if wrong and (config.task != "multilabel" or len(wrong) == len(samples)):
        example = f"{samples[min(wrong)].key} has {counts[min(wrong)]} {what}"
        message = f"{config.name}: {len(wrong)} of {len(samples)} samples do not fit {config.task}: {example}"
        if not skip_bad or len(wrong) == len(samples):
            raise UserError(message if len(wrong) == len(samples) else f"{message}; --skip-bad leaves them out")
        log.warning("%s; the evaluation leaves them out", message)
        samples = [sample for i, sample in enumerate(samples) if i not in wrong]
    return samples


def _evenly_spaced(samples: list[Sample], count: int, by_label: bool) -> list[Sample]:
    """Return `count` evenly spaced samples in the order of the data. With `by_label`, space them within each label."""
    places = list(range(len(samples)))
    if by_label:
        rank = {labels: number for number, labels in enumerate(dict.fromkeys(sample.labels for sample in samples))}
        places.sort(key=lambda place: rank[samples[place].labels])
    step = len(samples) / count
    return [samples[place] for place in sorted(places[int((i + 0.5) * step)] for i in range(count))]


def warn_of_count(config: DatasetConfig, what: Counted, count: int) -> None:
    """Warn if the data has another number of samples, captions or classes than the dataset: the task then differs."""
    if count != config.expect.get(what, count):
        log.warning("%s: found %d %s, but the dataset has %d", config.name, count, what, config.expect[what])


def digest_of_samples(facts: Any, name: str) -> str:
    """Return the hash of the facts that identify a dataset's samples, and check that all ranks agree on it."""
    found = digest(facts)
    if len(set(gather_objects(found))) > 1:
        raise UserError(f"{name}: the ranks see different samples: use the same data on every node")
    return found


def count_missing(config: DatasetConfig) -> int | None:
    """Return the number of samples that `prepare --skip-missing` left out, or None if there is no report of it."""
    report = Path(config.data + PREPARED)
    try:
        missing = len(json.loads(report.read_text(encoding="utf-8"))["missing"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if missing:
        log.warning("%s: prepare left out %d samples with a missing file (see %s)", config.name, missing, report)
    return missing


def check_data(config: DatasetConfig) -> None:
    """Raise `UserError` if the data or one of its shards does not exist. No file is read."""
    if not list_shards(config.data) and not os.path.exists(config.data):
        raise not_there(config, Path(config.data))


def class_names(config: DatasetConfig) -> dict[str, str]:
    """Return label -> name in prompts, in class order. Without names in the config, they are the folders or labels."""
    if config.class_names is not None:
        return dict(config.class_names)
    manifest = Path(config.data)
    if manifest.suffix in MANIFESTS:
        names = sorted({str(label) for sample in _from_manifest(manifest, config) for label in sample.labels})
        names = [] if any(map(str.isdecimal, names)) else names  # numbers stand for names that are elsewhere
    else:
        names = [] if list_shards(config.data) else _class_folders(config)
    if names:
        return {name: mend(name).replace("_", " ") for name in names}
    raise UserError(f"{config.name}: class_names is needed, since {config.data} does not name its classes")


def list_samples(config: DatasetConfig, modality: Modality) -> list[Sample]:
    """Return all samples, even without labels or captions. Raises `UserError` if the data is missing or unknown."""
    check_data(config)
    data = Path(config.data)
    if shards := list_shards(config.data):
        num_classes = None if config.class_names is None else len(config.class_names)
        samples = []
        for shard in shards:
            for key, source, row, held in read_shard(shard, modality.extensions, num_classes):
                name = f"{shard.name}/{key}"
                samples.append(Sample(name, source, *_annotation(row, name, config), held=held))
        return samples
    if data.suffix in MANIFESTS:
        return _from_manifest(data, config)
    if _class_folders(config):
        return [sample for sample in list_files(data) if sample.labels]
    raise UserError(f"{config.name}: {config.data} is not a .csv or .jsonl manifest, shards or class folders")


def list_files(folder: Path) -> list[Sample]:
    """Return every file below a folder as a sample. Its label is the name of the top folder on its path, if any."""
    paths = [file.relative_to(folder) for file in files_below(folder)]
    return [Sample(path.as_posix(), folder / path, path.parts[:-1][:1]) for path in paths]


def _class_folders(config: DatasetConfig) -> list[str]:
    root = Path(config.data).resolve()
    folders = sorted(Path(config.data).glob("[!.]*/"))
    for folder in folders:
        if folder.is_symlink() and root in (folder.resolve(), *folder.resolve().parents):
            raise UserError(f"{config.name}: the class folder {folder} is a link to files of another class: remove it")
    return [folder.name for folder in folders]


def _from_manifest(manifest: Path, config: DatasetConfig) -> list[Sample]:
    samples: dict[tuple[str, ...], Sample] = {}
    folders = (manifest.parent, *([Path(config.data_root)] if config.data_root else []))
    for where, row in read_manifest(manifest, columns=config.columns):
        paths = as_list(row.get("path"))
        if not paths or not all(isinstance(path, str) and path for path in paths):
            needs = "a row needs a path (or a list of frames), and label(s) or caption(s)"
            own = columns_of(row, config.columns)
            raise UserError(f"{where}: {needs}; its columns are {own}; set `columns` if they have other names")
        labels, captions, bad = _annotation(row, where, config)
        files = tuple(find(path, folders) or manifest.parent / path for path in paths)
        name = None if row.get("id") is None else str(row["id"])
        source = files if isinstance(row["path"], list) else files[0]
        masks = tuple(find(mask, folders) or manifest.parent / mask for mask in as_list(row.get("mask")))
        old = samples.get(tuple(paths)) or Sample(paths[0], source, masks=masks, id=name)
        # A repeated caption counts as two queries, but a repeated label as one label
        labels = tuple(dict.fromkeys(old.labels + labels))
        bad += old.bad_captions
        samples[tuple(paths)] = replace(old, labels=labels, captions=old.captions + captions, bad_captions=bad)
    return list(samples.values())


def _annotation(record: Mapping[str, Any], where: str, config: DatasetConfig) -> tuple[tuple, tuple[str, ...], int]:
    """Return the labels and captions in a manifest's row or a shard's sample, and the number of captions left out."""
    labels = as_list(record.get("label")) + as_list(record.get("labels"))
    captions: list[Any] = []
    if config.task == "retrieval":  # The other tasks need no caption source
        values = [record[key] for key in ("caption", "captions") if record.get(key) is not None]
        if any(isinstance(value, dict) for value in values):  # A plain caption has the source `caption`
            named = [value if isinstance(value, dict) else {"caption": value} for value in values]
            sources = {source: texts for value in named for source, texts in value.items()}
            if len(sources) != 1 and not config.caption_source:
                choices = ", ".join(sources)
                raise UserError(f"{where}: captions from {choices}: choose one with caption_source in the config")
            values = [sources.get(config.caption_source or next(iter(sources)))]
        captions = [caption for value in values for caption in as_list(value)]
    if not all(type(x) in (str, int) and is_plain(str(x)) for x in labels):  # not isinstance, because True is an int
        raise UserError(f"{where}: labels should be text or class indices, not {labels!r}")
    if not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: captions should be text, not {captions!r}")
    faults = [caption_fault(caption) for caption in captions]
    texts = tuple(mend(text).strip() for text, fault in zip(captions, faults, strict=True) if not fault)
    return tuple(dict.fromkeys(labels)), texts, faults.count(NOT_TEXT)
