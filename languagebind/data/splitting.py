"""Divide samples into parts such as train, val and test, without dividing a group of samples."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ..config import UserError
from ..files import printable
from .sources import Sample


def parse_shares(split: Sequence[str]) -> dict[str, float]:
    """Return the share of each part, from texts such as `train=0.8`, or raise `UserError`."""
    found = [re.fullmatch(r"(\w+)=(\d*\.?\d+)", text) for text in split]
    shares = {share[1]: float(share[2]) for share in found if share}
    if len(shares) < len(split) or (split and abs(sum(shares.values()) - 1) > 1e-6):
        raise UserError(f"--split {' '.join(split)}: write shares that add up to 1, as in train=0.8 val=0.1 test=0.1")
    return shares


def assign(samples: Iterable[Sample], shares: Mapping[str, float]) -> dict[str, str]:
    """Return the part of each group, or raise `UserError` if a part would be empty.

    The largest groups come first, groups of equal size by a hash of their names, and each goes where most is lacking.
    """
    # Rows that repeat a caption of their file come as samples of the same id
    sizes = Counter(group for group, _ in {(sample.group or sample.id, sample.id) for sample in samples})
    lacking = {part: share * sizes.total() for part, share in shares.items()}
    parts: dict[str, str] = {}
    for group in sorted(sizes, key=lambda name: (-sizes[name], hashlib.sha256(printable(name).encode()).digest())):
        parts[group] = max(lacking, key=lambda part: lacking[part])
        lacking[parts[group]] -= sizes[group]
    if empty := shares.keys() - parts.values():
        raise UserError(f"--split leaves {min(empty)} empty: there are only {len(sizes)} groups of samples")
    return parts
