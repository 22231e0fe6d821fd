"""Cache features on disk, so that a killed run resumes and a repeated run encodes nothing.

A folder holds the features of one combination of weights, options and rules, with one file per batch. Files are written
atomically. A batch is found again only if it has the same files or texts in the same order. The weights and the
`fingerprint` of a model must tell it apart from others, because its code is not examined.
"""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load, save
from torch import Tensor

from .. import __version__
from ..config import digest, to_dict
from ..distributed import gather_objects
from ..modalities import modality_name
from ..modalities._images import PREPROCESSING
from ..weights import hash_tensor
from .data.readers import EvalProtocol
from .data.samples import Sample
from .results import write_output

log = logging.getLogger(__name__)

DECODERS = ("pillow", "torchvision", "av", "opencv-python-headless", "decord", "torchcodec", "soundfile", "torchaudio")
ADDED = (*PREPROCESSING, "frames_per_second")  # options that older caches lack: their defaults change no feature
CHECKSUM_BYTES = 32  # at the start of a file


class FeatureCache:
    """A folder `<prefix>-<hash>` with a file of features per batch; the hash covers all but samples and prompts."""

    def __init__(self, prefix: Path, model: Any, protocol: EvalProtocol, precision: str):
        modality = protocol.reader.modality
        usual = [key for key in ADDED if getattr(modality, key, None) == getattr(type(modality), key, None)]
        inputs = {key: value for key, value in to_dict(modality).items() if key not in usual}
        versions = {"languagebind": __version__, "torch": torch.__version__}
        for package in DECODERS:  # Another version of a decoder may give other pixels
            with suppress(PackageNotFoundError):
                versions[package] = version(package)
        facts = {
            "weights": weights_digest(model),
            "text_fingerprint": model.text_fingerprint(),
            "device": model.logit_scale.device.type,
            "modality": modality_name(modality),
            "inputs": inputs,
            "precision": precision,
            "rules": protocol.describe(),
            "versions": versions,
        }
        self.folder = Path(f"{prefix}-{gather_objects(digest(facts))[0][:32]}")

    def get(self, items: Sequence[Any]) -> Tensor | None:
        """Return the features (B, D) of a batch, or None if they are not cached. `items` identify the batch."""
        path = self._path(items)
        if not path.is_file():
            return None
        data = path.read_bytes()
        if hashlib.sha256(data[CHECKSUM_BYTES:]).digest() != data[:CHECKSUM_BYTES]:
            log.warning("%s is damaged: its features are computed again", path)
            return None
        return load(data[CHECKSUM_BYTES:])["features"]

    def put(self, items: Sequence[Any], features: Tensor) -> None:
        """Write the features of a batch. Raises `UserError` if writing fails, for example on a full disk."""
        data = save({"features": features.cpu().contiguous()})
        own = self._path(items).with_suffix(f".{uuid4().hex}")  # another run may write the same batch meanwhile
        write_output(own, hashlib.sha256(data).digest() + data)
        own.replace(self._path(items))

    def _path(self, items: Sequence[Any]) -> Path:
        return self.folder / f"{digest(items)}.features"


def identity(sample: Sample) -> list[Any]:
    """Return the path, size and modification time of each of a sample's files. A changed file has another identity."""
    found: list[Any] = []
    for source in sample.source if isinstance(sample.source, tuple) else (sample.source,):
        if source is not None:
            member = [] if isinstance(source, Path) else [source.name, source.offset, source.size]
            path = source if isinstance(source, Path) else source.shard
            status = path.stat() if path.exists() else None
            found.append([str(path.absolute()), status and [status.st_size, status.st_mtime_ns], *member])
    return found


def weights_digest(model) -> str:
    """Return the SHA-256 of a module's structure and state."""
    total = hashlib.sha256(repr(model).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            hash_tensor(total, name, value)
        else:  # a module's extra state
            total.update(f"{name} {value!r}".encode())
    return total.hexdigest()
