"""Cards of the samples or queries that a model is best and worst at, with their pictures."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..results import Result
from .markup import Markup, details, join, short_path, tag
from .thumbnails import Thumbnails

KINDS = {"best": "Best examples", "worst": "Worst examples"}


def example_cards(result: Result) -> Markup | None:
    """All cards of a result, folded."""
    examples = {kind: result.get("examples", {}).get(kind, []) for kind in KINDS}
    known = {example["key"]: example["source"] for kind in KINDS for example in examples[kind]}
    thumbnails = Thumbnails(result)
    parts, counts = [], []
    for kind, title in KINDS.items():
        if examples[kind]:
            cards = [_card(example, thumbnails, result, known) for example in examples[kind]]
            parts += [tag("h4", title), tag("ul", *cards, class_="cards")]
            counts.append(f"{len(cards)} {kind}")
    return details(f"Examples: {' and '.join(counts)}", *parts) if parts else None


def _card(
    example: Mapping[str, Any], thumbnails: Thumbnails, result: Result, known: Mapping[str, Sequence[Any]]
) -> Markup:
    key, found = example["key"], example["found"]
    picture = thumbnails.draw(key, example["source"])
    own: Any = found
    if result["task"] == "retrieval":
        own = short_path(found) if found != key else None
        if own and (source := _source(found, example, known)):
            first = thumbnails.draw(found, source)
            picture = tag("div", _titled("right one", picture), _titled("found first", first), class_="both")
    asked, query = _query(example, result)
    facts = {asked: query, "found first": own, "rank": example["rank"],
             "score": f"{example['score']:.4f}", "sample": short_path(key)}  # fmt: skip
    pairs = [
        cell
        for name, value in facts.items()
        if value is not None
        for cell in (tag("dt", name), tag("dd", value, dir="auto"))
    ]
    return tag("li", picture, tag("dl", *pairs))


def _query(example: Mapping[str, Any], result: Result) -> tuple[str, Any]:
    """What a query is called, and what it is: a class, a caption, or between modalities a key and what that side is."""
    if result["task"] != "retrieval":
        return "true class", example["text"]
    sides = result["protocol"].get("query")
    if not isinstance(sides, dict):
        return "caption", example["text"]
    return "query", join([short_path(example["text"]), tag("span", f" ({' + '.join(sides)})", class_="range")])


def _source(found: str, example: Mapping[str, Any], known: Mapping[str, Sequence[Any]]) -> Sequence[Any] | None:
    """Where the sample is that was found: another example's, or the file that lies as this example's does."""
    if found in known:
        return known[found]
    source = example["source"]
    if len(source) == 1 and isinstance(source[0], str) and source[0].endswith(example["key"]):
        file = source[0].removesuffix(example["key"]) + found
        return [file] if os.path.isfile(file) else None
    return None


def _titled(title: str, picture: Markup) -> Markup:
    return tag("div", tag("span", title, class_="range"), picture)
