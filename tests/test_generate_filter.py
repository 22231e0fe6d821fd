"""The filter: measures against other tools, marks against brute force, exclusions, shards without what is marked."""

import json
import subprocess
import sys

import imagehash
import numpy as np
import pytest
import torch
from clips import write
from helpers import call
from PIL import Image

from languagebind import load
from languagebind.config import UserError
from languagebind.data.making import main as make_shards
from languagebind.data.members import stream_samples
from languagebind.data.vidal import read_annotation
from languagebind.generate.__main__ import main
from languagebind.generate.filter import Filter, FilterOptions
from languagebind.generate.steps import Entry

TITLES = {
    "first": "A dog runs after a ball on the beach",
    "copy": "The same dog again, in another file #shorts #viral",
    "german": "Ein Hund läuft am Strand hinter einem Ball her",
    "short": "Ok 2",
    "black": "Nothing to be seen here at all",
    "dark": "Nothing to be seen in this one either",
    "damaged": "This file is not a video",
}
FRAMES = {"first": 60, "copy": 60, "german": 40, "short": 8, "black": 30, "dark": 30}


def scenes(seed, length=20, shown=True):
    """Frames of random pictures, which move a little and change after every `length`."""

    def picture(number, height, width):
        rng = np.random.default_rng([seed, number // length])
        noise = [rng.integers(0, 255 if shown else 4, (2**k, 2 ** (k + 1), 3), np.uint8) for k in range(1, 6)]
        layers = [np.array(Image.fromarray(x).resize((128, 64), Image.Resampling.BICUBIC)) for x in noise]
        moved = np.roll(np.mean(layers, axis=0).astype(np.uint8), number % length, axis=1)
        return np.array(Image.fromarray(moved).resize((width, height), Image.Resampling.BICUBIC))

    return picture


PICTURES = {
    "first": scenes(1),
    "copy": scenes(1),
    "german": scenes(2, length=40),
    "short": scenes(3),
    "black": scenes(4, length=40, shown=False),
    "dark": scenes(5, length=40, shown=False),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Clips with two cuts and without, one again in a smaller size, two dark ones and a damaged one; their titles."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count in FRAMES.items():
        small = {"height": 48, "width": 96, "crf": "30"} if name == "copy" else {}
        (folder / f"{name}.mp4").write_bytes(write(count=count, picture=PICTURES[name], **small))
    (folder / "damaged.mp4").write_bytes((folder / "first.mp4").read_bytes()[:900])
    (folder / "titles.csv").write_text("path,title\n" + "".join(f'{x}.mp4,"{y}"\n' for x, y in TITLES.items()))
    return folder


@pytest.fixture(scope="module")
def world(videos, tmp_path_factory):
    """The annotation of the videos, and their frames."""
    root = tmp_path_factory.mktemp("world")
    main(["annotate", f"--videos={videos}", f"--titles={videos / 'titles.csv'}", *flags(root)])
    main(["frames", *flags(root), "--max-bad-share=0.5", "--workers=0"])
    return root


@pytest.fixture
def root(videos, world, tmp_path):
    """A copy of the annotation, with the frames beside it."""
    entries = dict(read_annotation(world / "vidal.json"))
    assert list(entries) == list(TITLES)
    annotate(tmp_path, {key: fields | {"source": str(videos / f"{key}.mp4")} for key, fields in entries.items()})
    (tmp_path / "clips_resize256_skip15").symlink_to(world / "clips_resize256_skip15")
    return tmp_path


def annotate(root, entries):
    (root / "vidal.json").write_text(json.dumps(entries))


def flags(root):
    return [f"--annotation={root / 'vidal.json'}", f"--root={root}"]


def leave_out(root, *more, workers=0):
    """Run the filter; return the reasons of the entries that it leaves out."""
    main(["filter", *flags(root), "--max-bad-share=0.5", f"--workers={workers}", *map(str, more)])
    return {key: entry["left_out"] for key, entry in read_annotation(root / "vidal.json") if "left_out" in entry}


def measured(root, name):
    found = {key: entry.get("measured", {}) for key, entry in read_annotation(root / "vidal.json")}
    return {key: own[name] for key, own in found.items() if name in own}


def report(root):
    return json.loads((root / "generate/filter/report.json").read_bytes())


def counts(root):
    """The report's numbers of entries by reason."""
    return {reason: found["count"] for reason, found in report(root)["notes"].items()}


def test_lengths_are_ffprobes_and_cuts_those_of_the_making(videos, root):
    assert leave_out(root, "--min-seconds=1", "--max-cuts=1") == {
        "first": ["too many cuts: 2"], "copy": ["too many cuts: 2"], "short": ["too short: 0.32 s"],
    }  # fmt: skip
    assert measured(root, "cuts") == {"first": 2, "copy": 2, "german": 0, "short": 0, "black": 0, "dark": 0}
    for name, seconds in measured(root, "seconds").items():
        probe = ["ffprobe", "-v", "error", "-show_entries", "format=duration", "-of", "csv=p=0"]
        found = subprocess.run([*probe, str(videos / f"{name}.mp4")], capture_output=True, check=True, text=True).stdout
        assert seconds == pytest.approx(float(found), abs=0.001)
    found = report(root)
    assert (found["entries"], found["made"], found["failed"], found["kept"], found["left out"]) == (7, 6, 1, 4, 3)
    assert counts(root) == {"too many cuts": 2, "too short": 1, "not measured": 1}
    assert found["notes"]["too short"]["examples"] == [{"id": "short", "detail": "short, too short: 0.32 s"}]
    before = measured(root, "seconds")
    assert leave_out(root, "--max-seconds=2", "--max-cuts=2") == {key: ["too long: 2.4 s"] for key in ("first", "copy")}
    assert (report(root)["made"], measured(root, "seconds")) == (0, before)


@pytest.mark.parametrize(("form", "codec"), [("avi", "mpeg4"), ("matroska", "libx264"), ("mpegts", "libx264")])
def test_lengths_of_other_containers(form, codec, tmp_path):
    (tmp_path / f"clip.{form}").write_bytes(write(form, codec, count=50))
    made = Filter(tmp_path, FilterOptions(min_seconds=1)).one(Entry("a", {"source": f"clip.{form}"}))
    assert made.texts == {"measured": {"seconds": 2.0}}


def test_titles_in_other_languages_are_left_out_unless_they_are_too_short_to_tell(root):
    assert leave_out(root, "--languages", "en") == {"german": ["language: de"]}
    assert measured(root, "language")["short"] in ("und", "zxx")
    assert leave_out(root, "--languages", "en", "de") == {}


def test_copies_of_earlier_entries_are_left_out_but_not_blank_ones(root):
    assert leave_out(root, "--near-duplicates=24") == {"copy": ["copy: first"]}
    assert counts(root) == {"copy": 1, "not measured": 1}
    found = measured(root, "hash")
    folder = root / "clips_resize256_skip15"
    for name in ("first", "copy", "german"):
        own = [imagehash.phash(Image.open(folder / f"{name}_resize256_folder/{k}.jpg")) for k in range(8)]
        assert found[name] == "".join(map(str, own))
    assert found["black"] == found["dark"] == "0" * 128
    distances = {other: hamming(found["first"], found[other]) for other in ("copy", "german", "short")}
    assert distances["copy"] <= 24 < 150 < min(distances["german"], distances["short"])
    assert leave_out(root, f"--near-duplicates={distances['copy'] - 1}") == {}
    assert leave_out(root, f"--near-duplicates={distances['copy']}", "--max-seconds=1.7") == {
        "first": ["too long: 2.4 s"], "copy": ["too long: 2.4 s"],
    }  # fmt: skip


def hamming(a, b):
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(x), np.uint8)) for x in (a, b)]
    return int((bits[0] != bits[1]).sum())


