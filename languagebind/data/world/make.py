"""Write the sample world, a small data set of rendered scenes in the layout of VIDAL-10M.

    python -m languagebind.data.world --output DIR --num-train 2000 --num-test 512 --seed 0

writes `DIR/train`, `DIR/test` and `DIR/unseen`, each with a `vidal.json` and media in VIDAL's folders (H.264 mp4,
16 kHz WAV, 16-bit depth PNG in millimetres, infrared JPEG). It also writes `DIR/eval` with the evaluations of each
modality, and masks for the test scenes' depth and infrared. The same seed gives the same bytes.
"""

import io
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...config import UserError, parse
from . import render as _render
from .evaluations import MASKED, write_evaluations
from .scenes import CLASS_ATTRIBUTES, FOLDER, Scene, draw_scenes, scene_files, seen_pairs
from .words import captions_for, class_name


@dataclass(frozen=True)
class WorldOptions:
    """Options of the sample world."""

    output: Path
    """Output folder for the splits and the evaluations."""
    num_train: int = 2000
    """Number of training scenes."""
    num_test: int = 512
    """Number of test scenes. The unseen split has half as many, with attribute pairs that are not in training."""
    seed: int = 0
    """Random seed."""
    own_sounds: bool = False
    """Give each shape a sound of its own, so that pictures and sounds can be matched."""
    modalities: tuple[str, ...] = tuple(CLASS_ATTRIBUTES)
    """Modalities to render."""
    size: int = 96
    """Width and height of the pictures in pixels."""
    workers: int = min(8, os.cpu_count() or 1)
    """Number of processes. The output does not depend on it."""


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_world(parse(WorldOptions, argv, prog="languagebind.data.world"))


def make_world(options: WorldOptions) -> None:
    """Render all splits and write their annotations and evaluations."""
    if unknown := set(options.modalities) - set(CLASS_ATTRIBUTES):
        raise UserError(f"scenes cannot be rendered as {min(unknown)!r}, only as {sorted(CLASS_ATTRIBUTES)}")
    if options.size < 32 or options.size % 2:
        raise UserError(f"--size {options.size} is odd or too small; use an even size of at least 32")
    started = time.monotonic()
    splits = draw_splits(options)
    for split, scenes in splits.items():
        _write_split(options, split, scenes)
    write_evaluations(options.output, splits, options.modalities, options.seed)
    logging.info("rendered %d scenes in %.0f s", sum(map(len, splits.values())), time.monotonic() - started)


def draw_splits(options: WorldOptions) -> dict[str, list[Scene]]:
    """Draw the scenes of each split. No scene is in two splits."""
    draw = partial(draw_scenes, seed=options.seed, own_sounds=options.own_sounds)
    train = draw("train", options.num_train)
    test = draw("test", options.num_test, avoid=frozenset(scene.contents() for scene in train))
    return {"train": train, "test": test, "unseen": draw("unseen", options.num_test // 2)}


def _write_split(options: WorldOptions, split: str, scenes: list[Scene]) -> None:
    root = options.output / split
    root.mkdir(parents=True, exist_ok=True)
    captions = {scene.id: captions_for(scene, random.Random(f"{options.seed} {scene.id}")) for scene in scenes}
    annotation = {name: {"folder": FOLDER, **own} for name, own in captions.items()}
    (root / "vidal.json").write_text(json.dumps(annotation, indent=1, ensure_ascii=False), encoding="utf-8")
    render = partial(_write_media, root=root, modalities=options.modalities, size=options.size)
    with ProcessPoolExecutor(max(1, options.workers)) as pool:
        for _ in tqdm(pool.map(render, scenes, chunksize=16), split, len(scenes), unit=" scenes", disable=None):
            pass


def _write_media(scene: Scene, root: Path, modalities: tuple[str, ...], size: int) -> None:
    for modality in modalities:
        paths = scene_files(root, scene, modality)
        files = RENDERERS[modality](scene, size)
        if root.name == "test" and modality in MASKED:
            mask = partial(_render.mask, index=seen_pairs(modality).index(scene.pair(modality)))
            files = [*files, *_pictures(mask, ".png", scene, size)]
            paths = [*paths, root / "masks" / modality / f"{scene.id}.png"]
        for path, data in zip(paths, files, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def _mp4(scene: Scene, size: int) -> list[bytes]:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # With more than one thread the bytes would depend on the number of cores.
        options = {"preset": "ultrafast", "crf": "20", "threads": "1"}
        stream = container.add_stream("libx264", rate=_render.FRAMES_PER_SECOND, options=options)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for picture in _render.video_frames(scene, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return [buffer.getvalue()]


def _wav(scene: Scene, size: int) -> list[bytes]:
    from scipy.io import wavfile

    buffer = io.BytesIO()
    wavfile.write(buffer, _render.SAMPLE_RATE, _render.waveform(scene))
    return [buffer.getvalue()]


def _pictures(frames: Callable[[Scene, int], np.ndarray], extension: str, scene: Scene, size: int) -> list[bytes]:
    import cv2

    return [cv2.imencode(extension, frame)[1].tobytes() for frame in frames(scene, size)]


# For each modality, what renders a scene's files at a size in pixels: one, or one for each frame
RENDERERS: dict[str, Callable[[Scene, int], list[bytes]]] = {
    "video": _mp4,
    "audio": _wav,
    "depth": partial(_pictures, _render.depth_frames, ".png"),
    "infrared": partial(_pictures, _render.infrared_frames, ".jpg"),
}


def render_examples(folder: Path, modalities: Iterable[str]) -> dict[str, list[Path]]:
    """Render eight files of each modality into `folder`, and return them; the name of each is that of its class.

    The classes have all values of their first attribute. The scenes are in no split, but their classes are in training.
    """
    scenes, examples = draw_scenes("examples", 211, seed=0), {}  # so many have all values of both attributes
    for name in filter(RENDERERS.__contains__, modalities):
        (folder / name).mkdir(parents=True)
        examples[name] = list[Path]()
        for scene in {scene.pair(name)[0]: scene for scene in scenes}.values():
            frames, suffix = RENDERERS[name](scene, WorldOptions.size), scene_files(folder, scene, name)[0].suffix
            examples[name].append(folder / name / f"{class_name(name, scene.pair(name))}{suffix}")
            examples[name][-1].write_bytes(frames[len(frames) // 2])  # of stills, the middle one
    return examples
