"""How far a loop is, for whoever waits: a bar on a terminal, lines in the log elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from ..distributed import rank

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30


def progress(items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
    """The items, with a bar on a terminal and a line in the log now and then elsewhere, on the first rank alone."""
    if rank():
        yield from items
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=unit, unit="batch", leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES:
            last = now
            left = timedelta(seconds=round((now - start) / done * (total - done)))
            log.info("%s: %d of %d batches, about %s left", unit, done, total, left)
