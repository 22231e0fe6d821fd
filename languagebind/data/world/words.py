"""Describe scenes in captions for training, and in prompts for evaluation with the same or with other words.

Captions vary in wording and order and mention only some of a scene's attributes, so that an encoder
learns attributes, not sentences. `REWORDED` shares no word with any training caption.
"""

import random
from collections.abc import Sequence

from ..vidal import NUM_FRAMES
from .scenes import CLASS_ATTRIBUTES, SENSED, Scene

# Phrases for each attribute value. Nouns and adjectives follow "a". Clauses come before or after them.
NOUNS = {
    "ball": ("ball", "sphere", "globe", "round ball", "balloon"),
    "cube": ("cube", "box", "block", "square box", "square"),
    "pyramid": ("pyramid", "triangle", "triangle shape", "cone"),
    "ring": ("ring", "hoop", "donut", "ring shape"),
    "star": ("star", "star shape", "starfish", "pentagram"),
    "cross": ("cross", "plus sign", "cross shape", "cross symbol"),
    "pole": ("pole", "stick", "rod", "thin stick", "pillar"),
    "heart": ("heart", "heart shape", "love heart"),
}
THINGS = ("thing", "object")  # nouns for a shape that is not mentioned
ADJECTIVES = {
    "red": ("red", "bright red", "scarlet", "ruby red"),
    "orange": ("orange", "bright orange", "apricot orange", "pumpkin colored"),
    "yellow": ("yellow", "bright yellow", "golden yellow", "lemon yellow"),
    "green": ("green", "bright green", "lime green", "olive green"),
    "blue": ("blue", "deep blue", "navy blue", "sapphire blue"),
    "pink": ("pink", "bright pink", "magenta", "fuchsia pink"),
    "white": ("white", "all white", "snow white", "ivory white"),
    "black": ("black", "pitch black", "charcoal black", "jet black"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "plastic": ("plastic", "smooth plastic"),
    "wooden": ("wooden", "wood", "striped wooden"),
    "metal": ("metal", "shiny metal", "steel"),
    "freezing": ("freezing", "icy", "frozen", "frosty", "ice cold"),
    "cool": ("cool", "chilly", "slightly cold", "coolish"),
    "warm": ("warm", "lukewarm", "pleasantly warm", "body warm"),
    "hot": ("hot", "burning hot", "scorching", "boiling hot", "blazing hot"),
}
CLAUSES = {
    "touching": ("very close to the camera", "right in front of the camera", "within reach", "extremely close"),
    "near": ("near the camera", "a few steps away", "at a short distance", "close by"),
    "midway": ("halfway across the room", "in the middle distance", "at medium distance", "across the room"),
    "far": ("far away", "far from the camera", "in the far distance", "at the far end of the room"),
    "still": ("staying still", "that does not move", "standing still", "at rest", "motionless"),
    "sideways": ("moving from side to side", "sliding left and right", "going left and right", "sliding sideways"),
    "bouncing": ("bouncing up and down", "jumping up and down", "moving up and down", "hopping"),
    "circling": ("moving in a circle", "going round and round", "circling around", "moving in circles"),
    "left": ("on the left", "on the left side"),
    "middle": ("in the center", "at the center"),
    "right": ("on the right", "on the right side"),
}
SOUND_NOUNS = {
    "whistle": ("whistle", "whistling", "high whistle", "shrill whistle", "flute"),
    "hum": ("hum", "humming", "low hum", "deep drone", "low rumble"),
    "buzz": ("buzz", "buzzing", "buzzing bee", "buzzing mosquito"),
    "hiss": ("hiss", "hissing", "hissing steam", "hissing snake"),
    "siren": ("siren", "wailing siren", "alarm siren", "police siren"),
    "bell": ("bell", "ringing bell", "church bell", "chime", "gong"),
    "drum": ("drum", "drum roll", "drumming", "beating drum"),
    "chirp": ("chirping", "chirping bird", "bird chirp", "tweeting bird", "singing bird"),
}
SOUND_ADJECTIVES = {
    "steady": ("steady", "continuous", "constant", "unbroken"),
    "slow": ("slow", "slowly repeating", "slowly pulsing"),
    "fast": ("fast", "rapid", "quickly repeating", "fast pulsing"),
    "once": ("single", "single short", "short single"),
    "quiet": ("quiet", "soft", "faint"),
    "loud": ("loud", "very loud", "noisy"),
}
SOUND_CLAUSES = {
    "steady": ("all the time", "without a pause", "that goes on and on"),
    "slow": ("again and again slowly", "repeating slowly", "with long pauses"),
    "fast": ("again and again quickly", "repeating fast", "in quick pulses"),
    "once": ("only once", "just a single time", "once and then silence"),
}

# The same meanings in words that no caption uses.
REWORDED = {
    "ball": "spherical orb",
    "cube": "cubic crate",
    "pyramid": "tetrahedron",
    "ring": "doughnut",
    "star": "starlike asterisk",
    "cross": "crucifix crossing",
    "pole": "slender baton",
    "heart": "romantic valentine",
    "touching": "directly facing our lens",
    "near": "couple paces ahead",
    "midway": "midrange",
    "far": "distant, faraway",
    "freezing": "wintry glacial",
    "cool": "mildly cooled",
    "warm": "cozy toasty",
    "hot": "scalding fiery",
    "red": "crimson reddish",
    "orange": "tangerine carrot",
    "yellow": "yellowish sunflower",
    "green": "emerald greenish",
    "blue": "azure bluish",
    "pink": "rosy pinkish",
    "white": "whitish alabaster",
    "black": "ebony blackish",
    "still": "stationary, unmoving",
    "sideways": "swaying horizontally",
    "bouncing": "leaping upward",
    "circling": "orbiting circularly",
    "whistle": "shrieking kettle",
    "hum": "engine's murmur",
    "buzz": "hornets",
    "hiss": "serpent's hisses",
    "siren": "ambulance, patrol car",
    "bell": "doorbell",
    "drum": "percussion",
    "chirp": "birdsong",
    "steady": "perpetual nonstop",
    "slow": "gradual, sluggish",
    "fast": "speedy",
    "once": "lone",
}
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
