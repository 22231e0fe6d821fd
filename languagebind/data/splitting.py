"""Divide samples into parts such as train, val and test, without dividing a group of samples."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ..config import UserError
from ..files import printable
from .sources import Sample


def parse_shares(split: Sequence[str]) -> dict[str, float]:
    """Return the share of each part, from texts such as `train=0.8`.

    Raises:
        UserError: a text is not of this form, or the shares do not add up to 1.
    """
    shares: dict[str, float] = {}
    for text in split:
        part, _, share = text.partition("=")
        try:
            shares[part] = float(share)
        except ValueError:
            shares[part] = 0.0
        if not part.isidentifier() or not shares[part] > 0:
            raise UserError(f"--split {text}: write a name and a share above 0, such as train=0.8")
    if shares and abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"the shares of --split add up to {sum(shares.values()):g}, not 1")
    return shares


def group_of(sample: Sample) -> str:
    """Return the name of a sample's group; a sample without a group is its own."""
    return sample.id if sample.group is None else sample.group


def assign(samples: Iterable[Sample], shares: Mapping[str, float]) -> dict[str, str]:
    """Return the part of each group, with numbers of samples as near to the shares as whole groups allow.

    The largest groups come first, each in the part that lacks most. Groups of equal size come in the order of a hash of
    their names, so the order of the samples does not matter.

    Raises:
        UserError: there are too few groups.
    """
    sizes = Counter(map(group_of, samples))
    lacking = {part: share * sizes.total() for part, share in shares.items()}
    parts: dict[str, str] = {}
    for group in sorted(sizes, key=lambda name: (-sizes[name], hashlib.sha256(printable(name).encode()).digest())):
        parts[group] = max(lacking, key=lambda part: lacking[part])
        lacking[parts[group]] -= sizes[group]
    if empty := shares.keys() - parts.values():
        raise UserError(f"--split leaves {min(empty)} empty: there are only {len(sizes)} groups of samples")
    return parts
