"""Examples to pick on the page: files of the sample world, for models that trained on it."""

from collections.abc import Iterable
from pathlib import Path

from ..data.world.make import RENDERERS
from ..data.world.scenes import draw_scenes, scene_files
from ..data.world.words import class_name

DRAWN = 211  # scenes to choose from; with so many, all values of both attributes of a modality occur
SIZE = 96  # pixels, as in training


def world_examples(folder: Path, modalities: Iterable[str]) -> dict[str, list[Path]]:
    """Render eight files of each modality into `folder`, and return them; the name of each is that of its class.

    The classes have all values of their first attribute. The scenes are in no split, but their classes are in training.
    """
    scenes, examples = draw_scenes("examples", DRAWN, seed=0), {}
    for name in filter(RENDERERS.__contains__, modalities):
        (folder / name).mkdir(parents=True)
        examples[name] = list[Path]()
        for scene in {scene.pair(name)[0]: scene for scene in scenes}.values():
            frames, suffix = RENDERERS[name](scene, SIZE), scene_files(folder, scene, name)[0].suffix
            examples[name].append(folder / name / f"{class_name(name, scene.pair(name))}{suffix}")
            examples[name][-1].write_bytes(frames[len(frames) // 2])  # of stills, the middle one
    return examples
