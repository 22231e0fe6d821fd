"""Write the evaluations of the sample world: YAML files with their manifests, class names and templates."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

from .scenes import Scene, scene_files, seen_pairs, unseen_pairs
from .words import REWORDED_TEMPLATES, TEMPLATES, class_name, retrieval_caption, reworded_class_name

NUM_RETRIEVAL = 256  # samples per retrieval evaluation
MASKED = ("depth", "infrared")  # the modalities of pictures


def write_evaluations(root: Path, splits: dict[str, list[Scene]], modalities: Sequence[str], seed: int) -> None:
    """Write `root/eval`: five YAML files per modality, six in `MASKED`, and the files that they refer to."""
    folder = root / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "templates.txt", TEMPLATES)
    _write_lines(folder / "reworded_templates.txt", REWORDED_TEMPLATES)
    for modality in modalities:
        seen, unseen = seen_pairs(modality), unseen_pairs(modality)
        for split in ("train", "test", "unseen"):  # a probe needs labels for training
            rng = random.Random(f"{seed} {split} {modality}")
            lines = [_manifest_line(root, split, scene, modality, rng) for scene in splits[split]]
            _write_lines(folder / f"{modality}_{split}.jsonl", lines)
            if split == "test":
                _write_lines(folder / f"{modality}_retrieval.jsonl", lines[:NUM_RETRIEVAL])
        for name, split, pairs, naming, templates in (
            ("test", "test", seen, class_name, "templates.txt"),
            ("unseen", "unseen", unseen, class_name, "templates.txt"),
            ("generalised", "unseen", seen + unseen, class_name, "templates.txt"),
            ("reworded", "test", seen, reworded_class_name, "reworded_templates.txt"),
        ):
            class_names = f"{modality}_{name}_classes.txt"
            _write_lines(folder / class_names, [f"{' '.join(pair)}\t{naming(modality, pair)}" for pair in pairs])
            prompts = {"class_names": class_names, "templates": templates}
            content = {"task": "classification", "data": f"{modality}_{split}.jsonl", **prompts, "split": split}
            _write_yaml(folder, modality, name, content)
            if name == "test" and modality in MASKED:
                _write_yaml(folder, modality, "segmentation", content | {"task": "segmentation"})
        retrieval = {"task": "retrieval", "data": f"{modality}_retrieval.jsonl", "split": "test"}
        _write_yaml(folder, modality, "retrieval", retrieval)


def _manifest_line(root: Path, split: str, scene: Scene, modality: str, rng: random.Random) -> str:
    files = scene_files(root / split, scene, modality)
    frame = len(files) // 2 if len(files) > 1 else None  # the middle frame
    line = {
        "path": os.path.relpath(files[frame or 0], root / "eval"),
        "label": " ".join(scene.pair(modality)),
        "captions": [retrieval_caption(scene, modality, rng, frame)],
        "id": scene.id,
    }
    if split == "test" and modality in MASKED:
        line["mask"] = f"../{split}/masks/{modality}/{scene.id}.png"
    return json.dumps(line)


def _write_yaml(folder: Path, modality: str, name: str, content: dict[str, str]) -> None:
    content = {"name": f"{modality}_{name}", "modality": modality, **content}
    _write_lines(folder / f"{modality}_{name}.yaml", [f"{key}: {value}" for key, value in content.items()])


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
