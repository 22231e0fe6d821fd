"""Draw the demo's report.png: loss curves, retrieval, and the similarities between samples and texts."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from languagebind.eval import load_dataset_config
from languagebind.eval.data.samples import class_names, read_samples
from languagebind.eval.features import class_prompts
from languagebind.hub.encoders import load
from languagebind.modalities import Modality

matplotlib.use("Agg")
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
    for name in names:
        rows = pd.read_json(output / name / "metrics.jsonl", lines=True)
        rows.dropna(subset="train/loss").plot("step", "train/loss", ax=axes, label=name)
    axes.set(title="Contrastive loss in training", xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)


def draw_retrieval(axes: Axes, results: dict[str, Any]) -> None:
    """Draw the recalls of each modality as bars."""
    recalls = 100 * pd.DataFrame({name: scores["test"] for name, scores in results.items()}).T
    recalls.plot.bar(y=["R@1", "R@5", "R@10"], ax=axes, width=0.8, rot=0, color=("C0", "#62a1cb", "#a6cae3"))
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    places = np.arange(len(results)) - 0.8 / 3  # of the bars of R@1
    axes.scatter(places, recalls["R@1_chance"], marker="_", s=300, color="black", label="chance of R@1")
    axes.set(title="Text to modality, 256 test samples", ylabel="recall, %", ylim=(0, 118))
    axes.legend(frameon=False, ncols=4, loc="upper center", fontsize=8)


def draw_similarity(figure: SubFigure, name: str, output: Path, world: Path) -> None:
    """Draw the cosine similarities between the test samples and the prompts of a few classes."""
    encoders = load(max((output / name / "checkpoints").glob("step_*.pt")))
    modality = encoders.encoders[name][1]
    texts, paths = sample_classes(world / "eval" / f"{name}_test.yaml", modality)
    inputs: dict[str, Any] = {"text": texts, name: paths}
    features: Any = encoders.encode(**inputs)
    similarity = (features["text"] @ features[name].T).numpy()  # (texts, samples)

    grid = figure.add_gridspec(2, SAMPLES + 1, height_ratios=(1, 5), width_ratios=[1] * SAMPLES + [0.2])
    heat, bar = figure.add_subplot(grid[1, :SAMPLES]), figure.add_subplot(grid[1, SAMPLES])
    for column, path in enumerate(paths):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(modality.picture(modality.load(path))[0].permute(1, 2, 0), aspect="equal")
        axes.axis("off")
    shown = heat.imshow(similarity, cmap="viridis", aspect="auto")
    heat.set(xticks=[], xlabel=f"{name} samples, each of the class in its row")
    heat.set_yticks(range(SAMPLES), texts)
    for (row, column), value in np.ndenumerate(similarity):
        weight = "bold" if similarity[:, column].argmax() == row else None
        colour = "black" if value > similarity.mean() else "white"
        heat.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, weight=weight)
    figure.colorbar(shown, cax=bar, label="cosine")
    figure.suptitle(f"Similarity of test samples and class prompts: {name} (bold: the best text of each sample)")


def sample_classes(config: Path, modality: Modality) -> tuple[list[str], list[str]]:
    """Return the prompts of a few evenly spaced classes, and the path of one test sample of each."""
    dataset = load_dataset_config(config)
    first = {sample.labels[0]: str(sample.source) for sample in reversed(read_samples(dataset, modality))}
    labels = [label for label in class_names(dataset) if label in first]
    chosen = [labels[int(i)] for i in np.linspace(0, len(labels) - 1, SAMPLES)]
    names = [class_names(dataset)[label] for label in chosen]
    return class_prompts(names, dataset.templates[:1]), [first[label] for label in chosen]
