"""Read VIDAL-10M's annotation file, locate its media, and draw captions to train on.

An annotation is `{youtube_id: {"folder", "raw", "mplug", "polish_mplug", "sound_mplug", "ofa": [8 captions]}}`.
"""

import html
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..config import UserError, first_line
from ..files import is_plain, mend

NUM_FRAMES = 8  # frames per clip in VIDAL; `ofa` has one caption per frame

# The weight of each source in a `mix`, as in the original LanguageBind code. The weight of `ofa` is per frame.
MIX_WEIGHTS = {"raw": 0.2, "mplug": 0.2, "polish_mplug": 0.2, "sound_mplug": 0.2, "ofa": 0.025}
CAPTION_SOURCES = tuple(MIX_WEIGHTS)
# Fields that the generation adds: the path of the video, what the filter measured, and why it leaves an entry out
SOURCE, MEASURED, LEFT_OUT = "source", "measured", "left_out"
NOT_CAPTIONS = ("folder", SOURCE, MEASURED, LEFT_OUT)
NEGATIVES = "negatives"  # texts beside the captions that do not describe the sample: hard negatives

# The locations of each modality's media below the root. The first one that exists is used. `{clips}` is
# `{folder}_resize256_skip15`. VIDAL never published a layout for audio, so the layout here is ours.
LAYOUTS = {
    "video": ("{clips}/{id}.mp4", "{clips}/{id}_resize256_folder/{frame}.jpg"),
    "depth": ("{folder}/{id}_depth_f8glpn_folder/{frame}.png",),
    "infrared": ("{folder}/{id}_thermal_folder/{frame}.jpg",),
    "audio": tuple(f"{{folder}}_audio/{{id}}.{extension}" for extension in ("wav", "flac", "mp3", "ogg")),
}

LONGEST = 2000  # characters per caption; text towers read far less, and tokenizers are slow on long texts
_READ_SIZE = 1 << 20  # characters
_LARGEST_ENTRY = 1 << 24  # characters; an entry that does not parse within this many is damaged
_KEY = re.compile(r'[\s,{]*("(?:[^"\\]|\\.)*")\s*:\s*')  # the key of an entry, with the punctuation around it
_END = re.compile(r"[\s,{]*\}")

# Hashtags and title words that name the platform of a clip, not its content: `#YouTubeShorts`, `viralvideos`.
_PLATFORM_WORDS = re.compile(r"\b(?:you\s?tube|yt|tik\s?tok|vira?l|shorts?|videos?)+s?\b")
_NOT_IN_TITLE = re.compile(r"[^a-z0-9\s.,;:?!'\"|]")
_NOT_IN_TAGS = re.compile(r"[^a-z0-9\s]")

BLANK, NOT_TEXT = "blank or n/a", "not valid UTF-8"  # faults of captions
_BLANKS = ("", "n/a", "#n/a", "<na>", "nan", "null", "none")  # as programs write an empty cell


class MissingCaption(ValueError):
    """A sample has no caption of the requested source, or the caption is empty after cleaning."""


def choose_caption(captions: Mapping[str, Any], source: str, rng: random.Random) -> tuple[str, int | None]:
    """Draw a caption of one sample; return the caption and the frame that it describes (None for the whole clip).

    `source` is a key of `captions`, or `mix`, which draws from the sample's sources by `MIX_WEIGHTS`. If a source has a
    list, one entry is drawn. For `ofa`, the index of the entry is the frame. Titles (`raw`) are cleaned. Raises
    `MissingCaption` if the sample has no such source, or its text is empty.
    """
    names = source_names(source)
    choices = [(caption, MIX_WEIGHTS.get(name, 1.0)) for name in names for caption in _texts(captions, name)]
    if not choices:
        faults = caption_faults({name: captions.get(name) for name in names})
        absent = f"no caption of source {source!r}, only of {sorted(captions)}"
        raise MissingCaption("the caption is not valid UTF-8" if NOT_TEXT in faults else absent)
    drawn, weights = zip(*choices, strict=True)
    return rng.choices(drawn, weights)[0]


def all_captions(captions: Mapping[str, Any], source: str) -> list[str]:
    """Return every text that `choose_caption` may draw."""
    return [text for name in source_names(source) for text, _ in _texts(captions, name)]


