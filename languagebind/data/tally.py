"""Count what a report lists, with a few examples of each."""

from typing import Any

from ..files import printable

EXAMPLES = 5

Tally = dict[str, dict[str, Any]]  # {reason: {"count", "examples"}}


def count(tally: Tally, reason: str, *examples: dict[str, str], number: int = 1) -> None:
    """Add a number of cases to a reason, and their examples while it has few."""
    known = tally.setdefault(reason, {"count": 0, "examples": []})
    known["count"] += number
    few = examples[: EXAMPLES - len(known["examples"])]
    known["examples"] += [{key: printable(text) for key, text in example.items()} for example in few]
