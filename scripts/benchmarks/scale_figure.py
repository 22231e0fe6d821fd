"""Draw docs/scaling.png from the JSON files of `benchmark.py scale`:

python scripts/benchmarks/scale_figure.py FIGURES.json... docs/scaling.png
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]
GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
BATCH, DIM = 128, 768
TRAINED = {"LoRA, rank 2": 4.73e6, "LoRA, rank 16, video": 16.7e6, "full, video": 1.62e9}  # bytes, ViT-L/14


def main() -> None:
    *sources, target = sys.argv[1:]
    rows = [row for path in sources for row in json.loads(Path(path).read_text())["rows"]]
    parts = {name: [row for row in rows if row["part"] == name] for name in ("ranks", "shards", "captions", "entries")}
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    draw(axes[0, 0], parts["ranks"], "ranks", {"steps_cpu_ms_per_sample": "CPU ms a sample", "rank_mib": "MiB a rank"})
    start = {"check_data_s": "index and sizes", "no_features_s": "no features", "features_s": "features' headers"}
    draw(axes[0, 1], parts["shards"], "shards", start)
    draw(axes[0, 2], parts["captions"], "captions", {"near_lookup_us": "in five files", "anywhere_lookup_us": "in all"})
    entries = {kind: [row for row in parts["entries"] if row["source"] == kind] for kind in ("vidal", "jsonl")}
    for kind, own in entries.items():
        draw(axes[1, 0], own, "entries", {"cpu_s": kind})
        draw(axes[1, 1], own, "entries", {"mib": kind})
    for name, size in TRAINED.items():
        axes[1, 2].loglog(GPUS[1:], [2 * size * (1 - 1 / n) / 1e6 for n in GPUS[1:]], label=f"gradients, {name}")
    axes[1, 2].loglog(GPUS[1:], [3 * n * BATCH * DIM * 4 / 1e6 for n in GPUS[1:]], "k--", label="features, 128 a GPU")
    titles = ["Training, 128 samples a step", "Start, CPU s", "A lookup, CPU µs", "Entries, CPU s", "Entries, MiB",
              "On paper: MB a step and GPU"]  # fmt: skip
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, framealpha=0.5)
    axes[1, 2].set_xlabel("GPUs")
    figure.savefig(target, dpi=80)


def draw(axis: Axes, rows: list[Row], size: str, lines: dict[str, str]) -> None:
    """Draw figures of rows over their sizes, both on logarithmic scales."""
    for key, label in lines.items():
        axis.loglog([row[size] for row in rows], [row[key] for row in rows], "o-", label=label)
    axis.set_xlabel(size)
    if size == "ranks":
        axis.set_xscale("log", base=2)


if __name__ == "__main__":
    main()
