"""Where a checkpoint's files are: a folder, a file, or a repository on the Hugging Face hub."""

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ..config import UserError, first_line
from ..lora import merge_lora
from ..weights import State, WeightsError, published_names, read_file, tensors_of

ORGANISATION = "LanguageBind"
PUBLISHED = (
    "LanguageBind_Audio",
    "LanguageBind_Audio_FT",
    "LanguageBind_Depth",
    "LanguageBind_Image",
    "LanguageBind_Thermal",
    "LanguageBind_Video",
    "LanguageBind_Video_FT",
    "LanguageBind_Video_Huge_V1.5_FT",
    "LanguageBind_Video_V1.5_FT",
    "LanguageBind_Video_merge",
)


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = "model.safetensors.index.json"
SAVED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def repository(name: str | Path) -> str:
    """A hub id in full and as it is today: the models moved from `lb203`. Anything that is there locally stays."""
    name = str(name)
    short = name.removeprefix("lb203/")
    return f"{ORGANISATION}/{short}" if (short in PUBLISHED or short != name) and not Path(name).exists() else name


def not_there(name: str, error: Exception) -> UserError:
    """Why something that is no local folder cannot be had from the hub either."""
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        return UserError(f"there is no folder {name}")
    return UserError(f"there is no folder {name} here, and the Hugging Face hub does not give it: {first_line(error)}")


def find_file(name: str, file: str, **hub: Any) -> Path | None:
    """A file of a checkpoint, downloaded where it has to be; None where the checkpoint has no such file.

    Raises:
        UserError: there is no such folder or repository, or it cannot be reached.
    """
    if Path(name).is_file():
        return None
    if Path(name).is_dir():
        path = Path(name) / (hub.get("subfolder") or "") / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, **{key: hub[key] for key in HUB_OPTIONS if hub.get(key) is not None}))
    except LocalEntryNotFoundError as error:  # offline, and not in the cache; it is an EntryNotFoundError as well
        raise not_there(name, error) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # what the network and the hub raise is many kinds
        raise not_there(name, error) from error


def read_weights(name: str | Path, lora_rank: int, lora_alpha: float, variant: str | None = None, **hub: Any) -> State:
    """All tensors of a checkpoint by the published names and of one type, adapters merged, `position_ids` dropped.

    Tensors of safetensors files and of today's `.bin` files stay on the disk until they are used.

    Args:
        name: a folder, a weights file, or a hub id.
        lora_rank: what the config says of the adapters, 0 for none.
        variant: of several kinds of files, as in transformers: `fp16` for model.fp16.safetensors.

    Raises:
        UserError: there are no weights, or they cannot be read.
        WeightsError: the adapters are not whole, or have another rank; weights are integers.
    """
    name = repository(name)
    path = Path(name) if Path(name).is_file() else _find_weights(name, variant, **hub)
    raw = _read(path) if path.suffix != ".json" else _read_sharded(path, name, **hub)
    return _one_dtype(_merge(raw, lora_rank, lora_alpha, name), name)


def _find_weights(name: str, variant: str | None, **hub: Any) -> Path:
    files = [f".{variant}.".join(file.rsplit(".", 1)) for file in WEIGHTS] if variant else WEIGHTS
    for file in files:
        if path := find_file(name, file, **hub):
            return path
    raise UserError(f"{name} holds no weights: none of {', '.join(files)}")


def _read_sharded(index: Path, name: str, **hub: Any) -> State:
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is no index of weights: {first_line(error)}") from error
    state: State = {}
    for file in sorted(files, key=str):
        path = find_file(name, file, **hub) if isinstance(file, str) else None
        if path is None:
            raise UserError(f"{index} names {file}, which is not there")
        state |= _read(path)
    if not state:
        raise UserError(f"{index} names no weights")
    return state


def _one_dtype(state: State, name: str) -> State:
    """All weights in the widest of their types: arithmetic wants one, and a wider one loses nothing."""
    if integers := [f"{key} {value.dtype}" for key, value in state.items() if not value.is_floating_point()]:
        raise WeightsError(f"{name} has weights that hold no fractions: {', '.join(integers[:5])}")
    widest = reduce(torch.promote_types, {value.dtype for value in state.values()})
    return {key: value.to(widest) for key, value in state.items()}


def _read(path: Path) -> State:
    return tensors_of(read_file(path), path)


def _merge(raw: State, rank: int, alpha: float, name: str) -> State:
    wrapped = any(".base_model.model." in key for key in raw)
    ranks = {value.shape[0] for key, value in raw.items() if ".lora_A." in key}
    if wrapped and not ranks:
        raise WeightsError(f"{name} was saved with LoRA adapters, but there are none in it")
    if ranks and ranks != {rank}:
        raise WeightsError(f"{name} has LoRA adapters of rank {sorted(ranks)}, its config says lora_r {rank}")
    try:
        return merge_lora(published_names(raw), alpha)
    except ValueError as error:
        raise WeightsError(f"{name}: {error}") from error


def replace_weights(folder: Path, new: Path) -> None:
    """Move what was written over what is there, and weights away that belong to none of it."""
    written = sorted(path.name for path in new.iterdir())  # shards before their index
    weights = {name for name in written if SAVED.fullmatch(name)}
    stale = {path.name for path in folder.iterdir() if SAVED.fullmatch(path.name)} - weights if weights else set()
    if INDEX in weights:  # it must at no time name the shards of two models
        (folder / INDEX).unlink(missing_ok=True)
    for name in written:
        (new / name).replace(folder / name)
    for name in stale:
        (folder / name).unlink()
