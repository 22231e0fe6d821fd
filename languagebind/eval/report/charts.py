"""Bars, a confusion matrix and recall curves as SVG, coloured by the page's style sheet."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .markup import Markup, columns, shorten, tag

ROW, BAR, LETTER = 19, 400, 7  # pixels
LABEL = 32  # letters
SHOWN_BARS = 40
SHOWN_CLASSES = 30
CELL = 28
PLOT_WIDTH, PLOT_HEIGHT, LEFT = 620, 300, 56
COLOURS = 8  # that the style sheet has for lines
# Markers around (0, 0), so that lines can be told apart without their colours
SHAPES = ("M-4,0a4,4 0 1 0 8,0a4,4 0 1 0 -8,0Z", "M-3.5,-3.5h7v7h-7Z", "M0,-5L5,0L0,5L-5,0Z", "M0,-5L4.6,3.5H-4.6Z")


@dataclass(frozen=True)
class Line:
    """A curve: its name, the number of its colour, and its points (k, recall) in order of k."""

    name: str
    colour: int
    dashed: bool
    points: Sequence[tuple[float, float]]


def bars(values: Sequence[tuple[str, float, int]], metric: str, chance: float | None = None) -> Markup:
    """A bar for each (class, value, samples), best first; of more than 40 the 20 best and the 20 worst."""
    ordered = sorted(values, key=lambda value: (-value[1], value[0]))
    left_out = max(0, len(ordered) - SHOWN_BARS)
    half = SHOWN_BARS // 2
    rows = list(enumerate(ordered))
    if left_out:
        rows = [*rows[:half], *enumerate(ordered[-half:], half + 1)]
    left = _room([name for name, _, _ in values])
    top, bottom = 24, 24 + ROW * (rows[-1][0] + 1)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + BAR * tick
        parts += [_line(x, top, x, bottom, "grid"), _text(x, 14, f"{tick:g}", "middle", "axis")]
    for row, (name, value, samples) in rows:
        y = top + row * ROW
        width = f"{BAR * min(max(value, 0), 1):.1f}"
        parts.append(_text(left - 8, y + 14, shorten(name, LABEL), "end", title=name))
        parts.append(tag("rect", x=left, y=y + 3, width=width, height=ROW - 6, class_="bar"))
        parts.append(_text(left + BAR + 8, y + 14, f"{value:.4f}  ({samples})"))
    if chance is not None:
        x = left + BAR * chance
        parts += [_line(x, top, x, bottom, "chance"), _text(x + 4, bottom + 14, f"chance {chance:.3g}", class_="axis")]
    caption = f"{metric} of each class, with its samples in brackets"
    if left_out:  # above the line of chance
        gap = f"… {left_out} classes between these …"
        parts.append(_text(left + 8, top + half * ROW + 14, gap, class_="axis halo"))
        caption = f"{metric} of the {half} best and the {half} worst classes, with their samples in brackets"
    return _figure(parts, left + BAR + 120, bottom + 22, caption)


def heat_map(names: Sequence[str], counts: Mapping[tuple[int, int], int]) -> Markup:
    """The confusion matrix: of more than 30 classes those that are confused most, in class order.

    Args:
        names: of the classes, in class order.
        counts: of the samples of class i that were taken for class j, by (i, j).
    """
    totals, wrong = Counter(), Counter()
    for (true, found), count in counts.items():
        totals[true] += count
        if true != found:
            wrong[true] += count
            wrong[found] += count
    shown = sorted(range(len(names)), key=lambda k: (-wrong[k], k))[:SHOWN_CLASSES]
    places = {k: place for place, k in enumerate(sorted(shown))}
    size, room = CELL * len(places), _room([names[k] for k in places])
    left, top = room + 24, room + 20
    parts = [
        _text(left + size / 2, 14, "found", "middle", "axis-title"),
        _turned(14, top + size / 2, "true", "axis-title"),
    ]
    parts.append(tag("rect", x=left, y=top, width=size, height=size, class_="frame"))
    for k, place in places.items():
        middle = place * CELL + CELL / 2
        parts.append(_text(left - 6, top + middle + 4, shorten(names[k], LABEL), "end", title=names[k]))
        parts.append(_turned(left + middle + 4, top - 6, shorten(names[k], LABEL), title=names[k], anchor="start"))
    for (true, found), count in sorted(counts.items()):
        if true in places and found in places and count:
            title = f"{names[true]} taken for {names[found]}: {count} of {totals[true]}"
            parts += _cell(left + places[found] * CELL, top + places[true] * CELL, count, count / totals[true], title)
    parts += _legend(left, top + size + 16)
    caption = "Confusion matrix: samples of each true class (row) by the class that was found (column)"
    if len(names) > len(shown):
        caption += f"; the {len(shown)} of {len(names)} classes that are confused most"
    return _figure(parts, max(left + size + 12, left + 290), top + size + 52, caption)


def curves(lines: Sequence[Line]) -> Markup:
    """Recall at k over k, on a logarithmic axis, one line a model and direction, with its recall at 1 in the legend."""
    last = max(k for line in lines for k, _ in line.points)
    stretch = math.log10(last) or 1.0
    top, bottom = 12, 12 + PLOT_HEIGHT

    def place(k: float, recall: float) -> tuple[float, float]:
        return LEFT + PLOT_WIDTH * math.log10(k) / stretch, bottom - PLOT_HEIGHT * recall

    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        y = place(1, tick)[1]
        parts += [_line(LEFT, y, LEFT + PLOT_WIDTH, y, "grid"), _text(LEFT - 8, y + 4, f"{tick:g}", "end", "axis")]
    for tick in _ticks(last):
        x = place(tick, 0)[0]
        parts += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 18, f"{tick:g}", "middle", "axis")]
    middle = LEFT + PLOT_WIDTH / 2
    parts.append(_text(middle, bottom + 38, "k, the number of results looked at (logarithmic)", "middle", "axis-title"))
    parts.append(_turned(14, top + PLOT_HEIGHT / 2, "recall at k", "axis-title"))
    for row, line in enumerate(lines):
        style = f"line c{line.colour}" + (" dashed" if line.dashed else "")
        points = [place(k, recall) for k, recall in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(tag("polyline", tag("title", line.name), points=path, class_=style))
        parts += [_marker(x, y, line.colour) for x, y in points]
        y = bottom + 62 + row * ROW
        parts += [_line(LEFT, y - 4, LEFT + 40, y - 4, style), _marker(LEFT + 20, y - 4, line.colour)]
        parts.append(
            _text(LEFT + 50, y, f"{shorten(line.name, 80)}: {line.points[0][1]:.4f} at k = {line.points[0][0]:g}")
        )
    return _figure(parts, LEFT + PLOT_WIDTH + 24, bottom + 56 + ROW * len(lines), "Recall curves")


def _room(names: Sequence[str]) -> int:
    """The pixels that the longest of some labels needs, once shortened."""
    return 16 + LETTER * min(LABEL, max(map(columns, names)))


def _marker(x: float, y: float, colour: int) -> Markup:
    """The first four are full, the others hollow."""
    hollow = " hollow" if colour >= len(SHAPES) else ""
    path = SHAPES[colour % len(SHAPES)]
    return tag("path", d=path, transform=f"translate({x:.1f} {y:.1f})", class_=f"dot c{colour}{hollow}")


def _cell(x: float, y: float, count: int, share: float, title: str) -> list[Markup]:
    dark = "count strong" if share > 0.65 else "count"
    text = str(count) if count < 10_000 else f"{count // 1000}k"
    rect = tag(
        "rect",
        tag("title", title),
        x=x,
        y=y,
        width=CELL,
        height=CELL,
        class_="heat",
        fill_opacity=f"{0.06 + 0.94 * share:.3f}",
    )
    return [rect, _text(x + CELL / 2, y + CELL / 2 + 4, text, "middle", dark)]


def _legend(x: float, y: float) -> list[Markup]:
    """From none to all of a class's samples, in eleven steps."""
    steps = [
        tag("rect", x=x + 12 * i, y=y, width=12, height=12, class_="heat", fill_opacity=f"{0.06 + 0.094 * i:.3f}")
        for i in range(11)
    ]
    return [*steps, _text(x, y + 28, "0", class_="axis"), _text(x + 132, y + 28, "1", "end", "axis"),
            _text(x + 142, y + 11, "share of the true class", class_="axis")]  # fmt: skip


