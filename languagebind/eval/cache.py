"""Features kept on disk, so that a run that was killed goes on, and one that is repeated encodes nothing.

A folder holds what was made of the same weights, options and rules: parts of a few batches each, written whole or not
at all. A batch is found again only if it holds the same files or texts in the same order: then its features are those
that encoding it would give, bit for bit. A part's name holds the checksum of its contents.
"""

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from ..config import UserError, digest
from ..files import write_atomic
from .data.samples import Sample, Source

log = logging.getLogger(__name__)

DECODERS = ("pillow", "torchvision", "av", "opencv-python-headless", "decord", "torchcodec", "soundfile", "torchaudio")
PART = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{8}\.safetensors")
BATCHES_PER_PART = 4  # what a killed run has to encode again, at most


class FeatureCache:
    """The features of batches, read from the disk when asked for: each rank writes parts, and finds those of all.

    Args:
        folder: of caches, made if it is not there.
        facts: all that features depend on beside what is in a batch; plain values.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder = Path(folder) / f"{facts['dataset']}-{digest(facts)[:32]}"
        self._stored: dict[str, Path] = {}  # the part of each batch
        self._new: dict[str, Tensor] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "facts.json").exists():
                # Under a name of its own: other ranks write it too
                temporary = self.folder / f"facts.{uuid.uuid4().hex}"
                temporary.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
                temporary.replace(self.folder / "facts.json")
            for part in sorted(self.folder.glob("*.safetensors")):
                if PART.fullmatch(part.name):  # whatever else lies here is not ours
                    self._find(part)
        except OSError as error:
            raise UserError(f"the feature cache {self.folder} cannot be used: {error.strerror}") from error
        log.info("feature cache %s: %d batches", self.folder, len(self._stored))

    def get(self, items: Sequence[Any]) -> Tensor | None:
        """The features (B, D) of a batch, by what identifies its items."""
        name = digest(items)
        if name not in self._stored:
            return None
        try:
            with safe_open(self._stored[name], "pt") as part:
                return part.get_tensor(name)
        except OSError as error:
            raise UserError(f"the feature cache {self.folder} cannot be used: {error}") from error

    def put(self, items: Sequence[Any], features: Tensor) -> None:
        """Keep the features of a batch; they are on the disk after a few more, or after `flush`."""
        self._new[digest(items)] = features.cpu()
        if len(self._new) >= BATCHES_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write what is not on the disk.

        Raises:
            UserError: the disk is full or the folder gone.
        """
        if not self._new:
            return
        data = save(self._new)
        name = f"{hashlib.sha256(data).hexdigest()}.{uuid.uuid4().hex[:8]}.safetensors"
        try:
            write_atomic(self.folder / name, data)
        except OSError as error:
            raise UserError(f"the feature cache {self.folder} cannot be written: {error.strerror}") from error
        self._stored |= dict.fromkeys(self._new, self.folder / name)
        self._new = {}

    def _find(self, part: Path) -> None:
        try:
            data = part.read_bytes()
        except FileNotFoundError:  # another rank found it damaged
            return
        if hashlib.sha256(data).hexdigest() != part.name.partition(".")[0]:
            log.warning("%s is damaged and removed; its features are made again", part)
            part.unlink(missing_ok=True)
            return
        self._stored |= dict.fromkeys(load(data), part)


def identity(sample: Sample) -> list[Any]:
    """What tells a sample's files from others and from changed ones: place, size and time of each; None: not there."""
    sources = sample.source if isinstance(sample.source, tuple) else (sample.source,)
    return [_identity(source) for source in sources if source is not None]


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's structure and state."""
    total = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # a module's extra state
            total.update(f"{name} {tensor!r}".encode())
            continue
        tensor = tensor.detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def decoder_versions() -> dict[str, str]:
    """The versions of the packages that files are read with: another one may give other pixels."""
    found = {}
    for package in DECODERS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _identity(source: Source) -> list[Any]:
    path = source if isinstance(source, Path) else source.shard
    place = [] if isinstance(source, Path) else [source.name, source.offset, source.size]
    try:
        status = path.stat()
    except OSError:
        return [str(path.absolute()), None, *place]
    return [str(path.absolute()), status.st_size, status.st_mtime_ns, *place]
