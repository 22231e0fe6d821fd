"""LanguageBind: encoders for video, audio, depth, infrared and images, bound to language.

Each name is imported when it is first used, so `import languagebind` is fast.
"""

import importlib

from . import _auto, _original

_auto.install()
_original.install()

__version__ = "1.0.0"

_HOME = {
    "DecodeError": "modalities",
    "DualEncoder": "model",
    "Encoders": "hub.encoders",
    "Modality": "modalities",
    "LanguageBind": "hub.multimodal",
    "UserError": "config",
    "config_dict": "hub.multimodal",
    "configs": "configs",
    "create_model": "hub.factory",
    "create_model_and_transforms": "hub.factory",
    "create_model_from_pretrained": "hub.factory",
    "get_tokenizer": "hub.factory",
    "list_models": "hub.factory",
    "list_pretrained": "hub.factory",
    "contrastive_loss": "loss",
    "load": "hub.encoders",
    "load_model": "hub.encoders",
    "modality_class": "modalities",
    "modality_names": "modalities",
    "model_dict": "hub.multimodal",
    "to_device": "hub.multimodal",
    "transform_dict": "hub.multimodal",
}
_HOME |= {name: home for name, home in _original.HOMES.items() if name.startswith("LanguageBind")}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOME[name]}", __name__)
    return module if _HOME[name] == name else getattr(module, name)


def __dir__():
    return sorted([*globals(), *__all__])
