"""The modules of the original LanguageBind package, such as `languagebind.video.processing_video`: each is this module.

Its names are imported from their places in this package when they are first used.
"""

import sys
from importlib import import_module

MODALITIES = ("Audio", "Depth", "Image", "Thermal", "Video")
KINDS = ("configuration", "modeling", "processing", "tokenization")
# Name in the original ({0}: a modality, {1}: in lower case) -> its module here, with `:name` if its name differs here
NAMES = {
    "AudioTransform": "hub.transforms",
    "CLIPAttention": "transformer:Attention",
    "CLIPEncoder": "transformer:Transformer",
    "CLIPEncoderLayer": "transformer:Block",
    "CLIPTextConfig": "hub.config:LanguageBindTextConfig",
    "CLIPVisionConfig": "hub.config:LanguageBindVisionConfig",
    "CLIPVisionEmbeddings": "vit:PatchEmbeddings",
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
HOMES = {name.format(each, each.lower()): home for each in MODALITIES for name, home in NAMES.items()}
__all__ = list(HOMES)
__path__: list[str] = []  # so that modules below it can be imported


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, other = HOMES[name].partition(":")
    return getattr(import_module(f".{module}", __package__), other or name)


def install() -> None:
    """Make the modules importable, and attributes of this package."""
    this = sys.modules[__name__]
    for modality in map(str.lower, MODALITIES):
        for name in (modality, *(f"{modality}.{kind}_{modality}" for kind in KINDS)):
            parent, _, last = f"{__package__}.{name}".rpartition(".")
            sys.modules[f"{__package__}.{name}"] = this
            setattr(sys.modules[parent], last, this)
