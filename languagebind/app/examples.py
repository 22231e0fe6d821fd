"""Examples to pick on the page: files of a modality, in a folder of its name, with the texts in `texts.txt`."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..config import UserError, load_yaml
from ..data.world.make import RENDERERS
from ..data.world.scenes import CLASS_ATTRIBUTES, VALUES, draw_scenes, scene_files, seen_pairs
from ..data.world.words import class_name
from ..files import files_below, text_lines

TEXTS = "texts.txt"
DRAWN = 500  # scenes to choose from: far more than the pairs of a modality
SIZE = 96  # pixels, as in training


class Example(NamedTuple):
    """A file of a modality, and the texts to compare it with."""

    path: Path
    modality: str
    texts: tuple[str, ...]


def knows_world(source: str | Path) -> bool:
    """Tell whether a source is the folder of a run that trained on the sample world, as the demo's runs are."""
    config = Path(source) / "config.yaml"
    values = load_yaml(config) if config.is_file() else {}
    return "/world-" in str(values.get("data", {}).get("train_data", ""))


def read_examples(folder: Path, modalities: Iterable[str]) -> list[Example]:
    """Return the examples in `FOLDER/MODALITY`, sorted by name. Raises `UserError` if there are none."""
    found = []
    for name in modalities:
        files = list(files_below(folder / name)) if (folder / name).is_dir() else []
        texts = folder / name / TEXTS
        lines = tuple(filter(None, text_lines(texts.read_bytes()))) if texts in files else ()
        found += [Example(path, name, lines) for path in files if path != texts]
    if not found:
        places = " or ".join(f"{folder / name}" for name in modalities)
        raise UserError(f"there are no examples: put files into {places}, and texts into a {TEXTS} beside them")
    return found


def world_examples(folder: Path, modalities: Iterable[str]) -> list[Example]:
    """Render examples of the sample world into `folder`, and return them.

    Of each modality, there are eight classes, one for each value of its first attribute, with the second attribute's
    values in turn: the first of them that training showed. Each has one file, of a scene that is in no split. The
    texts are the eight classes' names, so beside the right text there are seven others.
    """
    scenes = draw_scenes("examples", DRAWN, seed=0)
    known = [name for name in modalities if name in CLASS_ATTRIBUTES]
    for name in known:
        first, second = (VALUES[attribute] for attribute in CLASS_ATTRIBUTES[name])
        seen = seen_pairs(name)
        turns = ([*second[row % len(second) :], *second] for row in range(len(first)))
        pairs = [next((a, b) for b in turn if (a, b) in seen) for a, turn in zip(first, turns, strict=True)]
        texts = [class_name(name, pair) for pair in pairs]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / TEXTS).write_text("\n".join(texts) + "\n", encoding="utf-8")
        for pair, text in zip(pairs, texts, strict=True):
            scene = next(scene for scene in scenes if scene.pair(name) == pair)
            frames, suffix = RENDERERS[name](scene, SIZE), scene_files(folder, scene, name)[0].suffix
            (folder / name / f"{text}{suffix}").write_bytes(frames[len(frames) // 2])  # of stills, the middle one
    return read_examples(folder, known)
