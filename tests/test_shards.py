"""Making and checking shards, by their command lines on real files."""

import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import call, depth_png, start, write_shards
from PIL import Image

from languagebind.config import UserError
from languagebind.data.members import media_members, stream_samples
from languagebind.data.shards import as_key, count_samples, expand_shards, indexed, is_key
from languagebind.data.sources import Csv
from languagebind.data.vidal import MissingCaption, choose_caption, clean_title, media_paths, read_annotation
from languagebind.eval.data.shards import read_shard
from languagebind.modalities import modality_class

CAPTIONS = {
    "raw": "A Room #shorts",
    "mplug": "a room",
    "polish_mplug": "In the video, a room.",
    "sound_mplug": "silence",
    "ofa": [f" frame {i}" for i in range(8)],
}


@pytest.fixture(scope="module")
def vidal(tmp_path_factory):
    """30 depth samples in VIDAL's layout; three cannot be used."""
    root, rng = tmp_path_factory.mktemp("vidal"), np.random.default_rng(0)
    annotation = {f"id-{i:02d}": {"folder": "part", **CAPTIONS} for i in range(30)}
    for name in annotation:
        folder = root / "part" / f"{name}_depth_f8glpn_folder"
        folder.mkdir(parents=True)
        for frame in range(8):
            (folder / f"{frame}.png").write_bytes(depth_png(frame % 4, rng))
    (root / "part/id-03_depth_f8glpn_folder/5.png").unlink()
    cut = root / "part/id-11_depth_f8glpn_folder/2.png"
    cut.write_bytes(cut.read_bytes()[:50])
    annotation["id-20"] = {"folder": "part", "raw": "", "ofa": []}
    (root / "vidal.json").write_text(json.dumps(annotation))
    return root


def make(output: Path, *flags: str, status: int = 0) -> str:
    return call("scripts/make_shards.py", *flags, f"--output={output}", status=status)


def vidal_flags(root: Path) -> list[str]:
    flags = [f"--annotation={root / 'vidal.json'}", f"--root={root}", "--modality=depth"]
    return ["vidal", *flags, "--samples-per-shard=4"]


