"""HTML and SVG as text that is escaped unless it was made here."""

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# What HTML and UTF-8 cannot hold: control characters and halves of surrogate pairs
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
ADDRESS = re.compile(r"(https?://[^\s;,()<>\"']+)")
WITHOUT_END = ("meta", "img")


class Markup(str):
    """Text that is HTML already; any other text is escaped when it is put into a `tag`."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element. None is left out, among the children and the attributes; `class_` is class, `x_y` is x-y."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    start = "".join(f' {key}="{_escape(value)}"' for key, value in given.items())
    end = "" if name in WITHOUT_END else f"</{name}>"
    return Markup(f"<{name}{start}>{join(children)}{end}")


def join(children: Iterable[Any]) -> Markup:
    return Markup("".join(c if isinstance(c, Markup) else _escape(c) for c in children if c is not None))


def table(caption: Any, header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Markup:
    """A table whose first row names the columns and whose first column names the rows."""
    lines = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))
    # What scrolls sideways has to be reachable with the keyboard
    whole = tag("table", tag("caption", tag("span", caption)), top, tag("tbody", *lines))
    return tag("div", whole, class_="scroll", tabindex=0)


def breakable(name: str) -> Markup:
    """A name without spaces that may be broken after its underscores and slashes, when a column is narrow."""
    return Markup(re.sub("([_/])", r"\1<wbr>", _escape(name)))


def linked(text: str) -> Markup:
    """Text whose web addresses are links."""
    parts = ADDRESS.split(text)  # every second one is an address
    return join(tag("a", part, href=part, rel="noreferrer") if place % 2 else part for place, part in enumerate(parts))


def short_path(path: str) -> Markup:
    """A path's last two parts; the whole of it when pointed at."""
    parts = path.split("/")
    text = "/".join(["…", *parts[-2:]]) if len(parts) > 2 else path
    return tag("span", breakable(text), title=path if text != path else None, class_="path")


def details(summary: str, *children: Any, open_: bool = False) -> Markup:
    return tag("details", tag("summary", summary), *children, open="open" if open_ else None)


def shorten(text: str, width: int) -> str:
    """Text cut to `width` columns of a terminal, where a Chinese or Japanese character fills two."""
    if columns(text) <= width:
        return text
    while columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _escape(value: Any) -> str:
    return html.escape(FORBIDDEN.sub("\ufffd", str(value)))
