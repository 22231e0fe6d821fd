"""The modules of the original LanguageBind package, such as `languagebind.video.processing_video`.

Each has the names of its modality, which are imported from their places in this package when they are first used.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

MODALITIES = ("Audio", "Depth", "Image", "Thermal", "Video")
KINDS = ("configuration", "modeling", "processing", "tokenization")
# Name in the original, where {0} is a modality and {1} the same in small letters -> its module, and name if another
NAMES = {
    "AudioTransform": "hub.transforms",
    "CLIPEncoderLayer": "transformer:Block",
    "CLIPTextConfig": "hub.config:LanguageBindTextConfig",
    "CLIPVisionConfig": "hub.config:LanguageBindVisionConfig",
    "CLIPVisionTransformer": "hub.hf_modules:HFVisionTransformer",
    "LanguageBind{0}": "hub.published",
    "LanguageBind{0}Config": "hub.config",
    "LanguageBind{0}Processor": "hub.processing",
    "LanguageBind{0}Tokenizer": "hub.processing",
    "LanguageBind{0}Tower": "hub.llava",
    "OPENAI_DATASET_MEAN": "modalities._images:MEAN",
    "OPENAI_DATASET_STD": "modalities._images:STD",
    "get_{1}_transform": "hub.transforms",
    "load_and_transform_{1}": "hub.transforms",
    "torchaudio_loader": "hub.transforms",
}


class OriginalModule(ModuleType):
    """A module whose names lie elsewhere in `package`."""

    def __init__(self, name: str, package: str, homes: dict[str, str]):
        super().__init__(name, __doc__)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []
        self.__all__, self._package, self._homes = list(homes), package, homes

    def __getattr__(self, name: str):
        if name not in self._homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, _, other = self._homes[name].partition(":")
        return getattr(import_module(f"{self._package}.{module}"), other or name)


def install(package: str) -> None:
    """Make the modules importable, and attributes of `package`, the full name of this package."""
    for modality in MODALITIES:
        low = modality.lower()
        homes = {name.format(modality, low): home for name, home in NAMES.items()}
        for name in (low, *(f"{low}.{kind}_{low}" for kind in KINDS)):
            parent, _, last = f"{package}.{name}".rpartition(".")
            sys.modules[f"{package}.{name}"] = OriginalModule(f"{package}.{name}", package, homes)
            setattr(sys.modules[parent], last, sys.modules[f"{package}.{name}"])
