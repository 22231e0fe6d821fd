"""Several modalities in one process: an encoder for each, trained against one text tower.

The modalities take turns. Each has its own data, steps, optimizer, logit scale, random numbers and log, and so gets the
weights of a run of its own. They share the process, the text tower and the checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from languagebind import configs
from languagebind.config import UserError, flags_of_files, take_flag
from languagebind.data.feature_store import FeatureStore
from languagebind.modalities import modality_name
from languagebind.partner import Partner, load_partner

from .params import TrainConfig, parse_args
from .run import Run


def parse_runs(argv: Sequence[str]) -> dict[str, TrainConfig]:
    """Return the options of each modality's run from a command line.

    `--config` files of different modalities make a run each, unless the flag --modality chooses one. Files that name no
    modality, and all flags, are for every run.
    """
    files, flags = flags_of_files(argv, partial(configs.find, kind="recipe"))
    named = [(take_flag(words, "--modality")[0] or [""])[-1] for words in files]
    names = [] if take_flag(flags, "--modality")[0] else [*dict.fromkeys(filter(None, named))]
    runs = {}
    for name in names if len(names) > 1 else [""]:
        own = (words for words, other in zip(files, named, strict=True) if not name or other in (name, ""))
        config = parse_args([*chain(*own), *flags])
        if name and config.partner.anchor == name:  # a flag, which is for the others
            config = replace(config, partner=replace(config.partner, anchor=None))
        runs[modality_name(config.inputs)] = config
    mixture_of(runs)
    if len(runs) > 1:
        _check(runs)
    return runs


def mixture_of(runs: Mapping[str, TrainConfig]) -> dict[str, float]:
    """Return each run's share of the steps, from --mixture; 1 by default."""
    words = next(iter(runs.values())).mixture
    try:
        shares = {name: float(share) for name, share in (word.split("=") for word in words)}
    except ValueError:
        shares = {"": 0.0}  # refused below
    if not all(0 < share < float("inf") for share in shares.values()):
        raise UserError(f"--mixture gives each modality a number above 0, as in depth=2, not {' '.join(words)}")
    if unknown := shares.keys() - runs.keys():
        raise UserError(f"--mixture names {min(unknown)}, but this run trains {', '.join(runs)}")
    return dict.fromkeys(runs, 1.0) | shares


def _check(runs: Mapping[str, TrainConfig]) -> None:
    """Check the options of several modalities that train together."""
    first, *_ = runs
    shared = [vars(x.checkpoint) | vars(x.remote) | {"device": x.device, "mixture": x.mixture} for x in runs.values()]
    for name, values in zip(runs, shared, strict=True):
        if odd := [key for key in values if values[key] != shared[0][key]]:
            flag = f"--{odd[0].replace('_', '-')}"
            raise UserError(f"{flag} differs between {first} and {name}, which train together: pass it as a flag")
    if shared[0]["keep_best"]:
        raise UserError("--keep-best needs a run of one modality, because a checkpoint has all of them; leave it out")
    for name, config in runs.items():
        if config.model.tuning.tune_text:
            raise UserError("--tune-text needs a run of one modality, because they share the text tower; leave it out")
        if config.partner.anchor in runs.keys() - {name} and config.partner.anchor_features == "cached":
            raise UserError(f"{config.partner.anchor} trains beside {name}: use --anchor-features live")


@dataclass
class LiveEncoder:
    """The encoder of another run as its training has made it so far, for `Partner`. It gets no gradient."""

    runs: Mapping[str, Run]
    name: str

    def encode(self, inputs: Tensor) -> Tensor:
        """Return unit-norm features (B, D) of inputs (B, C, T, H, W), without dropped patches."""
        side = self.runs[self.name].state.engine.side.eval()
        features = side(inputs)
        side.train()
        return features


def find_partner(
    name: str, configs: Mapping[str, TrainConfig], runs: Mapping[str, Run], device: torch.device
) -> Partner | None:
    """Return the partner of a modality, which --anchor names: a modality that trains beside it comes first.

    `runs` will hold the run of each modality.
    """
    config = configs[name].partner
    if config.anchor is None:
        return None
    if config.anchor not in configs.keys() - {name}:
        return load_partner(config, device)
    store = FeatureStore("trained beside", config.anchor)
    return Partner(configs[config.anchor].inputs, config.anchor_weight, store, model=LiveEncoder(runs, config.anchor))
