"""Make an HTML page of what the steps made: counts, captions, and examples in all modalities side by side."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from tqdm import tqdm

from ..config import parse
from ..data.tally import Tally, count
from ..data.vidal import CAPTION_SOURCES, LAYOUTS, LEFT_OUT, all_captions, read_annotation, texts_of
from ..eval.report.examples import Picture, draw
from ..eval.report.page import open_templates
from ..files import write_atomic
from ..modalities import modality_class, with_options
from .runners import FOLDER
from .steps import Entry

SAMPLE = 20_000  # entries whose captions are examined; memory does not grow with the annotation


@dataclass(frozen=True)
class ReportOptions:
    """Make an HTML page of an annotation, its media, and the reports of the steps."""

    annotation: Path
    """VIDAL's annotation of the videos"""
    root: Path
    """folder of the media, in VIDAL's layout"""
    output: Path | None = None
    """HTML file to write; None: generate/report.html below the root"""
    examples: int = 12
    """number of entries to show, drawn at random, the same ones in each run"""


def main(argv: Sequence[str], steps: Iterable[str]) -> None:
    """Write the page."""
    options = parse(ReportOptions, argv, "generate report")
    entries, left_out, marks, rng = 0, 0, Tally(), random.Random(0)
    folder, sample = options.root / FOLDER, list[tuple[int, str, dict[str, Any]]]()
    bar = tqdm(read_annotation(options.annotation), unit=" entries", disable=None)
    for entries, (key, fields) in enumerate(bar, 1):
        reasons = {text.partition(": ")[0]: text for text in texts_of(fields.get(LEFT_OUT))}
        left_out += bool(reasons)
        for reason, text in reasons.items():
            count(marks, reason, {"id": key, "detail": text})
        place = rng.randrange(entries) if entries > SAMPLE else len(sample)
        if place < SAMPLE:
            sample[place : place + 1] = [(entries, key, fields)]
    values: dict[str, list[Any]] = {"depth": [], "infrared": [], "audio": []}  # metres, brightness, seconds
    chosen = sorted(rng.sample(sample, min(options.examples, len(sample))))
    page = open_templates(Path(__file__).parent / "templates").get_template("report.html").render(
        options=options, steps=steps, entries=entries, left_out=left_out, marks=marks, sampled=len(sample),
        files={str(path.relative_to(folder)): json.loads(path.read_bytes()) for path in folder.glob("*/re*.json")},
        captions={name: statistics([all_captions(each, name) for *_, each in sample]) for name in CAPTION_SOURCES},
        examples=[(key, fields, pictures(options.root, key, fields, values)) for _, key, fields in chosen],
        values=values, histogram=histogram, texts_of=texts_of,
    )  # fmt: skip
    output = (options.output or folder / "report.html").with_suffix(".html")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, page.encode(errors="replace"))
    print(f"wrote {output}")


def statistics(captions: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return what the page says about a source, from the captions of each entry."""
    texts, words_of = [text for own in captions for text in own], CountVectorizer(stop_words="english").build_analyzer()
    return {"entries": sum(map(bool, captions)), "captions": len(texts), "different": len(set(texts)),
            "lengths": [len(text.split()) for text in texts],
            "words": Counter(word for text in texts for word in words_of(text)).most_common(12)}  # fmt: skip


def histogram(values: Sequence[Any], end: float = 0) -> tuple[float, float, float, list[int]]:
    """Return the share of 0 (unknown) if no end is given, the median, the end, and 64 bars, the last one open."""
    every = np.concatenate([np.ravel(each) for each in values], dtype=float)
    known = every if end else every[every > 0]
    end = end or known.max(initial=0.1)
    bars, _ = np.histogram(np.minimum(known, end), 64, (0, end))
    return 1 - known.size / every.size, np.median(known), end, bars.tolist()


def pictures(root: Path, key: str, fields: dict[str, Any], values: dict[str, list[Any]]) -> dict[str, Picture]:
    """Draw the middle frame of an entry in each modality, or say why there is none. Collect its values."""
    found = {}
    for name in LAYOUTS:
        places = sorted(Entry(key, fields).places(root, name), key=len, reverse=True)
        paths = next((each for each in places if each[0].exists()), places[0])  # frames rather than a clip
        kind = "image" if name == "video" and len(paths) > 1 else name
        reader = with_options(modality_class(kind)(), {"max_depth": 0.0})  # depth without a limit
        found[name] = draw(reader, key, [str(path) for path in paths])
        if found[name].uri and name in values:
            raw = reader.decode(paths[len(paths) // 2])
            values[name].append(raw[0].shape[1] / raw[1] if name == "audio" else raw)
    return found
