"""Run the whole pipeline on the sample world: render, pack shards, embed captions, train, evaluate, report.

bash scripts/demo.sh [--modality depth]
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from demo_report import draw_report

from languagebind.config import UserError, parse, run

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "demo"
SPLITS = ("test", "unseen", "generalised", "reworded")
TRAINED, PARTNER = "infrared", "depth"  # if both run, infrared trains with partner depth


@dataclass(frozen=True)
class DemoOptions:
    """Train and evaluate the sample world's modalities."""

    modality: tuple[str, ...] = tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    """modalities to run; each has a config in configs/demo"""
    data: Path = ROOT / "data" / "demo"
    """folder for the sample world and its shards"""
    output: Path = ROOT / "logs" / "demo"
    """folder for the runs, results.json and report.png; replaces an earlier demo"""
    num_train: int = 2000
    """number of training scenes"""
    num_test: int = 512
    """number of test scenes"""
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(DemoOptions, argv, prog="demo")
    if unknown := set(options.modality) - set(DemoOptions.modality):
        raise UserError(f"there is no configs/demo/{min(unknown)}.yaml; use {', '.join(DemoOptions.modality)}")
    begin = time.perf_counter()
    world = make_world(options)
    results = {name: run_modality(name, world, options) for name in sorted(options.modality)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_report(results, options.output, world)
    print(score_table(results))
    print(f"{time.perf_counter() - begin:.0f} s; {options.output}/results.json and report.png")
    runs = " ".join(os.path.relpath(options.output / name) for name in sorted(options.modality))
    print(f"To try the models on a page in your browser: {os.path.relpath(sys.executable)} -m languagebind.app {runs}")


def make_world(options: DemoOptions) -> Path:
    """Render the scenes and return their folder. A complete world with the same options is reused."""
    name = f"world-{options.num_train}-{options.num_test}-{options.seed}-{'-'.join(sorted(options.modality))}"
    world = options.data / name
    if not (world / "whole").exists():
        shutil.rmtree(world, ignore_errors=True)
        sizes = {"num_train": options.num_train, "num_test": options.num_test, "seed": options.seed}
        call("-m", "languagebind.data.world", "--modalities", *options.modality, output=world, **sizes)
        (world / "whole").touch()
    return world


def run_modality(name: str, world: Path, options: DemoOptions) -> dict[str, Any]:
    """Pack shards, embed captions, train and evaluate, and return the modality's entry in results.json."""
    begin, run_folder = time.perf_counter(), options.output / name
    train, shards, anchor = world / "train", world / "shards" / name, {}
    source = {"annotation": train / "vidal.json", "root": train}
    members = [name, PARTNER] if name == TRAINED and PARTNER in options.modality else [name]
    packing = "vidal", "--modality", *members
    call("-m", "languagebind", "make-shards", *packing, **source, output=shards, samples_per_shard=250)
    recipe = CONFIGS / f"{name}.yaml"
    call("-m", "languagebind", "embed-text", config=recipe, train_data=shards)
    if len(members) > 1:
        anchor = {"anchor": options.output / PARTNER}
        call("-m", "languagebind", "embed-anchor", train_data=shards, **anchor)
    shutil.rmtree(run_folder, ignore_errors=True)
    call("-m", "training.main", config=recipe, train_data=shards, logs=options.output, name=name,
         seed=options.seed, **anchor)  # fmt: skip
    checkpoint = max((run_folder / "checkpoints").glob("step_*.pt"))
    configs = [f"--config={world / 'eval' / f'{name}_{split}.yaml'}" for split in (*SPLITS, "retrieval")]
    output = run_folder / "results"
    call("-m", "languagebind.eval", *configs, checkpoint=checkpoint, output=output, workers=2, batch_size=128)
    found = [json.loads(file.read_text()) for file in output.glob("*.json")]
    results = {result["dataset"].removeprefix(f"{name}_"): result for result in found}
    scores = {split: results[split]["metrics"] for split in SPLITS}
    for key, value in results["retrieval"]["metrics"].items():
        if key.startswith("text_to_modality/"):
            scores["test"][key.removeprefix("text_to_modality/")] = value
    scores["test"]["R@1_chance"] = results["retrieval"]["protocol"]["chance"]["text_to_modality/R@1"]
    samples = json.loads((shards / "index.json").read_text())["samples"]
    return scores | {"train_samples": samples, "seconds": round(time.perf_counter() - begin, 1)}


def score_table(results: dict[str, Any]) -> str:
    """Return a table of the scores in percent, each with chance in brackets."""
    rows = pd.DataFrame(columns=[*(f"{split} top-1" for split in SPLITS), "text-to-modality R@1", "seconds"])
    for name, scores in results.items():
        cells = [(scores[split]["top1"], scores[split]["chance"]) for split in SPLITS]
        cells.append((scores["test"]["R@1"], scores["test"]["R@1_chance"]))
        rows.loc[name] = [*(f"{100 * x:.1f} ({100 * chance:.1f})" for x, chance in cells), f"{scores['seconds']:.0f}"]
    return rows.rename_axis(columns="(chance)").to_string()


def call(*command: str, **flags: object) -> None:
    """Run a Python command of this repository with `--key=value` flags, and show its output."""
    words = [sys.executable, *command, *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    status = subprocess.run(words, cwd=ROOT, env=environment).returncode
    if status:
        raise UserError(f"this command failed with status {status}: {' '.join(words)}")


if __name__ == "__main__":
    run(main)
