"""Register the published models with Hugging Face's Auto classes without importing transformers early."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Auto module of transformers -> its Auto class, and the module in `hub` and name of the table to register with it
TABLES = {
    "transformers.models.auto.configuration_auto": ("AutoConfig", "config", "CONFIGS"),
    "transformers.models.auto.modeling_auto": ("AutoModel", "published", "MODELS"),
    "transformers.models.auto.processing_auto": ("AutoProcessor", "processing", "PROCESSORS"),
    "transformers.models.auto.tokenization_auto": ("AutoTokenizer", "processing", "TOKENIZERS"),
}


def install() -> None:
    """Register the models with every Auto module: now if it is imported already, otherwise after its import."""
    for name in sorted(TABLES.keys() & sys.modules.keys()):
        register(sys.modules[name])
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())


class AfterImport(MetaPathFinder):
    """Import hook that calls `register` on each Auto module after its import."""

    def find_spec(self, name: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in TABLES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # the only hook after an import
        return spec


def register(module: ModuleType) -> None:
    """Add the published models to one Auto module."""
    from .hub.config import CONFIGS

    auto, home, table = TABLES[module.__name__]
    classes = getattr(import_module(f".hub.{home}", __package__), table)
    for name, config in CONFIGS.items():
        key = config.model_type if classes is CONFIGS else config
        getattr(module, auto).register(key, classes[name], exist_ok=True)
