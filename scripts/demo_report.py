"""Draw the demo's report.png: loss curves, retrieval, and the similarities between samples and texts."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from languagebind.config import load_yaml
from languagebind.hub.encoders import load

matplotlib.use("Agg")
COLOURS = matplotlib.color_sequences["tab10"]
SAMPLES = 8


def draw_report(results: dict[str, Any], output: Path, world: Path) -> None:
    """Write report.png to `output`, the folder of a demo run on `world`."""
    figure = plt.figure(figsize=(13, 11), constrained_layout=True)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 2))[:, 0]
    curves, bars = top.subplots(1, 2)
    draw_losses(curves, output, list(results))
    draw_retrieval(bars, results)
    draw_similarity(bottom, list(results)[-1], output, world)
    figure.savefig(output / "report.png", dpi=100)


def draw_losses(axes: Axes, output: Path, names: list[str]) -> None:
    """Plot the training loss of each modality over the steps."""
    for name, colour in zip(names, COLOURS, strict=False):
        rows = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "train/loss" in row]
        axes.plot([row["step"] for row in rows], [row["train/loss"] for row in rows], color=colour, label=name)
    axes.set(title="Contrastive loss in training", xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)


def draw_retrieval(axes: Axes, results: dict[str, Any]) -> None:
    """Draw the recalls of each modality as bars."""
    metrics, names = ("R@1", "R@5", "R@10"), list(results)
    width = 0.8 / len(metrics)
    for number, metric in enumerate(metrics):
        positions = np.arange(len(names)) + (number - 1) * width
        values = [100 * results[name]["test"][metric] for name in names]
        drawn = axes.bar(positions, values, width * 0.92, color=COLOURS[0], alpha=1 - 0.3 * number, label=metric)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
    chance = [100 * results[name]["test"]["R@1_chance"] for name in names]
    axes.scatter(np.arange(len(names)) - width, chance, marker="_", s=300, color="black", label="chance of R@1")
    axes.set(title="Text to modality, 256 test samples", ylabel="recall, %")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 118)
    axes.legend(frameon=False, ncols=4, loc="upper center", fontsize=8)


def draw_similarity(figure: SubFigure, name: str, output: Path, world: Path) -> None:
    """Draw the cosine similarities between the test samples and the prompts of a few classes."""
    prompts, paths = sample_classes(world / "eval" / f"{name}_test.yaml")
    encoders = load(max((output / name / "checkpoints").glob("step_*.pt")))
    texts = list(prompts.values())
    inputs: dict[str, Any] = {"text": texts, name: paths}
    features: Any = encoders.encode(**inputs)
    similarity = (features["text"] @ features[name].T).numpy()  # (texts, samples)

    grid = figure.add_gridspec(2, SAMPLES + 1, height_ratios=(1, 5), width_ratios=[1] * SAMPLES + [0.2])
    heat, bar = figure.add_subplot(grid[1, :SAMPLES]), figure.add_subplot(grid[1, SAMPLES])
    pictures = [figure.add_subplot(grid[0, column]) for column in range(SAMPLES)]
    for axes, path in zip(pictures, paths, strict=True):
        modality = encoders.encoders[name][1]
        axes.imshow(modality.picture(modality.load(path))[0].permute(1, 2, 0), aspect="equal")
        axes.axis("off")
    shown = heat.imshow(similarity, cmap="viridis", aspect="auto")
    heat.set(xticks=[], xlabel=f"{name} samples, each of the class in its row")
    heat.set_yticks(range(SAMPLES), texts)
    for row in range(SAMPLES):
        for column in range(SAMPLES):
            value = similarity[row, column]
            weight = "bold" if similarity[:, column].argmax() == row else None
            colour = "black" if value > similarity.mean() else "white"
            heat.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, weight=weight)
    figure.colorbar(shown, cax=bar, label="cosine")
    figure.suptitle(f"Similarity of test samples and class prompts: {name} (bold: the best text of each sample)")


def sample_classes(config: Path) -> tuple[dict[str, str], list[str]]:
    """Return the prompts of a few evenly spaced classes, and the path of one test sample of each."""
    dataset, folder = load_yaml(config), config.parent
    names = dict(line.split("\t") for line in (folder / dataset["class_names"]).read_text().splitlines())
    template = (folder / dataset["templates"]).read_text().splitlines()[0]
    samples = [json.loads(line) for line in (folder / dataset["data"]).read_text().splitlines()]
    first = {sample["label"]: str(folder / sample["path"]) for sample in reversed(samples)}
    labels = [label for label in names if label in first]
    chosen = [labels[int(i)] for i in np.linspace(0, len(labels) - 1, SAMPLES)]
    return {label: template.replace("{c}", names[label]) for label in chosen}, [first[label] for label in chosen]
