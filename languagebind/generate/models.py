"""What the steps with a model share: the model's files and their record, and the frames that it reads."""

import hashlib
import io
from abc import abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import UserError, first_line
from ..data.vidal import media_paths
from ..files import parse_json
from ..hub.files import find_file, pin, weight_files
from ..modalities import DecodeError, modality_class
from .steps import Entry, Failed, Made, Step


class HubModel:
    """A model of transformers, in a folder or on the Hugging Face hub at one commit. At first, only its config is read.

    Raises `UserError` if there is no config.
    """

    def __init__(self, name: str, revision: str | None = None):
        self.name = name
        self.found, self.hub = pin(name, revision=revision)
        path = find_file(self.found, "config.json", **self.hub)
        if path is None:
            raise UserError(f"{name} has no config.json: name a model of transformers")
        self.config: dict[str, Any] = parse_json(path.read_bytes())
        self.commit = path.parent.name if path.parent.parent.name == "snapshots" else None  # in the hub's cache

    def record(self) -> dict[str, Any]:
        """Return the commit, the hashes of the weights, the licence in the model card, and versions."""
        from huggingface_hub import ModelCard

        card = find_file(self.found, "README.md", **self.hub)
        return {
            "model": self.name,
            "revision": self.commit,
            "licence": ModelCard.load(card, ignore_metadata_errors=True).data.get("license") if card else None,
            "weights_sha256": {path.name: file_sha256(path) for path in weight_files(self.found, None, **self.hub)},
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }

    def load(self, auto_class: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
        """Return the model in eval mode; without a dtype, in that of its weights.

        Raises `UserError` if the files lack some of the weights.
        """
        model, found = auto_class.from_pretrained(self.found, output_loading_info=True, **self.hub)
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"{self.name} lacks {len(missing)} of the model's weights, such as {missing[0]}")
        return model.requires_grad_(False).eval().to(device, dtype)


class FrameStep(Step):
    """A step that makes pictures of a modality from the frames of each entry, which share one call of the model.

    Its name is also that of the modality in VIDAL's layout.
    """

    def __init__(self, root: Path):
        self.root = root

    @abstractmethod
    def make(self, entry: Entry, frames: Tensor) -> tuple[list[bytes], tuple[str, ...]] | Failed:
        """Return the files' contents, and notes, for frames (T, 3, H, W) in bytes."""

    def is_done(self, entry: Entry) -> bool:
        return self._paths(entry, self.name)[0][0].parent.exists()

    def one(self, entry: Entry) -> Made | Failed:
        sources, targets = self._paths(entry, "video")[1], self._paths(entry, self.name)[0]
        if not sources[0].parent.is_dir():
            return Failed("no frames", f"{sources[0].parent} does not exist: run generate frames first")
        try:
            image: Any = modality_class("image")()
            frames = torch.stack([image.decode(path) for path in sources])
        except (DecodeError, RuntimeError) as error:  # RuntimeError: they differ in size
            return Failed("unreadable frames", f"{sources[0].parent}: {first_line(error)}")
        made = self.make(entry, frames)
        if isinstance(made, Failed):
            return made
        contents = {path.name: data for path, data in zip(targets, made[0], strict=True)}
        return Made({targets[0].parent: contents}, notes=made[1])

    def _paths(self, entry: Entry, modality: str) -> list[list[Path]]:
        return media_paths(self.root, entry.id, str(entry.fields.get("folder", "")), modality)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as the hub shows it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encoded(picture: Tensor, kind: str, **options: Any) -> bytes:
    """Return a picture (1 or 3, H, W), in bytes or uint16, as a file of a kind that Pillow writes."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).squeeze(2).numpy()).save(file, kind, **options)
    return file.getvalue()