def _ticks(last: float) -> list[float]:
    """1, 2, 5, 10... up to the last k, and that one too unless it would touch its neighbour's label."""
    ticks = [step * 10**power for power in range(math.ceil(math.log10(last)) + 1) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if tick < last]
    return [*(tick for tick in ticks if math.log10(last / tick) > 0.06 * math.log10(last)), last]


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def _text(
    x: float, y: float, text: str, anchor: str | None = None, class_: str | None = None, title: str | None = None
):
    whole = tag("title", title) if title not in (None, text) else None
    return tag("text", whole, text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def _turned(x: float, y: float, text: str, class_: str | None = None, title: str | None = None, anchor: str = "middle"):
    """Text that reads upwards."""
    whole = tag("title", title) if title not in (None, text) else None
    turn = f"translate({x:.1f} {y:.1f}) rotate(-90)"
    return tag("text", whole, text, transform=turn, text_anchor=anchor, class_=class_)


def _figure(parts: Sequence[Markup], width: float, height: float, caption: str) -> Markup:
    box = f"0 0 {width:.0f} {height:.0f}"
    svg = tag("svg", *parts, viewBox=box, width=f"{width:.0f}", height=f"{height:.0f}", role="img", aria_label=caption)
    return tag("figure", tag("figcaption", caption), tag("div", svg, class_="scroll", tabindex=0), class_="chart")
