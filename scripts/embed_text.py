"""Write the frozen text tower's features of all captions beside the shards; training then takes them from there.

    python scripts/embed_text.py --train-data shards/ --caption-source mix \\
        --text-tower ViT-L-14 --text-pretrained datacomp_xl_s13b_b90k

A run that was stopped continues where it was. Under torchrun each rank takes its share of the shards.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from languagebind.config import UserError, at_least, expand_config, parse, run
from languagebind.data.shards import expand_shards
from languagebind.data.text_features import write_text_features
from languagebind.distributed import Precision, autocast, close_process, init_process
from languagebind.remote import is_url
from languagebind.text import TextConfig, build_text, encode_text, fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedOptions:
    """Write the features of the captions of shards."""

    train_data: str
    """shards: a brace pattern, a glob or a folder; several joined by `::`"""
    caption_source: str = "mix"
    """the captions that training will draw, as its --caption-source"""
    text: TextConfig = field(default_factory=TextConfig)
    batch_size: int = 256
    precision: Precision = "fp32"
    device: str | None = None
    """by default a GPU when there is one"""

    def __post_init__(self):
        at_least(1, batch_size=self.batch_size)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the features that the command line asks for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(EmbedOptions, expand_config(sys.argv[1:] if argv is None else argv), prog="embed_text.py")
    shards = expand_shards(options.train_data)
    if streams := [shard for shard in shards if is_url(shard) or shard.startswith("pipe:")]:
        raise UserError(f"there is no folder to write beside {streams[0]}: take local shards, then copy the features")
    process = init_process(options.device)
    try:
        text_model, text_projection, _ = build_text(options.text)
        tower = fingerprint(text_model, text_projection)
        text_model.eval().to(process.device)
        text_projection.to(process.device)

        def encode(texts: list[str]) -> torch.Tensor:
            tokens = {key: value.to(process.device) for key, value in text_model.tokenizer(texts).items()}
            with autocast(process.device, options.precision):
                return encode_text(text_model, text_projection, tokens)

        own = shards[process.rank :: process.world_size]
        counts = [
            write_text_features(shard, options.caption_source, tower, encode, options.batch_size)
            for shard in tqdm(own, unit="shard", disable=not process.is_main)
        ]
    finally:
        close_process()
    there = counts.count(None)
    log.info(
        "%d captions of %d shards, by text tower %s%s", sum(count or 0 for count in counts), len(own) - there,
        tower[:12], f"; {there} shards had theirs" if there else "",
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
