"""Draw recall curves as SVG in the colours of the page's style sheet. Bars and matrices are tables in the templates."""

import html
import io
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib import style
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..results import Result

WIDTH, HEIGHT, LEGEND_ROW = 700, 330, 20  # pixels
MARKERS = "osD^vPX*"
COLOURS = list(TABLEAU_COLORS.values())[: len(MARKERS)]
# Variables of the style sheet replace matplotlib's colours, so that a chart follows the page's theme
VARIABLES = {"#000000": "rule", "#b0b0b0": "rule"} | {colour: f"c{k}" for k, colour in enumerate(COLOURS)}
STYLE = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 12, "axes.grid": True, "axes.xmargin": 0,
         "legend.frameon": False}  # fmt: skip


def recall_curves(results: Mapping[str, Result]) -> Iterator[str]:
    """Yield charts of the recall curves. The models are divided evenly over as few charts as the colours allow."""
    curved = [model for model, result in results.items() if any(result.get("curves", {}).values())]
    for models in np.array_split(curved, math.ceil(len(curved) / len(MARKERS)) or 1):
        if models.size:
            yield _chart({model: results[model] for model in models.tolist()})


def _chart(results: Mapping[str, Result]) -> str:
    """Return the SVG of a chart of recall at k over k, with a logarithmic axis for k."""
    lines = {
        f"{model}, {direction.replace('_', ' ').replace('modality', result['model'])}": (k, dashes, points)
        for k, (model, result) in enumerate(results.items())
        for dashes, (direction, points) in zip(("-", "--"), result["curves"].items(), strict=False)
        if points
    }
    height = HEIGHT + LEGEND_ROW * len(lines) + 60
    with style.context(["default", STYLE, {"svg.hashsalt": "".join(results)}]):
        figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
        axes = figure.add_axes((60 / WIDTH, 1 - HEIGHT / height, 1 - 84 / WIDTH, (HEIGHT - 12) / height))
        for name, (k, dashes, points) in lines.items():
            ks, recalls = zip(*points, strict=True)
            label = f"{name}: {100 * recalls[0]:.1f} at k = {ks[0]}"
            axes.plot(ks, [100 * recall for recall in recalls], color=COLOURS[k], marker=MARKERS[k], linestyle=dashes,
                      linewidth=2, label=label, gid=f"curve_{len(axes.lines)}", clip_on=False)  # fmt: skip
        axes.set(xscale="log", xlim=(1, None), ylim=(0, 100), facecolor="none", ylabel="recall at k, percent",
                 xlabel="k, the number of results looked at (logarithmic)")  # fmt: skip
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.tick_params(length=0, pad=8)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -54 / HEIGHT), handlelength=4, borderaxespad=0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(file.getvalue(), height, list(lines))


def _inline(svg: str, height: float, names: list[str]) -> str:
    """Return the SVG for use inside a page, with the page's colours, tooltips and no file header."""
    svg = svg.partition("</metadata>")[2]  # drops the file header
    svg = re.sub(r"<style.*?</style>|font-family: [^;<]*; ", "", svg, flags=re.DOTALL)  # the page has its own styles
    svg = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: f"var(--{VARIABLES.get(found[0], 'ink')})", svg)
    for k, name in enumerate(names):
        svg = svg.replace(f'<g id="curve_{k}">', f'<g class="curve"><title>{html.escape(name)}</title>')
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # ids repeat between charts
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Recall curves">{svg}'
