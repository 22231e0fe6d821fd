"""Find, read and replace the files of a checkpoint, in a folder or on the Hugging Face hub."""

import json
import re
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..config import UserError, first_line
from ..lora import merge_lora
from ..weights import State, WeightsError, published_names, read_file, tensors_of

ORGANISATION, FORMER = "LanguageBind", "lb203"
PUBLISHED = (
    "LanguageBind_Audio", "LanguageBind_Audio_FT", "LanguageBind_Depth", "LanguageBind_Image", "LanguageBind_Thermal",
    "LanguageBind_Video", "LanguageBind_Video_FT", "LanguageBind_Video_Huge_V1.5_FT", "LanguageBind_Video_V1.5_FT",
    "LanguageBind_Video_merge",
)  # fmt: skip

INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
SAVED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def pin(name: str | Path, wanted: Iterable[str] = WEIGHTS, /, **hub: Any) -> tuple[str, dict[str, Any]]:
    """Return a checkpoint's current name and the hub options by which all its files come from one revision.

    If the hub is off or cannot be reached, the name is that of a cached folder, preferably with a `wanted` file.
    """
    name, hub = str(name), {key: hub[key] for key in HUB_OPTIONS if hub.get(key) is not None}
    if Path(name).exists():
        return name, hub
    from huggingface_hub import hf_hub_download, model_info
    from huggingface_hub.errors import OfflineModeIsEnabled, RemoteEntryNotFoundError

    short = name.removeprefix(f"{FORMER}/")
    name, folder = f"{ORGANISATION}/{short}" if short in PUBLISHED or short != name else name, None
    try:
        if not hub.get("force_download"):
            folder = _cached_folder(name, wanted, hub) or _cached_folder(name, ("config.json",), hub)
        if hub.get("local_files_only"):
            raise OfflineModeIsEnabled("local_files_only is set")
        commit = model_info(name, revision=hub.get("revision"), timeout=10, token=hub.get("token")).sha
        with suppress(RemoteEntryNotFoundError):
            hf_hub_download(name, "config.json", **hub)  # also records the branch's commit, for use without the hub
        return name, hub | {"revision": commit}
    except Exception as error:  # the network and the hub raise many types
        if folder is None:
            raise not_there(name, error) from error
        if not isinstance(error, OfflineModeIsEnabled):
            warnings.warn(f"cannot reach the hub ({first_line(error)}): reading {folder}", stacklevel=2)
        return str(folder), {}


def _cached_folder(name: str, wanted: Iterable[str], hub: dict[str, Any]) -> Path | None:
    """Return the folder of a wanted file, in the given or the default cache, under the current or the former name."""
    from huggingface_hub import constants, try_to_load_from_cache

    caches = hub.get("cache_dir", constants.HF_HUB_CACHE), constants.HF_HUB_CACHE
    for cache, repo, file in product(caches, (name, name.replace(f"{ORGANISATION}/", f"{FORMER}/", 1)), wanted):
        path = str(Path(hub.get("subfolder", ""), file))
        found = try_to_load_from_cache(repo, path, Path(cache).expanduser(), hub.get("revision"))
        if isinstance(found, str):
            return Path(found).parent
    return None


def not_there(name: str, error: Exception) -> UserError:
    """Return the error for a name that is neither a local folder nor on the hub, nor in its cache."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        return UserError(f"there is no folder {name}")
    reason = f"its download from the hub failed: {first_line(error)}"
    if isinstance(error, OfflineModeIsEnabled):
        reason = "it is not in the cache: check the name, or load it once with access to the hub"
    return UserError(f"there is no folder {name}, and {reason}")


def find_file(name: str, file: str, **hub: Any) -> Path | None:
    """Return the path of a pinned checkpoint's file, downloaded if necessary, or None if it has no such file."""
    if Path(name).exists():
        path = Path(name, hub.get("subfolder", ""), file)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, **hub))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # the network and the hub raise many types
        raise not_there(name, error) from error


def read_weights(name: str, lora_rank: int, lora_alpha: float, variant: str | None = None, **hub: Any) -> State:
    """Return all tensors of a checkpoint under their published names, in one dtype and with adapters merged.

    Safetensors files and recent `.bin` files are memory-mapped. `name` is a folder, a weights file or a hub id, pinned.
    The rank (0 without adapters) and alpha are those of the config; the `variant` is that of transformers (`fp16`).
    Raises `WeightsError` if adapters are incomplete or have another rank, or weights are integers.
    """
    raw: State = {}
    for path in weight_files(name, variant, **hub):
        raw |= tensors_of(read_file(path), path)
    try:
        state = published_names(merge_lora(raw, lora_alpha, lora_rank))
    except ValueError as error:
        raise WeightsError(f"{name}: {error}") from error
    if integers := [f"{key} {value.dtype}" for key, value in state.items() if not value.is_floating_point()]:
        raise WeightsError(f"{name} has integer weights: {', '.join(integers[:5])}")
    widest = reduce(torch.promote_types, {value.dtype for value in state.values()})  # represents all values exactly
    return {key: value.to(widest) for key, value in state.items()}


def weight_files(name: str, variant: str | None, **hub: Any) -> list[Path]:
    """Return the paths of a pinned checkpoint's weights, downloaded if necessary."""
    if Path(name).is_file():
        return [Path(name)]
    files = [f".{variant}.".join(file.rsplit(".", 1)) for file in WEIGHTS] if variant else WEIGHTS
    path = next(filter(None, (find_file(name, file, **hub) for file in files)), None)
    if path is None:
        raise UserError(f"{name} has no weights file: expected one of {', '.join(files)}")
    if path.suffix != ".json":
        return [path]
    try:
        parts = sorted({str(Path(part)) for part in json.loads(path.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a valid index of weights: {first_line(error)}") from error
    paths = {part: find_file(name, part, **hub) for part in parts}
    if missing := [part for part, file in paths.items() if file is None]:
        raise UserError(f"{path} lists {missing[0]}, which does not exist")
    return [file for file in paths.values() if file]


def replace_weights(folder: Path, new: Path) -> None:
    """Move all files from `new` into `folder`, and remove the old weights from `folder`."""
    written = sorted(path.name for path in new.iterdir())  # shards before their index
    weights = {name for name in written if SAVED.fullmatch(name)}
    stale = {path.name for path in folder.iterdir() if SAVED.fullmatch(path.name)} - weights if weights else set()
    if INDEX in weights:  # it must never list shards of two models
        (folder / INDEX).unlink(missing_ok=True)
    for name in written:
        (new / name).replace(folder / name)
    for name in stale:
        (folder / name).unlink()
