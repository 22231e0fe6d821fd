"""LanguageBind: encoders for video, audio, depth, infrared and images, bound to language.

Names are imported when they are first used, so that `import languagebind` costs next to nothing.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "DecodeError": "modalities",
    "DualEncoder": "model",
    "Encoders": "hub",
    "Modality": "modalities",
    "UserError": "config",
    "contrastive_loss": "loss",
    "load": "hub",
    "load_checkpoint": "hub",
    "modality_class": "modalities",
    "modality_names": "modalities",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
