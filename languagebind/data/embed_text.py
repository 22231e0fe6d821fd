"""Write the frozen text tower's features of all captions beside the shards, where training finds them.

    languagebind embed-text --train-data shards/ --caption-source mix \\
        --text-tower ViT-L-14 --text-pretrained datacomp_xl_s13b_b90k
    languagebind embed-text --train-data shards/ --config depth  # the captions and text tower of a training recipe

Run the command again to resume a stopped run. Under torchrun each rank processes its share of the shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .. import configs
from ..config import FileWord, expand_config, flag_name, parse
from ..distributed import Precision, autocast, joined
from ..text import TextConfig, build_text, encode_text, fingerprint
from .feature_store import local_shards, write_text_features

# The keys of a training recipe (--config) that this command uses
FROM_RECIPE = ("train_data", "caption_source", "negatives", "text_tower", "text_pretrained", "context_length",
               "cache_dir")  # fmt: skip


@dataclass(frozen=True)
class EmbedOptions:
    """Write the text features of shards."""

    train_data: str
    """shards: a brace pattern, a glob or a folder; several joined by `::`"""
    caption_source: str = "mix"
    """captions to encode; use the --caption-source of training"""
    negatives: int = 0
    """encode the samples' hard negatives, too, if above 0; use the --negatives of training"""
    text: TextConfig = field(default_factory=TextConfig)
    batch_size: int = 256
    precision: Precision = "fp32"
    device: str | None = None
    """device to use; None: a GPU if there is one"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the features, with the options of the command line."""
    words = expand_config(argv, partial(configs.find, kind="recipe"))
    argv = [word for word in words if not isinstance(word, FileWord) or flag_name(word) in FROM_RECIPE]
    options = parse(EmbedOptions, argv, prog="languagebind embed-text")
    shards = local_shards(options.train_data)
    with joined(options.device) as process:
        text_model, text_projection, _ = build_text(options.text)
        tower = fingerprint(text_model, text_projection)
        text_model.eval().to(process.device)
        text_projection.to(process.device)
        tokenizer: Any = text_model.tokenizer

        def encode(texts: list[str]) -> torch.Tensor:
            tokens = {key: value.to(process.device) for key, value in tokenizer(texts).items()}
            with autocast(process.device, options.precision):
                return encode_text(text_model, text_projection, tokens)

        own = shards[process.rank :: process.world_size]
        counts = [
            write_text_features(shard, options.caption_source, tower, encode, options.batch_size, options.negatives > 0)
            for shard in tqdm(own, unit="shard", disable=not process.is_main)
        ]
    captions, done = sum(count or 0 for count in counts), counts.count(None)
    print(f"{captions} captions of {len(own) - done} shards, text tower {tower[:12]}; {done} shards were complete")
