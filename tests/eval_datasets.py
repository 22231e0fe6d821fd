"""The data sets of configs/eval in tests: their modalities, their preparation, and a model without weights."""

import json
import re
import zlib
from pathlib import Path

import torch
from helpers import ROOT
from torch import nn
from torch.nn import functional as F

from languagebind.eval import load_dataset_config
from languagebind.eval.prepare.__main__ import main
from languagebind.modalities.audio import Audio
from languagebind.modalities.depth import Depth
from languagebind.modalities.image import Image
from languagebind.modalities.infrared import Infrared
from languagebind.modalities.video import Video

CONFIGS = ROOT / "configs" / "eval"
MODALITIES = {
    "audio": Audio(num_mel_bins=16, target_length=32),
    "depth": Depth(image_size=16),
    "image": Image(image_size=16),
    "infrared": Infrared(image_size=16),
    "video": Video(image_size=16, num_frames=2, video_backend="pyav"),
}


def with_counts(config: Path, counts) -> Path:
    text, changed = re.subn("(?m)^expect: .*$", f"expect: {json.dumps(counts)}", config.read_text())
    assert changed == 1, f"{config} has no line `expect: {{...}}`"
    config.write_text(re.sub(r"(?m)^  pictures: \d+$", "  pictures: 2", text))
    return config


def prepare(config, source, output, *more) -> dict:
    """The report of a run."""
    main([str(config), "--source", str(source), "--output", str(output), *more])
    data = Path(load_dataset_config(config, output, prepared=False).data)
    return json.loads(data.with_name(data.name + ".prepare.json").read_text())


class InstantModel(nn.Module):
    """The mean of each channel against three numbers made of each text."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def project(self, inputs):
        return inputs.mean(dim=(2, 3, 4)) + 1e-3

    def encode(self, inputs):
        return F.normalize(self.project(inputs), dim=-1)

    def encode_dense(self, inputs, mode="qq"):
        return F.normalize(F.avg_pool3d(inputs, (1, 4, 4)).permute(0, 2, 3, 4, 1) + 1e-3, dim=-1)

    def tokenize(self, texts):
        return {"ids": torch.tensor([list(zlib.crc32(text.encode()).to_bytes(4)[:3]) for text in texts])}

    def project_text(self, tokens):
        return tokens["ids"] - 127.3

    def encode_text(self, tokens):
        return F.normalize(self.project_text(tokens), dim=-1)

    def text_fingerprint(self):
        return "instant"