def texts_of(value: Any) -> list[str]:
    """Return the texts of a caption source, whose value is one text or a list."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def caption_fault(text: Any) -> str | None:
    """Return why a value cannot be used as a caption, or None if it can."""
    if not isinstance(text, str) or text.strip().lower() in _BLANKS:
        return BLANK
    return None if is_plain(mend(text)) else NOT_TEXT


def caption_faults(captions: Mapping[str, Any]) -> Counter[str]:
    """Return the number of captions of one sample with each fault."""
    return Counter(fault for value in captions.values() for text in texts_of(value) if (fault := caption_fault(text)))


def clean_captions(captions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the captions as `mend` reads them, without sources that have no usable text.

    Unusable texts in a list become blank, because the place of a text can be the frame that it describes.
    """
    cleaned = {name: _cleaned(value) for name, value in captions.items()}
    usable = {name: texts for name, texts in cleaned.items() if any(texts)}
    return {name: texts if isinstance(captions[name], list) else texts[0] for name, texts in usable.items()}


def source_names(source: str, negatives: bool = False) -> tuple[str, ...]:
    """Return the caption keys that a source draws from, and that of hard negatives if asked for."""
    return (CAPTION_SOURCES if source == "mix" else (source,)) + (NEGATIVES,) * negatives


def clean_title(title: str) -> str:
    """Return a video's title without platform words and symbols. Hashtags become words after a comma.

    >>> clean_title("Red ball so CLOSE! 😱 #Ball #YouTubeShorts #viral")
    'red ball so close!, ball'
    """
    title, _, tags = html.unescape(html.unescape(title)).lower().partition("#")
    title = _NOT_IN_TITLE.sub("", _PLATFORM_WORDS.sub("", title))
    tags = _NOT_IN_TAGS.sub("", _PLATFORM_WORDS.sub("", tags.replace("#", " ")))
    return ", ".join(" ".join(part.split()) for part in (title, tags) if part.strip())


def read_annotation(path: Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream (id, entry) of the first `limit` entries of an annotation file, in order, or raise `UserError`."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for key, entry in itertools.islice(_object_items(file), limit):
                if not isinstance(entry, dict) or ".." in f"{entry.get('folder')}/{key}".split("/"):
                    raise ValueError(f"entry {key!r} is not an object, or its folder or id leads out of the root")
                yield key, entry
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as a VIDAL annotation: {first_line(error)}") from error


def media_paths(root: Path, sample_id: str, folder: str, modality: str) -> list[list[Path]]:
    """Return the possible locations of a sample's media in VIDAL's layout, each one file or eight frames."""
    if modality not in LAYOUTS:
        raise UserError(f"VIDAL has no layout for {modality!r}, only for {sorted(LAYOUTS)}; use csv or jsonl")
    clips = f"{'new_download' if folder.startswith('new_') else folder}_resize256_skip15"
    locations = []
    for pattern in LAYOUTS[modality]:
        frames = range(NUM_FRAMES) if "{frame}" in pattern else (0,)
        names = [pattern.format(folder=folder, clips=clips, id=sample_id, frame=k).lstrip("/") for k in frames]
        locations.append([root / name for name in names])  # below the root, even if the folder is ""
    return locations


def _texts(captions: Mapping[str, Any], name: str) -> list[tuple[str, int | None]]:
    """Return the texts of one source that are not empty, each with the frame that it describes, or None."""
    cleaned = [clean_title(text) if name == "raw" else text.strip() for text in _cleaned(captions.get(name))]
    return [(text[:LONGEST], index if name == "ofa" else None) for index, text in enumerate(cleaned) if text]


def _cleaned(value: Any) -> list[str]:
    """Return the texts of a caption source as `mend` reads them, with a blank for each that cannot be used."""
    return ["" if caption_fault(text) else mend(text) for text in (value if isinstance(value, list) else [value])]


def _object_items(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Yield the (key, value) pairs of a JSON object while reading its file."""
    decoder, buffer, position = json.JSONDecoder(), "", 0
    while not _END.match(buffer, position):
        try:
            found = _KEY.match(buffer, position)
            key = json.loads(found[1]) if found else ""
            value, end = decoder.raw_decode(buffer, found.end() if found else len(buffer))
        except json.JSONDecodeError as error:  # incomplete or damaged: read more text to find out
            more = file.read(_READ_SIZE)
            if not more or len(buffer) - position > _LARGEST_ENTRY:
                raise ValueError(f"it is damaged or truncated near {buffer[position : position + 40]!r}") from error
            buffer, position = buffer[position:] + more, 0
        else:
            yield key, value
            position = end
