"""A small world of coloured pictures, and a model that knows colours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_files import write_shard
from PIL import Image as Picture
from torch import nn

from languagebind.eval import DatasetConfig
from languagebind.modalities._images import MEAN, STD
from languagebind.modalities.image import Image

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
IMAGE = Image(image_size=8)


def colours_of(texts):
    named = [[COLOURS[word] for word in text.split() if word in COLOURS] for text in texts]
    return torch.stack([torch.tensor([(0, 0, 0), *found]).sum(dim=0) for found in named]) - 0.3


class Colours(nn.Module):
    """Knows colours: a picture is its mean colour, a text the sum of the colours that it names."""

    modality = IMAGE
    logit_scale = 2.0
    fingerprint = "three colours"

    def encode_text(self, texts):
        return colours_of(texts)

    def encode(self, batch):
        assert not self.training
        mean, std = (torch.tensor(x)[:, None, None, None] for x in (MEAN, STD))
        return ((batch * std + mean).mean(dim=(2, 3, 4)) - 0.3).double()


class Green(Colours):
    """Sees green everywhere."""

    def encode(self, batch):
        return torch.tensor([[-0.3, 0.7, -0.3]]).repeat(len(batch), 1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """30 noisy pictures of three colours: class folders, a manifest with captions, configs, CLIP_benchmark's folder."""
    root = tmp_path_factory.mktemp("models_world")
    rng, rows = np.random.default_rng(0), []
    for i in range(30):
        name = list(COLOURS)[i % 3]
        colour = np.clip(np.array(COLOURS[name]) * 0.4 + rng.random(3) * 0.6, 0, 1)
        path = root / "folders" / name / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Picture.fromarray((np.tile(colour, (8, 8, 1)) * 255).astype(np.uint8)).save(path)
        captions = [f"so {name}", f"{name} and {list(COLOURS)[rng.integers(3)]}"]
        rows.append({"path": str(path), "label": name, "captions": captions})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = root / "wds" / "colours"
    for number, part in enumerate((rows[:16], rows[16:])):
        members = [
            (f"s{i}", {"png": Path(r["path"]).read_bytes(), "cls": str(list(COLOURS).index(r["label"])).encode()})
            for i, r in enumerate(part)
        ]
        write_shard(folder / "test" / f"{number}.tar", members)
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} thing\nsuch {c}\n")
    configs = root / "configs"
    configs.mkdir()
    source = "source: https://example.org/{}\n"
    (configs / "here.yaml").write_text("task: classification\nmodality: image\ndata: folders\n")
    (configs / "texts.yaml").write_text("task: retrieval\nmodality: image\ndata: data.jsonl\n")
    (configs / "gone.yaml").write_text(
        "task: classification\nmodality: image\ndata: gone\nclass_names: gone/names.txt\nprepare: {kind: table}\n"
        + source.format("gone")
    )
    (configs / "sound.yaml").write_text("task: classification\nmodality: audio\ndata: folders\n")
    (configs / "silent.yaml").write_text(
        "task: retrieval\nmodality: audio\ndata: silent.jsonl\n" + source.format("silent")
    )
    return root


def classification(data, **options):
    return DatasetConfig("colours", "classification", str(data), class_names={c: c for c in COLOURS}, **options)


def flags(world, folder, *more):
    return ["--data-root", str(world), "--output", str(folder), "--workers", "0", "--device", "cpu", *more]
