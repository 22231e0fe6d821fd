"""LanguageBind: encoders for video, audio, depth, infrared and images, bound to language.

Names are imported when they are first used, so that `import languagebind` costs next to nothing.
"""

import importlib

from ._auto import install as _install

_install()

__version__ = "0.1.0"

_HOME = {
    "DecodeError": "modalities",
    "DualEncoder": "model",
    "Encoders": "encoders",
    "Modality": "modalities",
    "LanguageBind": "published.bind",
    "UserError": "config",
    "config_dict": "published.bind",
    "create_model": "factory",
    "create_model_and_transforms": "factory",
    "create_model_from_pretrained": "factory",
    "get_tokenizer": "factory",
    "list_models": "factory",
    "list_pretrained": "factory",
    "contrastive_loss": "loss",
    "load": "encoders",
    "load_checkpoint": "hub",
    "load_model": "hub",
    "modality_class": "modalities",
    "modality_names": "modalities",
    "model_dict": "published.bind",
    "to_device": "published.bind",
    "transform_dict": "published.bind",
}
for _name in ("Video", "Audio", "Depth", "Thermal", "Image"):
    _HOME |= {
        f"LanguageBind{_name}": "published.model",
        f"LanguageBind{_name}Config": "published.config",
        f"LanguageBind{_name}Processor": "published.processing",
        f"LanguageBind{_name}Tokenizer": "published.processing",
        f"LanguageBind{_name}Tower": "published.towers",
    }
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
