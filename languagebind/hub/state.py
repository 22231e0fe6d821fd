"""Load state dicts of the original code into modules with the published parameter names."""

import warnings
from typing import Any

from torch import nn

from ..lora import merge_lora
from ..weights import WRAPPERS, State, published_names


class OriginalState(nn.Module):
    """A module whose `load_state_dict`, also as a part of another module, takes state dicts of the original code.

    It ignores `position_ids` and the prefixes of wrappers, and merges adapters unless the module has some itself.
    """

    def load_state_dict(self, state_dict: State, strict: bool = True, assign: bool = False) -> Any:  # type: ignore[override]
        """Load a state dict. With `strict=False`, a warning names the weights that keep their values."""
        found = super().load_state_dict(state_dict, strict, assign)
        if missing := found.missing_keys:
            names = ", ".join(missing[:5])
            warnings.warn(f"the state dict lacks {len(missing)} weights, which do not change: {names}", stacklevel=2)
        return found

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        own = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if "position_ids" not in key}
        given = {key if key in own else WRAPPERS.sub("", key): value for key, value in given.items()}
        sizes: Any = getattr(self, "config", None)
        if hasattr(sizes, "lora_alpha") and not given.keys() <= own and not any(".lora_" in key for key in own):
            try:
                given = published_names(merge_lora(given, sizes.lora_alpha, sizes.lora_r or sizes.merged_lora_r))
            except ValueError as error:
                odd = max(given.keys() - own, key=lambda key: ".lora_" in key)
                raise RuntimeError(f"cannot load a state dict with {prefix}{odd}: {error}") from error
        state_dict.clear()
        state_dict.update({prefix + key: value for key, value in given.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