@pytest.mark.parametrize("most", [0, 24, 25, 60])
def test_copies_by_hash_are_those_of_brute_force(most, tmp_path):
    rng = np.random.default_rng(most)
    bits = rng.integers(0, 2, (120, 512))
    chosen = bits[rng.integers(0, 120, 900)]
    for row, flips in zip(chosen, rng.integers(0, 2 + most * 5 // 4, 900), strict=True):
        row[rng.permutation(512)[:flips]] ^= 1
    chosen[:, :64] *= rng.integers(0, 2, (900, 1))  # a blank first frame
    texts = [np.packbits(row).tobytes().hex() for row in chosen]
    annotate(tmp_path, {str(k): {"measured": {"hash": text}} for k, text in enumerate(texts)})
    found, kept, expected = leave_out(tmp_path, f"--near-duplicates={most}"), [], {}
    for k, row in enumerate(chosen):
        near = [other for other in kept if (chosen[other] != row).sum() <= most]
        if near:
            expected[str(k)] = {f"copy: {other}" for other in near}
        else:
            kept.append(k)
    assert found.keys() == expected.keys()
    assert 50 < len(found) < 850
    assert all(own[0] in expected[key] for key, own in found.items())


@pytest.fixture(scope="module")
def safety(tmp_path_factory):
    """A tiny classifier with random weights and three labels."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("safety")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = ["fine", "odd", "nsfw"]
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
    config = ViTConfig(**sizes, image_size=32, patch_size=16, **names)
    model = ViTForImageClassification(config)
    model.classifier.weight.data.mul_(40)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_an_unsafe_frame_leaves_an_entry_out(safety, root):
    from transformers import ViTForImageClassification, ViTImageProcessor

    model, processor = (kind.from_pretrained(safety) for kind in (ViTForImageClassification, ViTImageProcessor))
    expected = {}
    for name in FRAMES:
        folder = root / f"clips_resize256_skip15/{name}_resize256_folder"
        with torch.no_grad():
            inputs = processor([Image.open(folder / f"{k}.jpg") for k in range(8)], return_tensors="pt")
            expected[name] = model(**inputs).logits.softmax(-1).amax(0).tolist()
    bound = sorted(scores[2] for scores in expected.values())[2] + 1e-3
    options = [f"--safety-model={safety}", "--unsafe-labels=nsfw"]
    found = leave_out(root, *options, f"--unsafe-above={bound}")
    assert found.keys() == {name for name, scores in expected.items() if scores[2] > bound}
    assert 0 < len(found) < 6
    assert all(own == [f"nsfw: {round(expected[name][2], 4):g}"] for name, own in found.items())
    for name, scores in measured(root, str(safety)).items():
        assert list(scores.values()) == pytest.approx(expected[name], abs=1e-4)
    assert report(root)["made"] == 6
    assert leave_out(root, *options, "--unsafe-above=1") == {}
    assert report(root)["made"] == 0
    record = json.loads((root / "generate/filter/record.json").read_bytes())
    assert record[str(safety)]["weights_sha256"].keys() == {"model.safetensors"}
    with pytest.raises(UserError, match=r"the labels of .* are fine, odd, nsfw, not porn"):
        leave_out(root, f"--safety-model={safety}", "--unsafe-labels=porn")


def test_ids_of_evaluation_sets_are_left_out_and_so_are_their_copies(tmp_path):
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(64).hex() for _ in range(3)]
    entries = {
        "before": {"measured": {"hash": hashes[0]}},
        "dQw4w9WgXcQ_30": {"measured": {"hash": hashes[0]}},
        "dQw4w9WgXcQQ": {"measured": {"hash": hashes[1]}},
        "by-source": {"source": "videos/clip 7.mp4", "measured": {"hash": hashes[2]}},
        "after": {"measured": {"hash": hashes[2]}},
        "after the copy": {"measured": {"hash": hashes[1]}},
    }
    annotate(tmp_path, entries)
    (tmp_path / "test.txt").write_text("# of the test set\ndQw4w9WgXcQ\n\nclip 7\n")
    (tmp_path / "val.txt").write_text("by-source\nnowhere\n")
    lists = ["--exclude-ids", tmp_path / "test.txt", tmp_path / "val.txt"]
    ids = {"dQw4w9WgXcQ_30": ["in test.txt"], "by-source": ["in test.txt", "in val.txt"]}
    assert leave_out(tmp_path, *lists) == ids
    assert counts(tmp_path) == {"in test.txt": 2, "in val.txt": 1}
    assert leave_out(tmp_path, *lists, "--near-duplicates=8") == ids | {
        "before": ["copy of one in test.txt: dQw4w9WgXcQ_30"], "after": ["copy of one in test.txt: by-source"],
        "after the copy": ["copy: dQw4w9WgXcQQ"],
    }  # fmt: skip
    assert leave_out(tmp_path, "--near-duplicates=8").keys() == {"dQw4w9WgXcQ_30", "after", "after the copy"}
    with pytest.raises(UserError, match=r"cannot read .*absent.txt"):
        leave_out(tmp_path, "--exclude-ids", tmp_path / "absent.txt")


def test_features_find_copies_and_evaluation_sets(toys, videos, root):
    (root / "sets").mkdir()
    clip = root / "clips_resize256_skip15/german.mp4"
    expected = load(str(toys / "video")).encode(video=[clip], to="numpy")
    np.save(root / "sets/eval.npy", np.concatenate([-expected, 3 * expected]))
    options = [f"--features={toys / 'video'}", f"--exclude-features={root / 'sets/eval.npy'}"]
    found = leave_out(root, *options, "--similar=0.999999")
    assert found["german"] == ["copy of one in eval.npy: row 1"]
    files = {path.stem: np.load(path) for path in (root / "generate/filter/features").glob("*.npy")}
    assert files.keys() == FRAMES.keys()
    np.testing.assert_allclose(files["german"], expected[0], atol=1e-6)
    kept, marked = [], {"german"}
    for name in FRAMES:
        if name != "german":
            cosines = {other: float(files[other] @ files[name]) for other in [*kept, "german"]}
            (marked if max(cosines.values()) >= 0.999999 else set()).add(name) or (name in marked or kept.append(name))
    assert found.keys() == marked
    np.save(root / "sets/eval.npy", np.ones((2, 3)))
    with pytest.raises(UserError, match=r"eval.npy should hold finite features \(N, 16\); its shape is \(2, 3\)"):
        leave_out(root, *options)


def test_copies_by_features_are_those_of_brute_force(toys, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1500, 16)).astype(np.float32)
    rows[500:] = rows[rng.integers(0, 500, 1000)] + rng.normal(size=(1000, 16)) * rng.uniform(0, 0.4, (1000, 1))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    (tmp_path / "generate/filter/features").mkdir(parents=True)
    for k, row in enumerate(rows):
        np.save(tmp_path / f"generate/filter/features/{k}.npy", row)
    annotate(tmp_path, {str(k): {"folder": "f", "raw": "x"} for k in range(len(rows))})
    found, kept = leave_out(tmp_path, f"--features={toys / 'depth'}", "--similar=0.97"), []
    for k, row in enumerate(rows):
        if not kept or (rows[kept] @ row).max() < 0.97:
            kept.append(k)
    assert 200 < len(found) < 1300
    assert found.keys() == {str(k) for k in range(len(rows))} - {str(k) for k in kept}


@pytest.mark.slow
def test_the_marks_do_not_depend_on_the_runner(root, tmp_path_factory):
    options = ["--min-seconds=1", "--max-cuts=1", "--languages", "en", "--near-duplicates=24", "--batch-size=2"]
    before = (root / "vidal.json").read_bytes()
    leave_out(root, *options[:-1], workers=0)
    alone = (root / "vidal.json").read_bytes()
    (root / "vidal.json").write_bytes(before)
    call("-m", "languagebind.generate", "filter", *flags(root), "--max-bad-share=0.5", "--workers=2", *options)
    assert (root / "vidal.json").read_bytes() == alone


def test_shards_have_no_entry_that_is_left_out(root, tmp_path):
    leave_out(root, "--min-seconds=1", "--max-cuts=1")
    words = [*flags(root), "--modality=video", f"--output={tmp_path / 'shards'}"]
    make_shards(["vidal", *words, "--workers=1"])
    found = json.loads((tmp_path / "shards/report.json").read_bytes())
    assert found["samples"] == 3
    reasons = {reason: own["count"] for reason, own in found["left_out"].items()}
    assert reasons == {"too many cuts": 2, "too short": 1, "missing file": 1}
    assert found["left_out"]["too short"]["examples"] == [{"id": "short", "detail": "too short: 0.32 s"}]
    samples = [json.loads(own["json"]) for own in stream_samples(str(tmp_path / "shards/00000.tar"))]
    assert [sample["id"] for sample in samples] == ["german", "black", "dark"]
    assert all(sample["captions"].keys() == {"raw"} for sample in samples)
    leave_out(root, "--min-seconds=1")
    with pytest.raises(UserError, match=r"the input of .* has changed since it was made"):
        make_shards(["vidal", *words, "--workers=1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name what to leave out"),
        (["--safety-model=x"], "--unsafe-labels go with --safety-model"),
        (["--max-cuts=1", "--exclude-features=x.npy"], "--exclude-features with --features"),
        (["--max-cuts=-1"], "max_cuts should be a number of at least 0"),
    ],
)
def test_options_that_lack_others_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        leave_out(tmp_path, *options)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    annotate(tmp_path, {"a": {}})
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(UserError, match=r"this filter needs scenedetect: pip install 'languagebind\[generate\]'"):
        leave_out(tmp_path, "--max-cuts=1")


def test_another_measure_is_added_to_the_others_and_recorded(root):
    leave_out(root, "--max-cuts=1")
    before = measured(root, "cuts")
    leave_out(root, "--languages", "en")
    assert measured(root, "cuts") == before
    assert report(root)["made"] == 7
    record = json.loads((root / "generate/filter/record.json").read_bytes())
    assert record.keys() == {"cuts", "language"}
    (root / "generate/filter/record.json").write_text(json.dumps(record | {"cuts": {"scenedetect": "0.1"}}))
    with pytest.raises(UserError, match=r"filter was made with cuts .'scenedetect': '0.1'., not"):
        leave_out(root, "--max-cuts=1")