def contents(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.tar"), folder / "index.json", folder / "report.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(vidal, tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "shards"
    print(make(output, *vidal_flags(vidal), "--workers=2"))
    return output


def test_vidal_becomes_shards_with_an_index_and_a_report(made):
    index, report = indexed(expand_shards(made)), json.loads((made / "report.json").read_text())
    assert sum(info.samples for info in index.values()) == report["samples"] == 27
    assert {name: reason["count"] for name, reason in report["left_out"].items()} == {
        "missing caption": 1, "missing file": 1, "undecodable": 1,
    }  # fmt: skip
    assert report["left_out"]["missing file"]["examples"][0]["id"] == "id-03"
    assert count_samples(index) == {shard: info.samples for shard, info in index.items()}
    with tarfile.open(made / "00000.tar") as shard:
        names = shard.getnames()
        record = json.load(shard.extractfile("id-00.json"))
    assert [f"id-00.{frame}.depth.png" for frame in range(8)] == names[:8]
    assert record == {"id": "id-00", "captions": CAPTIONS}


def test_any_number_of_workers_makes_the_same_bytes(vidal, made, tmp_path):
    make(tmp_path, *vidal_flags(vidal), "--workers=1")
    assert contents(tmp_path) == contents(made)


def test_a_killed_run_is_finished_with_the_same_bytes(vidal, made, tmp_path):
    process = start(
        "scripts/make_shards.py", *vidal_flags(vidal), f"--output={tmp_path}", "--workers=1", start_new_session=True
    )
    for _ in range(1000):
        if (tmp_path / "00001.tar").exists():
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    (tmp_path / ".00009.tar.tmp").write_bytes(b"half a shard")
    make(tmp_path, *vidal_flags(vidal), "--workers=1")
    assert contents(tmp_path) == contents(made)
    assert not list(tmp_path.glob(".*.tmp"))
    kept = sorted(finished)[:-1]  # the newest may have been written before its record
    assert all((tmp_path / name).stat().st_mtime_ns == finished[name] for name in kept)


def test_a_changed_input_or_option_is_refused(vidal, made, tmp_path):
    shutil.copytree(made, tmp_path / "shards")
    output = make(tmp_path / "shards", *vidal_flags(vidal)[:-1], "--samples-per-shard=5", status=2)
    assert "was made with samples_per_shard 4, not 5" in output
    other = tmp_path / "other"
    shutil.copytree(vidal, other)
    entries = json.loads((other / "vidal.json").read_text())
    entries["id-00"]["raw"] = "Another"
    (other / "vidal.json").write_text(json.dumps(entries))
    make(tmp_path / "again", *vidal_flags(other))
    (other / "vidal.json").write_text((vidal / "vidal.json").read_text())
    assert "has changed since it was made" in make(tmp_path / "again", *vidal_flags(other), status=2)
    make(tmp_path / "again", *vidal_flags(other), "--overwrite")


def test_tables_json_lines_and_class_folders(tmp_path):
    media = tmp_path / "media"
    for label in ("hall", "living_room"):
        (media / label).mkdir(parents=True)
        for number in range(2):
            (media / label / f"{number}.png").write_bytes(depth_png(number, np.random.default_rng(0)))
    paths = sorted(str(path.relative_to(media)) for path in media.rglob("*.png"))
    with open(tmp_path / "m.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "label"])
        writer.writerows([path, f"a room, {path}", path.split("/")[0]] for path in [*paths, "nowhere.png", paths[0]])
    with open(tmp_path / "m.jsonl", "w") as file:
        for path in paths:
            file.write(json.dumps({"path": path, "captions": {"raw": "x", "mplug": ["y", "z"]}, "id": path}) + "\n")
    outputs = {name: tmp_path / f"shards-{name}" for name in ("csv", "jsonl", "folder")}
    common = [f"--root={media}", "--modality=depth"]
    printed = make(outputs["csv"], "csv", f"--manifest={tmp_path / 'm.csv'}", *common)
    make(outputs["jsonl"], "jsonl", f"--manifest={tmp_path / 'm.jsonl'}", *common)
    make(outputs["folder"], "folder", *common)
    assert "missing file: 1" in printed
    assert "duplicate key: 1" in printed
    records = {name: json_members(output) for name, output in outputs.items()}
    assert [record["label"] for record in records["csv"]] == ["hall", "hall", "living_room", "living_room"]
    assert records["csv"][0]["captions"] == {"caption": "a room, hall/0.png"}
    assert records["jsonl"][0]["captions"] == {"raw": "x", "mplug": ["y", "z"]}
    assert records["folder"][2]["captions"] == {"caption": "living room"}
    assert all(len(found) == 4 for found in records.values())


def json_members(folder: Path) -> list[dict]:
    with tarfile.open(folder / "00000.tar") as shard:
        return [json.load(shard.extractfile(member)) for member in shard if member.name.endswith(".json")]


MISTAKES = {
    "no source": (["what"], "the first argument should be one of vidal"),
    "no annotation": (["vidal", "--annotation=/no.json", "--root=/", "--modality=depth"], "cannot read /no.json"),
    "no modality": (["folder", "--root=/tmp", "--modality=smell"], "unknown modality 'smell'"),
    "no folder": (["folder", "--root=/no/folder", "--modality=depth"], "no such folder: /no/folder"),
    "no layout": (
        ["vidal", "--annotation={vidal}/vidal.json", "--root={vidal}", "--modality=image"],
        "no layout for 'image'",
    ),
}


def test_media_are_what_their_content_says(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    files = {}
    for form in ("JPEG", "PNG", "WEBP"):
        picture.save(tmp_path / "file", form)
        files[form] = (tmp_path / "file").read_bytes()
    named = {
        "a.jpg": files["PNG"], "b.png": files["WEBP"], "c.img": files["JPEG"], "d": files["PNG"],
        "e.png": files["PNG"] + b"\n", "f.jpg": files["JPEG"] + b"\0\0\0\x18ftypmp42 film", "g.jpeg": files["JPEG"],
        "page.jpg": b"<html>not found</html>", "cut.jpg": files["PNG"][:-9], "cut.png": files["PNG"][:-9],
        "text.txt": b"text", "zero.jpg": b"",
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, data in named.items():
        (tmp_path / "in" / name).write_bytes(data)
    rows = "".join(f"{name},one,{number}\n" for number, name in enumerate(named))
    (tmp_path / "m.csv").write_text("path,caption,id\n" + rows)
    make(tmp_path / "out", "csv", f"--manifest={tmp_path}/m.csv", f"--root={tmp_path}/in", "--modality=image")
    with tarfile.open(tmp_path / "out/00000.tar") as shard:
        packed = [name for name in shard.getnames() if not name.endswith("json")]
    assert packed == ["0.png", "1.webp", "2.jpg", "3.png", "4.png", "5.jpg", "6.jpeg"]
    left = json.loads((tmp_path / "out/report.json").read_text())["left_out"]
    assert {reason: found["count"] for reason, found in left.items()} == {
        "undecodable": 3, "unsupported kind of file": 1, "empty file": 1,
    }  # fmt: skip


def test_a_caption_beside_captions_is_kept(tmp_path):
    (tmp_path / "m.csv").write_text("path,caption,captions\na.png,one,two|three\n")
    (sample,) = Csv(tmp_path / "m.csv", tmp_path, ("depth",)).samples()
    assert sample.captions == {"caption": ["one", "two", "three"]}


def test_a_row_without_its_modality_is_not_packed_from_another_column(tmp_path):
    (tmp_path / "m.csv").write_text("path,depth,caption\nrgb.png,d.png,one\nrgb.png,,two\n")
    printed = make(
        tmp_path / "out", "csv", f"--manifest={tmp_path}/m.csv", f"--root={tmp_path}", "--modality=depth", status=2
    )
    assert "m.csv:3: 'depth' is missing or empty; the columns are path, depth, caption" in printed


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case, vidal, tmp_path):
    flags, message = MISTAKES[case]
    assert message in make(tmp_path / "out", *(flag.replace("{vidal}", str(vidal)) for flag in flags), status=2)


def check(folder: Path, *flags: str, status: int) -> str:
    return call("scripts/check_shards.py", str(folder), *flags, status=status)


def test_good_shards_have_no_faults_and_can_be_indexed(tmp_path):
    shards = write_shards(tmp_path, [3, 4])
    index = (shards / "index.json").read_bytes()
    (shards / "index.json").unlink()
    printed = check(shards, "--modality=depth", "--decode", "--write-index", status=0)
    assert "7 samples in 2 shards" in printed
    assert "no faults" in printed
    assert (shards / "index.json").read_bytes() == index


def test_faults_are_found(tmp_path):
    shards = write_shards(tmp_path, [4, 4, 4, 4], replace={"s3_1": b"junk"})
    flipped, cut, copy = (shards / f"0000{i}.tar" for i in range(3))
    data = bytearray(flipped.read_bytes())
    data[600] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:2048])
    copy.write_bytes((shards / "00003.tar").read_bytes())
    printed = check(shards, "--modality=depth", "--decode", "--write-index", status=2)
    assert "00000.tar: the index says" in printed
    assert "00001.tar: broken tar file" in printed
    assert "s3_0: the key is also in" in printed
    assert "00003.tar s3_1: " in printed
    assert "index.json was not written, because some shards have faults" in printed
    check(shards, status=1)


def test_training_evaluation_and_checking_split_names_alike(tmp_path):
    """As webdataset does: the key ends at the first dot, the case of the extension does not matter."""
    record, png = json.dumps({"caption": "a room"}).encode(), depth_png(0, np.random.default_rng(0))
    members = [
        ("f.o/._a.png", b"x"), ("f.o/a.DEPTH.PNG", png), ("f.o/a.JSON", record), ("README", b"x"),
        ("b.c.d.PNG", b"x"), ("b.Json", record), ("b.depth.png", png), ("._c.json", b"x"),
    ]  # fmt: skip
    shard = tmp_path / "00000.tar"
    with tarfile.open(shard, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    expected = {"f.o/a": {"depth.png", "json"}, "b": {"c.d.png", "json", "depth.png"}}
    trained = {sample["__key__"]: {name for name in sample if name[0] != "_"} for sample in stream_samples(str(shard))}
    assert trained == expected
    evaluated = {key: (source.read(), record) for key, source, record, _ in read_shard(shard, ("depth.png",), None)}
    assert evaluated == dict.fromkeys(expected, (png, {"caption": "a room"}))
    assert "2 samples in 1 shards" in check(shard, "--modality=depth", "--decode", status=0)


def test_caption_sources_are_drawn_with_the_originals_weights():
    rng = random.Random(0)
    drawn = Counter()
    for _ in range(20000):
        text, frame = choose_caption(CAPTIONS, "mix", rng)
        drawn["ofa" if frame is not None else text] += 1
        if frame is not None:
            assert text == f"frame {frame}"
    assert set(drawn) == {"a room", "In the video, a room.", "silence", "ofa"}
    assert drawn["ofa"] / 20000 == pytest.approx(0.2, abs=0.015)
    assert drawn["a room"] / 20000 == pytest.approx(0.4, abs=0.015)  # the cleaned title reads like mplug's
    assert drawn["silence"] / 20000 == pytest.approx(0.2, abs=0.015)


def test_a_mix_is_of_the_sources_that_a_sample_has():
    assert choose_caption({"mplug": "a", "mine": "b"}, "mix", random.Random(0)) == ("a", None)
    assert choose_caption({"mine": ["b"]}, "mine", random.Random(0)) == ("b", None)
    for captions, source in (({}, "mix"), ({"mine": "b"}, "mix"), ({"raw": "#shorts"}, "raw"), ({"raw": "a"}, "ofa")):
        with pytest.raises(MissingCaption):
            choose_caption(captions, source, random.Random(0))


@pytest.mark.parametrize(
    ("title", "cleaned"),
    [
        ("Red ball so CLOSE! 😱 #Ball #YouTubeShorts #viral", "red ball so close!, ball"),
        ("Tom &amp; Jerry", "tom jerry"),
        ("#cats #dogs", "cats dogs"),
        ("YouTube video", ""),
    ],
)
def test_titles_are_cleaned(title, cleaned):
    assert clean_title(title) == cleaned


def test_an_annotation_is_read_as_a_stream(tmp_path):
    entries = {f"id{i}": {"folder": "a", "raw": 'brackets } ] " in text' * 50} for i in range(2000)}
    path = tmp_path / "vidal.json"
    path.write_text(json.dumps(entries, indent=1))
    assert dict(read_annotation(path)) == entries
    assert [key for key, _ in read_annotation(path, 3)] == ["id0", "id1", "id2"]
    path.write_text(path.read_text()[:-100])
    with pytest.raises(UserError, match=r"vidal\.json"):
        list(read_annotation(path))
    for text in ('{"x": "a title"}', '{"../x": {"folder": "f"}}', '{"x": {"folder": "../f"}}'):
        path.write_text(text)
        with pytest.raises(UserError, match="is not an object, or its folder or id leads out of the root"):
            list(read_annotation(path))


def test_folders_of_vidal():
    assert media_paths(Path("r"), "x", "new_3", "video")[0] == [Path("r/new_download_resize256_skip15/x.mp4")]
    assert media_paths(Path("r"), "x", "f", "video")[1][7] == Path("r/f_resize256_skip15/x_resize256_folder/7.jpg")
    assert media_paths(Path("r"), "x", "f", "infrared")[0][0] == Path("r/f/x_thermal_folder/0.jpg")
    assert media_paths(Path("r"), "x", "", "infrared")[0][0] == Path("r/x_thermal_folder/0.jpg")
    assert media_paths(Path("r"), "x", "f", "audio")[0] == [Path("r/f_audio/x.wav")]


def test_shards_are_named_by_folder_glob_braces_or_several(tmp_path):
    shards = [str(Path(write_shards(tmp_path, [1, 1, 1])) / f"0000{i}.tar") for i in range(3)]
    assert (
        expand_shards(tmp_path)
        == expand_shards(f"{tmp_path}/*.tar")
        == expand_shards(f"{tmp_path}/{{00000..00002}}.tar")
        == shards
    )
    assert expand_shards(f"{shards[2]}::{shards[0]}") == [shards[2], shards[0]]
    assert expand_shards("pipe:cat x.tar") == ["pipe:cat x.tar"]
    for missing in ("", f"{tmp_path}/9.tar", f"{tmp_path}/*.zip", str(tmp_path / "no")):
        with pytest.raises(UserError, match="no s"):
            expand_shards(missing)


def test_keys_and_members():
    assert is_key("a-B_9")
    assert not is_key("a.b")
    assert as_key("a b.c") != as_key("a b/c")
    assert is_key(as_key("ä" * 200))
    assert media_members(["json", "mp4"], ["mp4", "jpg"]) == "mp4"
    assert media_members(["10.jpg", "9.jpg", "json"], ["mp4", "jpg"]) == {9: "9.jpg", 10: "10.jpg"}
    assert media_members(["json"], ["mp4"]) is None


def test_each_modality_reads_its_own_file_of_a_pack(tmp_path):
    """A thermal TIFF beside a colour JPEG and a depth TIFF: each is read back bit for bit, by Pillow's values."""
    rng, media = np.random.default_rng(3), tmp_path / "media"
    media.mkdir()
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(media / "colour.jpg")
    Image.fromarray(rng.integers(29000, 31000, (40, 50)).astype(np.uint16)).save(media / "thermal.tif")
    Image.fromarray(rng.integers(500, 9000, (40, 50)).astype(np.uint16)).save(media / "far.tiff")
    row = {"id": "s0", "infrared": "thermal.tif", "image": "colour.jpg", "depth": "far.tiff", "caption": "a kettle"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    flags = ["jsonl", f"--manifest={tmp_path / 'm.jsonl'}", f"--root={media}"]
    make(tmp_path / "shards", *flags, "--modality", "infrared", "image", "depth")
    shard = str(tmp_path / "shards/00000.tar")
    with tarfile.open(shard) as archive:
        assert archive.getnames() == ["s0.infrared.tiff", "s0.jpg", "s0.depth.tiff", "s0.json"]
    files = {"infrared": "thermal.tif", "image": "colour.jpg", "depth": "far.tiff"}
    (sample,) = stream_samples(shard)
    for name, file in files.items():
        extensions = modality_class(name).extensions
        assert sample[media_members(sample, extensions)] == (media / file).read_bytes()
        ((_, source, _, _),) = read_shard(Path(shard), extensions, None)
        assert source.read() == (media / file).read_bytes()
    assert "it holds depth.tiff, infrared.tiff, jpg: is --modality right?" in check(shard, "--modality=audio", status=1)


def test_packs_of_earlier_versions_are_read_by_what_they_hold():
    """They named every TIFF `tiff`, and other files of the two modalities as now."""
    thermal = {"tiff": b"", "jpg": b"", "json": b"", "depth.png": b""}
    assert media_members(thermal, modality_class("infrared").extensions) == "tiff"
    assert media_members(thermal, modality_class("depth").extensions) == "depth.png"
    assert media_members({"tiff": b"", "png": b""}, modality_class("depth").extensions) == "tiff"
    assert media_members({"jpg": b""}, modality_class("infrared").extensions) == "jpg"


def test_a_picture_beside_frames_of_another_kind_is_refused(tmp_path):
    """A reader of video would use the whole `jpg`, and not the frames `0.png`, `1.png`."""
    media = tmp_path / "media"
    (media / "clip").mkdir(parents=True)
    for i, name in enumerate(("clip/0.png", "clip/1.png", "a.jpg")):
        Image.fromarray(np.full((20, 20, 3), 50 * i, np.uint8)).save(media / name)
    row = {"video": "clip", "image": "a.jpg", "caption": "grey", "id": "a"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    flags = ["jsonl", f"--manifest={tmp_path / 'm.jsonl'}", f"--root={media}", "--modality", "video", "image"]
    assert "jpg would be read for video" in make(tmp_path / "out", *flags, status=2)
