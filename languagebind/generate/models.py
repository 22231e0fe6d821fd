"""What the steps with a model share: models of transformers with their records, and pictures made from frames."""

from abc import abstractmethod
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ..data.shards import file_sha256
from ..files import parse_json
from ..hub.files import find_file, pin, weight_files
from .steps import VIDEO, Entry, FileStep, Made, Unmade

EXTRA = "'languagebind[generate]'"  # of pip's packages
ONE_CALL = Lock()  # held while a model is loaded or called


class HubModel:
    """A model of transformers, in a folder or on the hub at one commit. At first, only its config is read."""

    def __init__(self, name: str, revision: str | None = None):
        self.name = name
        self.found, self.hub = pin(name, revision=revision)
        path = find_file(self.found, "config.json", **self.hub)
        if path is None:
            raise UserError(f"{name} has no config.json: name a model of transformers")
        self.config: dict[str, Any] = parse_json(path.read_bytes())
        self.commit = path.parent.name if path.parent.parent.name == "snapshots" else None  # in the hub's cache

    def record(self) -> dict[str, Any]:
        """Return the commit, the licence in the model card, the hashes of the weights, and versions."""
        from huggingface_hub.repocard import metadata_load

        card = find_file(self.found, "README.md", **self.hub)
        licence = (metadata_load(card) or {}).get("license") if card else None
        hashes = {path.name: file_sha256(path) for path in weight_files(self.found, None, **self.hub)}
        facts = {"model": self.name, "revision": self.commit, "licence": licence, "weights_sha256": hashes}
        return facts | {"torch": torch.__version__, "transformers": version("transformers")}

    def load(self, kind: Any, reader: Any, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
        """Return the model and its processor, by two Auto classes. Raises `UserError` if weights are missing."""
        model, found = kind.from_pretrained(self.found, output_loading_info=True, **self.hub)
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"{self.name} lacks {len(missing)} of the model's weights, such as {missing[0]}")
        model = model.requires_grad_(False).eval().to(device, dtype)
        return model, reader.from_pretrained(self.found, **self.hub)


class FrameStep(FileStep):
    """A step that makes a picture of each frame. The frames of an entry are one batch of the model."""

    source, at_once = "frames", 3  # one is read and one is encoded while the model has one

    @abstractmethod
    def pictures(self, entry: Entry, frames: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Return pictures (T, 1 or 3, H, W) in bytes or uint16, and notes, for frames (T, 3, H, W) in bytes."""

    def results(self, entry: Entry) -> list[Path]:
        return [entry.places(self.root, self.name)[0][0].parent]

    def make(self, entry: Entry) -> Made:
        sources, targets = entry.places(self.root, "video")[1], entry.places(self.root, self.name)[0]
        if not sources[0].parent.is_dir():
            raise Unmade("no frames", f"{sources[0].parent} does not exist: run generate frames first")
        made, notes = self.pictures(entry, VIDEO.decode(sources))
        arrays = np.ascontiguousarray(made.permute(0, 2, 3, 1).numpy()[..., ::-1])  # OpenCV writes BGR
        files = {path.name: cv2.imencode(path.suffix, x)[1].tobytes() for path, x in zip(targets, arrays, strict=True)}
        return Made({targets[0].parent: files}, notes=notes)
