"""The whole way, by the commands that real data takes: world, shards, text features, training, evaluation, report.

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

from languagebind.config import UserError, load_yaml, parse, run

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "demo"
SPLITS = ("test", "unseen", "generalised", "reworded", "retrieval")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoOptions:
    """Train and score the sample world's modalities."""

    modality: tuple[str, ...] = tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    """those to run; each has a file in configs/demo"""
    data: Path = ROOT / "data" / "demo"
    """where the world and its shards go"""
    output: Path = ROOT / "logs" / "demo"
    """where runs, results.json and report.png go; a former demo there is replaced"""
    num_train: int = 2000
    """scenes to train on"""
    num_test: int = 512
    """scenes to test on"""
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(DemoOptions, sys.argv[1:] if argv is None else argv, prog="demo")
    for name in options.modality:
        if not (CONFIGS / f"{name}.yaml").is_file():
            raise UserError(f"no configs/demo/{name}.yaml; there are {', '.join(DemoOptions.modality)}")
    begin = time.perf_counter()
    world = make_world(options)
    results = {name: fit_and_score(name, world, options) for name in options.modality}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    call(ROOT / "scripts" / "demo_report.py", f"--output={options.output}", f"--world={world}")
    print(table(results))
    print(f"{time.perf_counter() - begin:.0f} s; {options.output}/results.json and report.png")


def make_world(options: DemoOptions) -> Path:
    """Render the scenes. The folder is named by what decides its contents, and one that is whole is used again."""
    name = f"world-{options.num_train}-{options.num_test}-{options.seed}-{'-'.join(sorted(options.modality))}"
    world = options.data / name
    if not (world / "whole").exists():
        shutil.rmtree(world, ignore_errors=True)
        call(
            "-m", "languagebind.data.world", f"--output={world}", f"--num-train={options.num_train}",
            f"--num-test={options.num_test}", f"--seed={options.seed}", "--modalities", *options.modality,
        )  # fmt: skip
        (world / "whole").touch()
    return world


def fit_and_score(name: str, world: Path, options: DemoOptions) -> dict:
    """Pack shards, embed captions, train, evaluate: one modality's entry in results.json."""
    begin, run_folder = time.perf_counter(), options.output / name
    shards = world / "shards" / name
    call(
        ROOT / "scripts" / "make_shards.py", "vidal", f"--annotation={world / 'train' / 'vidal.json'}",
        f"--root={world / 'train'}", f"--modality={name}", f"--output={shards}", "--samples-per-shard=250",
    )  # fmt: skip
    recipe = load_yaml(CONFIGS / f"{name}.yaml")
    call(
        ROOT / "scripts" / "embed_text.py", f"--train-data={shards}", "--precision=amp_bf16",
        f"--caption-source={recipe['data']['caption_source']}", f"--text-tower={recipe['towers']['text_tower']}",
    )  # fmt: skip
    shutil.rmtree(run_folder, ignore_errors=True)
    call(
        "-m", "training.main", f"--config={CONFIGS / f'{name}.yaml'}", f"--train-data={shards}",
        f"--logs={options.output}", f"--name={name}", f"--seed={options.seed}",
    )  # fmt: skip
    checkpoint = max((run_folder / "checkpoints").glob("step_*.pt"))
    configs = [f"--config={world / 'eval' / f'{name}_{split}.yaml'}" for split in SPLITS]
    call(
        "-m", "languagebind.eval", f"--checkpoint={checkpoint}", *configs, f"--output={run_folder / 'results'}",
        "--workers=2", "--batch-size=128",
    )  # fmt: skip
    found = {}
    for file in (run_folder / "results").glob("*.json"):
        result = json.loads(file.read_text())
        found[result["dataset"].removeprefix(f"{name}_")] = result
    retrieval = found.pop("retrieval")
    scores = {split: result["metrics"] for split, result in found.items()}
    scores["test"] |= {
        key.removeprefix("text_to_modality/"): value
        for key, value in retrieval["metrics"].items()
        if key.startswith("text_to_modality/")
    }
    scores["test"]["R@1_chance"] = retrieval["protocol"]["chance"]["text_to_modality/R@1"]
    index = json.loads((shards / "index.json").read_text())
    return scores | {"train_samples": index["samples"], "seconds": round(time.perf_counter() - begin, 1)}


def table(results: dict) -> str:
    """Every figure with chance beside it, in percent."""
    columns = ["test top-1", "unseen top-1", "generalised top-1", "reworded top-1", "text-to-modality R@1"]
    rows = [["(chance)", *columns, "seconds"]]
    for name, scores in results.items():
        cells = [
            (scores[split]["top1"], scores[split]["chance"]) for split in ("test", "unseen", "generalised", "reworded")
        ]
        cells.append((scores["test"]["R@1"], scores["test"]["R@1_chance"]))
        rows.append([name, *(f"{100 * x:.1f} ({100 * chance:.1f})" for x, chance in cells), f"{scores['seconds']:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def call(*command) -> None:
    """Run a Python command of this project; its output is ours, and so is its failure."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, *map(str, command)]
    status = subprocess.run(words, cwd=ROOT, env=environment).returncode
    if status:
        raise UserError(f"this command failed with status {status}: {' '.join(words)}")


if __name__ == "__main__":
    run(main)
