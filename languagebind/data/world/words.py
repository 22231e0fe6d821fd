"""Describe scenes in captions for training, and in prompts for evaluation with the same or with other words.

Captions vary in wording and order and mention only some of a scene's attributes, so that an encoder
learns attributes, not sentences. `REWORDED` shares no word with any training caption.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from ...config import load_yaml
from ..vidal import NUM_FRAMES
from .scenes import CLASS_ATTRIBUTES, SENSED, Scene

# For each attribute value, the phrases of captions and, in `reworded`, a phrase that no caption uses
_WORDS = load_yaml(Path(__file__).with_name("words.yaml"))
NOUNS, ADJECTIVES, CLAUSES = (_WORDS[kind] for kind in ("nouns", "adjectives", "clauses"))
SOUND_NOUNS, SOUND_ADJECTIVES, SOUND_CLAUSES = (_WORDS[f"sound_{kind}"] for kind in ("nouns", "adjectives", "clauses"))
REWORDED = _WORDS["reworded"]
THINGS = ("thing", "object")  # nouns for a shape that is not mentioned
TEMPLATES = ("{c}", "the {c}")
REWORDED_TEMPLATES = ("{c}", "this {c}", "some {c}", "one {c}")

PHRASINGS = 4  # captions per source, except for the title

_VISIBLE = ("size", "temperature", "colour", "material", "distance", "motion", "side")
_OPENINGS = ("", "", "there is ", "we see ", "in the video there is ")
_SOUND_OPENINGS = ("", "", "the sound of ", "you can hear ", "there is ")


def captions_for(scene: Scene, rng: random.Random) -> dict[str, str | list[str]]:
    """Return a scene's captions, keyed by VIDAL's sources.

    `raw` is a title. `ofa` describes stills, `mplug` the clip, `polish_mplug` its details too, `sound_mplug` the sound.
    """
    still = [name for name in _VISIBLE if name not in ("motion", "temperature")]
    return {
        "raw": _title(scene, rng),
        "mplug": [_describe(scene, _some(_VISIBLE, 1, 3, rng), rng) for _ in range(PHRASINGS)],
        "polish_mplug": [_describe(scene, _some(_VISIBLE, 3, 5, rng), rng) for _ in range(PHRASINGS)],
        "ofa": [" " + _describe(scene, _some(still, 1, 3, rng), rng, frame) for frame in range(NUM_FRAMES)],
        "sound_mplug": [_describe_sound(scene, rng) for _ in range(PHRASINGS)],
    }


def retrieval_caption(scene: Scene, modality: str, rng: random.Random, frame: int | None = None) -> str:
    """Return a caption with every attribute that the modality senses in the scene, or in one frame."""
    sensed = SENSED[modality]
    if "sound" in sensed:
        return _sound_phrase(scene, ["rhythm", "loudness"], rng)
    noun = rng.choice(NOUNS[scene.shape])
    return _sentence(noun, _said(scene, [name for name in sensed if name != "shape"], rng, frame), rng)


def class_name(modality: str, pair: tuple[str, str]) -> str:
    """Return the prompt for a class in words from the captions."""
    first, second = pair
    if "sound" in CLASS_ATTRIBUTES[modality]:
        return f"{SOUND_ADJECTIVES[second][0]} {SOUND_NOUNS[first][0]}"
    if first in ADJECTIVES:
        return f"{ADJECTIVES[first][0]} {THINGS[1]} {CLAUSES[second][0]}"
    if second in ADJECTIVES:
        return f"{ADJECTIVES[second][0]} {NOUNS[first][0]}"
    return f"{NOUNS[first][0]} {CLAUSES[second][0]}"


def reworded_class_name(modality: str, pair: tuple[str, str]) -> str:
    """Return the prompt for a class in words that no caption uses."""
    first, second = (REWORDED[value] for value in pair)
    if pair[0] in ADJECTIVES:
        return f"{first} item, {second}"
    if pair[1] in ADJECTIVES or pair[1] in SOUND_ADJECTIVES:
        return f"{second} {first}"
    return f"{first}, {second}"


def _some(attributes: Sequence[str], least: int, most: int, rng: random.Random) -> list[str]:
    return rng.sample(list(attributes), rng.randint(least, most))


def _describe(scene: Scene, attributes: list[str], rng: random.Random, frame: int | None = None) -> str:
    """Return a sentence with the attributes in this order, and usually with the shape."""
    noun = rng.choice(NOUNS[scene.shape] if rng.random() < 0.85 else THINGS)
    return _sentence(noun, _said(scene, attributes, rng, frame), rng)


def _said(scene: Scene, attributes: list[str], rng: random.Random, frame: int | None) -> tuple[list[str], list[str]]:
    """Return the adjectives and the clauses for attributes of the scene, or of one frame."""
    values = {name: scene.side(frame) if name == "side" else getattr(scene, name) for name in attributes}
    adjectives = [rng.choice(ADJECTIVES[value]) for value in values.values() if value in ADJECTIVES]
    return adjectives, [rng.choice(CLAUSES[value]) for value in values.values() if value in CLAUSES]


def _sentence(noun: str, said: tuple[list[str], list[str]], rng: random.Random) -> str:
    adjectives, clauses = said
    if adjectives and rng.random() < 0.2:
        return ", ".join([f"the {noun} is {' and '.join(adjectives)}", *clauses])
    phrase = with_article(" ".join([*adjectives, noun]))
    if clauses and rng.random() < 0.25:
        return f"{clauses[0]}, {' '.join([phrase, *clauses[1:]])}"
    return rng.choice(_OPENINGS) + " ".join([phrase, *clauses])


def _describe_sound(scene: Scene, rng: random.Random) -> str:
    attributes = _some(("rhythm", "rhythm", "loudness"), 0, 2, rng)
    phrase = _sound_phrase(scene, list(dict.fromkeys(attributes)), rng)
    source = f" from {with_article(rng.choice(NOUNS[scene.shape]))}" if rng.random() < 0.15 else ""
    return phrase + source


def _sound_phrase(scene: Scene, attributes: list[str], rng: random.Random) -> str:
    noun = rng.choice(SOUND_NOUNS[scene.sound])
    clause = ""
    if "rhythm" in attributes and rng.random() < 0.4:
        attributes = [name for name in attributes if name != "rhythm"]
        clause = " " + rng.choice(SOUND_CLAUSES[scene.rhythm])
    adjectives = [rng.choice(SOUND_ADJECTIVES[getattr(scene, name)]) for name in attributes]
    return rng.choice(_SOUND_OPENINGS) + with_article(" ".join([*adjectives, noun])) + clause


def _title(scene: Scene, rng: random.Random) -> str:
    said = _some(("colour", "size", "material", "motion", "distance"), 1, 2, rng)
    words = [rng.choice((ADJECTIVES | CLAUSES)[getattr(scene, name)]) for name in said]
    title = " ".join([rng.choice(NOUNS[scene.shape]), *words]).capitalize()
    tags = rng.sample([scene.shape, scene.colour, scene.sound, scene.material, "shorts", "YouTubeShorts", "viral"], 3)
    return f"{title}{rng.choice(('', '!', ' 😱'))} " + " ".join(f"#{tag}" for tag in tags)


def with_article(phrase: str) -> str:
    """Return the phrase with `a` or `an` before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
