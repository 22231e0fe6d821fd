"""VIDAL-10M: its annotation file, where its media lie, and which of a sample's captions to learn from.

An annotation is `{youtube_id: {"folder", "raw", "mplug", "polish_mplug", "sound_mplug", "ofa": [8 captions]}}`.
"""

import html
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..config import UserError

NUM_FRAMES = 8  # frames that VIDAL extracts of each clip; `ofa` has one caption a frame

# The chance of each source in a `mix`, as in the original; `ofa` counts once for each of its frames.
MIX_WEIGHTS = {"raw": 0.2, "mplug": 0.2, "polish_mplug": 0.2, "sound_mplug": 0.2, "ofa": 0.025}
CAPTION_SOURCES = tuple(MIX_WEIGHTS)

# Where each modality lies below the root; the first that is there is taken. `{clips}` is `{folder}_resize256_skip15`.
# VIDAL never published a layout for audio, so that one is ours.
LAYOUTS = {
    "video": ("{clips}/{id}.mp4", "{clips}/{id}_resize256_folder/{frame}.jpg"),
    "depth": ("{folder}/{id}_depth_f8glpn_folder/{frame}.png",),
    "infrared": ("{folder}/{id}_thermal_folder/{frame}.jpg",),
    "audio": tuple(f"{{folder}}_audio/{{id}}.{extension}" for extension in ("wav", "flac", "mp3", "ogg")),
}

_LONGEST = 2000  # characters; towers read far less, and a tokenizer would take its time over a book
_READ_SIZE = 1 << 20  # characters
_LARGEST_ENTRY = 1 << 24  # characters; text that does not parse within so many is wrong, not cut
_BETWEEN = re.compile(r"[\s,]*")
_COLON = re.compile(r"\s*:\s*")

# Hashtags and title words that say where a clip was posted, not what it shows: `#YouTubeShorts`, `viralvideos`.
_PLATFORM_WORDS = re.compile(r"\b(?:you\s?tube|yt|tik\s?tok|vira?l|shorts?|videos?)+s?\b")
_NOT_IN_TITLE = re.compile(r"[^a-z0-9\s.,;:?!'\"|]")
_NOT_IN_TAGS = re.compile(r"[^a-z0-9\s]")


class MissingCaption(ValueError):
    """A sample has no caption of the source asked for, or nothing is left of it after cleaning."""


def choose_caption(captions: Mapping[str, Any], source: str, rng: random.Random) -> tuple[str, int | None]:
    """A caption of one sample, and the frame that it describes or None where it is of the whole clip.

    `source` is a key of `captions`, or `mix`: one drawn by `MIX_WEIGHTS` among those that the sample has. Of a
    list one entry is drawn; of `ofa` its index is the frame. Titles (`raw`) are cleaned.

    Raises:
        MissingCaption: the sample has no such source, or its text is empty.
    """
    choices = [
        (text, frame, MIX_WEIGHTS.get(name, 1.0))
        for name in source_names(source)
        for text, frame in _texts(captions, name)
    ]
    if not choices:
        raise MissingCaption(f"no caption of source {source!r}, only of {sorted(captions)}")
    ((text, frame, _),) = rng.choices(choices, weights=[weight for _, _, weight in choices])
    return text, frame


def all_captions(captions: Mapping[str, Any], source: str) -> list[str]:
    """Every text that `choose_caption` may draw."""
    return [text for name in source_names(source) for text, _ in _texts(captions, name)]


def source_names(source: str) -> tuple[str, ...]:
    """The keys of a sample's captions that a source draws from."""
    return CAPTION_SOURCES if source == "mix" else (source,)


def clean_title(title: str) -> str:
    """A video's title without platform words and symbols; hashtags follow as words after a comma.

    >>> clean_title("Red ball so CLOSE! 😱 #Ball #YouTubeShorts #viral")
    'red ball so close!, ball'
    """
    title, _, tags = html.unescape(html.unescape(title)).lower().partition("#")
    title = _squeeze(_NOT_IN_TITLE.sub("", _PLATFORM_WORDS.sub("", title)))
    tags = _squeeze(_NOT_IN_TAGS.sub("", _PLATFORM_WORDS.sub("", tags.replace("#", " "))))
    return ", ".join(part for part in (title, tags) if part)


def read_annotation(path: Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each (id, entry) of an annotation file, in file order, at most `limit` of them.

    The file is parsed as it is read, so that ten million entries need no more memory than one.

    Raises:
        UserError: the file cannot be read, or is not a JSON object of objects.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for count, (key, entry) in enumerate(_object_items(file)):
                if count == limit:
                    return
                if not isinstance(entry, dict):
                    raise UserError(f"{path}: the entry of {key!r} is no JSON object")
                yield key, entry
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a VIDAL annotation: {error}") from error


def captions_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The caption sources of an annotation entry: all that it holds but the folder."""
    return {source: text for source, text in entry.items() if source != "folder" and text}


def media_paths(root: Path, sample_id: str, folder: str, modality: str) -> list[list[Path]]:
    """The places where a sample's media of one modality may lie: one file each, or eight frames.

    Raises:
        UserError: VIDAL has no layout for this modality.
    """
    if modality not in LAYOUTS:
        raise UserError(f"VIDAL has no layout for {modality!r}, only for {sorted(LAYOUTS)}; use csv or jsonl")
    clips = "new_download" if folder.startswith("new_") else folder
    names = {"folder": folder, "clips": f"{clips}_resize256_skip15", "id": sample_id}
    return [[root / path for path in _frames(pattern, names)] for pattern in LAYOUTS[modality]]


def _frames(pattern: str, names: dict[str, str]) -> list[str]:
    frames = range(NUM_FRAMES) if "{frame}" in pattern else (0,)
    return [pattern.format(**names, frame=frame) for frame in frames]


def _texts(captions: Mapping[str, Any], name: str) -> list[tuple[str, int | None]]:
    """The usable texts of one source, with the frame that each describes."""
    value = captions.get(name)
    texts = value if isinstance(value, list) else [value]
    texts = [text if isinstance(text, str) else "" for text in texts]
    cleaned = [clean_title(text) if name == "raw" else text.strip() for text in texts]
    return [(text[:_LONGEST], index if name == "ofa" else None) for index, text in enumerate(cleaned) if text]


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _object_items(file: TextIO) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of the JSON object in a text file, without holding the object."""
    decoder = json.JSONDecoder()
    buffer, position = file.read(_READ_SIZE).lstrip("\ufeff \t\r\n"), 1
    if not buffer.startswith("{"):
        raise json.JSONDecodeError("expected {", buffer[:20], 0)
    while True:
        position = _BETWEEN.match(buffer, position).end()
        if buffer.startswith("}", position):
            return
        try:
            key, end = decoder.raw_decode(buffer, position)
            value, end = decoder.raw_decode(buffer, _COLON.match(buffer, end).end())
        except (json.JSONDecodeError, AttributeError) as error:  # cut in the middle, or wrong: only more text can tell
            more = file.read(_READ_SIZE)
            if not more or len(buffer) - position > _LARGEST_ENTRY:
                raise json.JSONDecodeError(
                    f"wrong or cut off near {buffer[position : position + 40]!r}", "", 0
                ) from error
            buffer, position = buffer[position:] + more, 0
            continue
        yield key, value
        position = end
