"""Files that evaluations read."""

import io
import json
import tarfile
from pathlib import Path

import torch

from languagebind.config import to_dict
from languagebind.model import DualEncoder, EncoderConfig, InitConfig, ModelConfig, TextConfig
from languagebind.text import build_text


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_shard(path, samples):
    """`(key, {extension: path | bytes | anything for JSON})`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for extension, value in members.items():
                if isinstance(value, Path):
                    value = value.read_bytes()
                elif not isinstance(value, bytes):
                    value = (value if isinstance(value, str) else json.dumps(value)).encode()
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
    return path


def save(folder, modality, tower, seed):
    """A checkpoint of random weights."""
    torch.manual_seed(seed)
    encoder = EncoderConfig(patch_size=16, width=16, depth=1, num_heads=2, mlp_dim=32)
    config = ModelConfig(encoder, TextConfig(f"local-dir:{tower}"), init=InitConfig("none"))
    model = DualEncoder(modality.input_shape, encoder, build_text(config.text)).eval()
    name = type(modality).__name__.lower()
    path = folder / f"{name}.pt"
    saved = {"model": config, "modality": name, "inputs": modality}
    torch.save(
        {
            "model": model.encoder_state(),
            "config": {key: x if isinstance(x, str) else to_dict(x) for key, x in saved.items()},
            "text_fingerprint": model.text_fingerprint(),
        },
        path,
    )
    return path
