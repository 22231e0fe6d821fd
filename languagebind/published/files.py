"""Where a checkpoint's files are: a folder, a file, or a repository on the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from ..config import UserError, first_line
from ..lora import merge_lora
from ..weights import State, WeightsError, published_names, read_file, tensors_of

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def repository(name: str | Path) -> str:
    """A hub id as it is today: the models moved from `lb203`. Anything that is there locally stays."""
    name = str(name)
    if Path(name).exists():
        return name
    return "LanguageBind/" + name.removeprefix("lb203/") if name.startswith("lb203/") else name


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
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, **{key: hub[key] for key in HUB_OPTIONS if hub.get(key) is not None}))
    except LocalEntryNotFoundError as error:  # offline, and not in the cache
        raise UserError(f"{name} is no local folder, and the hub cannot be reached: {first_line(error)}") from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(f"{name} is no local folder and no hub id: {first_line(error)}") from error
    except Exception as error:  # what the network and the hub raise is many kinds
        raise UserError(f"cannot load {name} from the hub: {first_line(error)}") from error


def read_weights(name: str | Path, lora_rank: int, lora_alpha: float, **hub: Any) -> State:
    """All tensors of a checkpoint by the published names, adapters merged, `position_ids` dropped.

    Tensors of safetensors files and of today's `.bin` files stay on the disk until they are used.

    Args:
        name: a folder, a weights file, or a hub id.
        lora_rank: what the config says of the adapters, 0 for none.

    Raises:
        UserError: there are no weights, or they cannot be read.
        WeightsError: the adapters are not whole, or have another rank.
    """
    name = repository(name)
    path = Path(name) if Path(name).is_file() else _find_weights(name, **hub)
    raw = _read(path) if path.suffix != ".json" else _read_sharded(path, name, **hub)
    return _merge(raw, lora_rank, lora_alpha, name)


def _find_weights(name: str, **hub: Any) -> Path:
    for file in WEIGHTS:
        if path := find_file(name, file, **hub):
            return path
    raise UserError(f"{name} holds no weights: none of {', '.join(WEIGHTS)}")


def _read_sharded(index: Path, name: str, **hub: Any) -> State:
    try:
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is no index of weights: {first_line(error)}") from error
    state: State = {}
    for file in files:
        path = find_file(name, file, **hub)
        if path is None:
            raise UserError(f"{index} names {file}, which is not there")
        state |= _read(path)
    return state


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
