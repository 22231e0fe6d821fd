"""Makes Hugging Face's Auto classes know the published models, without importing transformers before they are used."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO = "transformers.models.auto."
MODULES = {
    AUTO + name for name in ("configuration_auto", "modeling_auto", "processing_auto", "tokenization_auto")
}  # fmt: skip


def install() -> None:
    """Register with the Auto modules that are imported already, and with the others once they are."""
    for name in sorted(MODULES & sys.modules.keys()):
        register(sys.modules[name])
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())


class AfterImport(MetaPathFinder):
    """Calls `register` on each Auto module after its import."""

    def find_spec(self, name: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in MODULES:
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

    kind = module.__name__.removeprefix(AUTO)
    for name, config in CONFIGS.items():
        if kind == "configuration_auto":
            module.AutoConfig.register(config.model_type, config, exist_ok=True)
        elif kind == "modeling_auto":
            from .hub.published import MODELS

            module.AutoModel.register(config, MODELS[name], exist_ok=True)
        elif kind == "processing_auto":
            from .hub.processing import PROCESSORS

            module.AutoProcessor.register(config, PROCESSORS[name], exist_ok=True)
        else:
            from .hub.processing import TOKENIZERS

            module.AutoTokenizer.register(config, TOKENIZERS[name], exist_ok=True)
