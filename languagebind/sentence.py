"""A sentence-transformers module: `SentenceTransformer(folder).encode(...)` for text, images, audio and video.

    from sentence_transformers import SentenceTransformer
    from languagebind.sentence import LanguageBindModule

    model = SentenceTransformer(modules=[LanguageBindModule({"image": "models/image", "audio": "models/audio"})])
    model.save("folder")
    model = SentenceTransformer("folder", trust_remote_code=True)
    model.similarity(model.encode(["a dog"], of="image"), model.encode(["photo.jpg"]))  # one modality per call

sentence-transformers infers an input's modality from its type: text, image, audio or video. A missing file is a text.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from sentence_transformers.base.modality import MULTIMODAL_DICT_KEYS, infer_batch_modality
from sentence_transformers.base.modules.input_module import InputModule
from torch import nn

from .config import UserError
from .hub.config import to_published
from .hub.encoders import TEXT, load
from .hub.published import build_published


class LanguageBindModule(InputModule):
    """Encoders of images, audio or video, with their text towers.

    `model.encode(texts, of="audio")` takes a modality's text tower. For the default, see `Encoders.encode`; for the
    arguments, `languagebind.load`.

    Raises `UserError` if sentence-transformers does not support a modality, or features differ in size.
    """

    config_file_name = "languagebind.json"
    save_in_root = True
    forward_kwargs: ClassVar[set[str]] = {"of"}  # type: ignore[misc]  # options of `encode` that reach this module

    def __init__(self, sources: Mapping[str, str | Path], dtype: str | torch.dtype | None = None):
        super().__init__()
        if unnamed := sorted(set(sources) - set(MULTIMODAL_DICT_KEYS)):
            raise UserError(f"sentence-transformers does not support {unnamed[0]}; use languagebind.load")
        self.encoders = load(sources, dtype=dtype)
        self.models = nn.ModuleDict({name: model for name, (model, _) in self.encoders.encoders.items()})
        sizes = {name: model.embed_dim for name, model in self.models.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f"sentence-transformers needs features of one size, not {sizes}; use languagebind.load")
        self.tokenizer: Any = self.encoders.model(TEXT).text_model.tokenizer

    @property
    def modalities(self) -> list[Any]:
        return [TEXT, *self.encoders.modalities]

    @property
    def max_seq_length(self) -> int:
        return self.tokenizer(["a " * 10_000])["input_ids"].shape[1]  # the tokenizer truncates texts

    def get_sentence_embedding_dimension(self) -> int:
        return self.encoders.model(TEXT).embed_dim

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, of: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Return the token ids or preprocessed inputs of a batch, and the name of its modality.

        Raises `ValueError` if the inputs have several modalities, or a modality that is not loaded.
        """
        name = str(infer_batch_modality(list(inputs), supported_modalities=self.modalities))
        if name not in self.modalities:
            raise ValueError(f"cannot encode {name!r} inputs; pass inputs of one of {', '.join(self.modalities)}")
        inputs = [item[name] if isinstance(item, dict) and name in item else item for item in inputs]
        if name == TEXT:
            texts = self._prepend_prompt(inputs, prompt) if prompt else inputs
            return self.encoders.model(of or TEXT).tokenize(list(texts)) | {"modality": name}
        _, modality = self.encoders.encoders[name]
        return {"inputs": torch.stack([modality.preprocess(_in_memory(x)) for x in inputs]), "modality": name}

    def forward(self, features: dict[str, Any], of: str | None = None, **options: Any) -> dict[str, Any]:
        """Return the features with the `sentence_embedding` (B, D), unit norm, added."""
        if features["modality"] == TEXT:
            embedding = self.encoders.model(of or TEXT).encode_text({"input_ids": features["input_ids"]})
        else:
            embedding = self.encoders.model(features["modality"]).encode(features["inputs"])
        return features | {"sentence_embedding": embedding}

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Write each encoder in the published layout, in a folder named after its modality."""
        for name, encoder in self.encoders.encoders.items():
            build_published(*to_published(*encoder), name).save_pretrained(Path(output_path) / name)
        config = {"modalities": list(self.encoders.encoders)}  # in order, which decides on the usual text tower
        (Path(output_path) / self.config_file_name).write_text(json.dumps(config))

    @classmethod
    def load(  # type: ignore[override]  # options by name only
        cls, model_name_or_path: str, subfolder: str = "", **options: Any
    ) -> "LanguageBindModule":
        """Load a saved module from a folder or a hub id."""
        hub: dict[str, Any] = {k: options.get(k) for k in ("token", "cache_folder", "revision", "local_files_only")}
        config = cls.load_config(model_name_or_path, subfolder=subfolder, config_filename=cls.config_file_name, **hub)
        folder = Path(str(cls.load_dir_path(model_name_or_path, subfolder=subfolder, **hub)))
        wanted = options.get("model_kwargs") or {}
        dtype = wanted.get("dtype", wanted.get("torch_dtype"))
        return cls({name: folder / name for name in config["modalities"]}, dtype)


def _in_memory(item: Any) -> Any:
    """Return the array, or the array and its sampling rate, of a sentence-transformers dictionary."""
    if isinstance(item, dict) and "sampling_rate" in item:
        return torch.as_tensor(item["array"]).float(), item["sampling_rate"]
    return item["array"] if isinstance(item, dict) and "array" in item else item
