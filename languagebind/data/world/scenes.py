"""Draw the scenes of the sample world. Some attribute pairs are held out of training."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..vidal import NUM_FRAMES, media_paths

FOLDER = "world"  # the `folder` of every scene in the annotation

VALUES = {
    "shape": ("ball", "cube", "pyramid", "ring", "star", "cross", "pole", "heart"),
    "colour": ("red", "orange", "yellow", "green", "blue", "pink", "white", "black"),
    "size": ("small", "large"),
    "material": ("plastic", "wooden", "metal"),
    "distance": ("touching", "near", "midway", "far"),
    "temperature": ("freezing", "cool", "warm", "hot"),
    "motion": ("still", "sideways", "bouncing", "circling"),
    "sound": ("whistle", "hum", "buzz", "hiss", "siren", "bell", "drum", "chirp"),
    "rhythm": ("steady", "slow", "fast", "once"),
    "loudness": ("quiet", "loud"),
}

METRES = {"touching": 0.8, "near": 1.8, "midway": 4.0, "far": 8.0}
REACH = 0.4  # the amplitude of a motion, in half picture widths
CELSIUS = {"freezing": -30.0, "cool": 0.0, "warm": 50.0, "hot": 95.0}

# The pair of attributes that defines the classes of each modality. The modality senses both.
CLASS_ATTRIBUTES = {
    "depth": ("shape", "distance"),
    "infrared": ("shape", "temperature"),
    "audio": ("sound", "rhythm"),
    "video": ("colour", "motion"),
}

# The attributes that each modality senses. Its retrieval captions describe only these.
SENSED = {
    "depth": ("shape", "distance", "size", "side"),
    "infrared": ("shape", "temperature", "size", "side"),
    "audio": ("sound", "rhythm", "loudness"),
    "video": ("shape", "colour", "size", "material", "motion", "side"),
}


@dataclass(frozen=True)
class Scene:
    """One object in a room, seen and heard for a few seconds.

    `x` and `y` are the object's mean position in the picture, from -1 (left, top) to 1. `metres` is the distance and
    `celsius` the temperature. `seed` determines the random details: noise, background and phase.
    """

    id: str
    shape: str
    colour: str
    size: str
    material: str
    distance: str
    temperature: str
    motion: str
    sound: str
    rhythm: str
    loudness: str
    x: float
    y: float
    metres: float
    celsius: float
    seed: int

    def place(self, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the object's centre (x, y) in the picture, -1 to 1, at times from 0 (start of the clip) to 1 (end)."""
        phase = 2 * np.pi * (time + (self.seed % 97) / 97)
        x = self.x + REACH * np.sin(phase) * (self.motion in ("sideways", "circling"))
        y = self.y + REACH * np.cos(phase) * (self.motion in ("bouncing", "circling"))
        return x, y

    def side(self, frame: int | None = None) -> str:
        """Return the object's side (`left`, `middle` or `right`) in one of the eight frames, or on average."""
        x = self.x if frame is None else float(self.place(np.array(frame / NUM_FRAMES))[0])
        return "left" if x < -0.12 else "right" if x > 0.12 else "middle"

    def pair(self, modality: str) -> tuple[str, str]:
        """Return the scene's class for a modality, a pair of attribute values."""
        first, second = CLASS_ATTRIBUTES[modality]
        return getattr(self, first), getattr(self, second)

    def contents(self) -> tuple[str, ...]:
        """Return all attribute values. Two scenes with the same values differ only in random details."""
        return tuple(getattr(self, attribute) for attribute in VALUES)


def unseen_pairs(modality: str) -> list[tuple[str, str]]:
    """Return a modality's attribute pairs that are held out of training, one per value of the first attribute.

    Training scenes have every value in other pairs, so these pairs test only composition.
    """
    first, second = (VALUES[attribute] for attribute in CLASS_ATTRIBUTES[modality])
    shift = sorted(CLASS_ATTRIBUTES).index(modality)  # otherwise depth and infrared would hold out the same pairs
    return [(value, second[(row + row // len(second) + shift) % len(second)]) for row, value in enumerate(first)]


def seen_pairs(modality: str) -> list[tuple[str, str]]:
    """Return the attribute pairs of a modality that occur in training and test scenes."""
    first, second = (VALUES[attribute] for attribute in CLASS_ATTRIBUTES[modality])
    unseen = set(unseen_pairs(modality))
    return [(a, b) for a in first for b in second if (a, b) not in unseen]


def scene_files(root: Path, scene: Scene, modality: str) -> list[Path]:
    """Return the paths of a scene's media (one file, or all frames) below `root`, the folder of its split."""
    return media_paths(root, scene.id, FOLDER, modality)[0]


def draw_scenes(
    split: str, count: int, seed: int, avoid: frozenset[tuple[str, ...]] = frozenset(), own_sounds: bool = False
) -> list[Scene]:
    """Draw the scenes of a split, none with contents in `avoid`. Only the split `unseen` has held-out pairs.

    With `own_sounds` each shape has a sound of its own; otherwise nothing visible tells what a scene sounds like.
    """
    rng = np.random.default_rng([seed, *split.encode()])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = _draw(rng, f"{split}{seed}-{len(scenes):07d}", split == "unseen", own_sounds)
        if scene.contents() not in avoid:
            scenes.append(scene)
    return scenes


def _draw(rng: np.random.Generator, scene_id: str, unseen: bool, own_sounds: bool) -> Scene:
    values = {attribute: str(rng.choice(options)) for attribute, options in VALUES.items()}
    if own_sounds:
        values["sound"] = VALUES["sound"][VALUES["shape"].index(values["shape"])]
    for modality, (first, second) in CLASS_ATTRIBUTES.items():
        pairs = unseen_pairs(modality) if unseen else seen_pairs(modality)
        values[second] = str(rng.choice([b for a, b in pairs if a == values[first]]))
    x, y = rng.uniform(-0.3, 0.3, 2)
    return Scene(
        id=scene_id,
        **values,
        x=round(float(x), 3),
        y=round(float(y), 3),
        metres=round(METRES[values["distance"]] * float(rng.uniform(0.92, 1.08)), 3),
        celsius=round(CELSIUS[values["temperature"]] + float(rng.uniform(-4, 4)), 1),
        seed=int(rng.integers(2**31)),
    )
