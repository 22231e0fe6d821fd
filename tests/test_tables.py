"""Tables and texts as people bring them: other columns, separators and encodings, names with any letter, pointers."""

import io
import json
import logging
import os
import random
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_datasets import MODALITIES, InstantModel
from eval_files import write_jsonl, write_shard
from helpers import call, depth_png, train_flags, write_shards
from lookalikes import picture, sound
from test_report import make as make_page
from test_text_features import losses

from languagebind.config import UserError
from languagebind.data.checking import check_shards
from languagebind.data.feature_store import FeatureStore, write_text_features
from languagebind.data.making import assign, main
from languagebind.data.members import read_captions
from languagebind.data.shards import expand_shards
from languagebind.data.sources import Sample
from languagebind.data.tables import read_manifest
from languagebind.data.vidal import MissingCaption, choose_caption
from languagebind.eval import DatasetConfig, load_dataset_config
from languagebind.eval.data.samples import class_names, read_samples
from languagebind.eval.evaluate import evaluate
from languagebind.eval.prepare.__main__ import main as prepare
from languagebind.files import as_on_disk, decode_text, is_plain, mend
from languagebind.modalities import DecodeError
from training.main import main as train

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4f" * 32 + b"\nsize 2127\n"
IMAGE = MODALITIES["image"]


def pack(folder: Path, table: str | bytes, *flags: str, kind: str = "csv", root: Path | None = None) -> dict:
    """Pack a table of pictures; return the report."""
    manifest = folder / f"m.{kind}"
    manifest.write_bytes(table.encode() if isinstance(table, str) else table)
    chosen = [f"--manifest={manifest}", f"--root={root or folder}", "--modality=image", f"--output={folder / 'out'}"]
    main([kind, *chosen, "--workers=1", *flags])
    report = folder / "out" / "report.json"
    return json.loads(report.read_text()) if report.exists() else {}


def packed(folder: Path) -> dict[str, dict]:
    """The `.json` of each sample, by id."""
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    return {record["id"]: record for record in found}


def test_a_row_that_repeats_a_file_and_its_caption_is_left_out_whatever_its_id(pictures):
    report = pack(pictures, "id,path,caption\n1,a.png,one\n2,a.png,one\n3,a.png,two\n")
    assert packed(pictures / "out")["1"]["captions"] == {"caption": ["one", "two"]}
    assert (report["samples"], report["left_out"]["duplicate key"]["count"]) == (1, 1)


@pytest.fixture
def pictures(tmp_path):
    """Six pictures, in a folder and under names of many kinds."""
    for name in ("a", "b c", " lead", "caf\u00e9", "d[1]", "sub/x"):
        picture(tmp_path / f"{name}.png")
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("naïve café, “so” she said", "cp1252"),
        ("Größe: 5 µm, 10 °C – ½ Liter", "cp1252"),
        ("¿Qué pasa, señor?", "latin-1"),
        ("a dog — 一只狗 😀", "utf-8-sig"),
        ("a dog — 一只狗 😀", "utf-16"),
        ("tre små katter", "utf-32"),
        ("a dog in the caf\u00e9", "utf-16-le"),  # without a mark
    ],
)
def test_a_text_of_a_certain_encoding_is_read_as_meant(text, encoding):
    assert decode_text(text.encode(encoding)) == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("кошка на траве", "cp1251"),
        ("a cat, по-русски", "koi8-r"),
        ("książka żółta", "cp1250"),
        ("γάτα στο γρασίδι", "cp1253"),
        ("芝生の上の猫", "shift-jis"),
        ("고양이", "euc-kr"),
    ],
)
def test_a_text_of_another_encoding_is_not_guessed(text, encoding):
    assert not is_plain(decode_text(text.encode(encoding)))


def test_both_encodings_in_one_text_and_halves_of_a_character():
    assert decode_text("déjà vu – ".encode() + "fête".encode("cp1252")) == "déjà vu – fête"
    assert mend("ok \ud83d\ude00") == "ok \U0001f600"
    assert not is_plain(mend("cut \ud83d"))
    assert not is_plain("a\0b")


def test_captions_that_are_not_text_are_never_drawn():
    captions = {"raw": "Nice \ud83d", "ofa": ["one", "\udcd0\udcd1\udcd2", " ", "four"], "txt": "cut \ud83d"}
    drawn = {choose_caption(captions, "mix", random.Random(i)) for i in range(40)}
    assert drawn == {("one", 0), ("four", 3)}  # the place of an entry is its frame
    with pytest.raises(MissingCaption, match="the caption is not valid UTF-8"):
        choose_caption(captions, "txt", None)
    assert read_captions({"txt": "on dit l’été".encode("cp1252")}) == {"txt": "on dit l’été"}
    assert read_captions({"json": '{"caption": "a café"}'.encode("cp1252")}) == {"caption": "a café"}


@pytest.fixture
def unclean(tmp_path):
    """Shards of depth maps from elsewhere: 8 clean captions, 4 in Windows-1252, 2 that are not text, 1 blank."""
    texts = [b"a wall"] * 8 + ["a café’s wall".encode("cp1252")] * 4 + ["стена".encode("cp1251")] * 2 + [b" \n"]
    png = [depth_png(k % 4, np.random.default_rng(k)) for k in range(len(texts))]
    samples = [(f"{k:02d}", {"depth.png": png[k], "txt": text}) for k, text in enumerate(texts)]
    return write_shard(tmp_path / "shards" / "0.tar", samples)


def test_unclean_captions_train_embed_and_check_alike(unclean, tmp_path, caplog):
    flags = train_flags(unclean, tmp_path / "logs", "--caption-source=txt", "--train-num-samples=24", "--workers=0")
    flags += ["--max-bad-share=0.5", "--batch-size=6", "--warmup=1"]
    train([*flags, "--name=live"])
    skipped = [json.loads(line) for line in (tmp_path / "logs/live/skipped.jsonl").read_text().splitlines()]
    reasons = Counter((sample["key"], sample["reason"].partition(",")[0]) for sample in skipped)
    assert {key for key, _ in reasons} == {"12", "13", "14"}
    assert {reason for key, reason in reasons if key != "14"} == {"the caption is not valid UTF-8"}
    seen = []

    def encode(texts):
        seen.extend(texts)
        return torch.nn.functional.normalize(torch.ones(len(texts), 4), dim=-1)

    write_text_features(str(unclean), "txt", "f" * 64, encode)
    assert sorted(seen) == ["a café’s wall", "a wall"]
    assert FeatureStore("f" * 64).find(str(unclean), "a café’s wall").shape == (4,)
    checked = check_shards(unclean)
    assert [fault.partition("tar ")[2] for fault in checked.faults] == [
        "12: 1 of 1 captions are not valid UTF-8", "13: 1 of 1 captions are not valid UTF-8",
        "14: the sample has no caption",
    ]  # fmt: skip
    assert checked.unusable == {"not valid UTF-8": 2, "blank or n/a": 1}
    assert len(losses(tmp_path / "logs/live")) == 4


def test_captions_that_are_not_text_are_left_out_of_an_evaluation_and_counted(tmp_path, caplog):
    rows = [{"path": f"{k}.png", "captions": [f"text {k}", "one more"]} for k in range(3)]
    rows[1]["captions"][1] = "cut \ud83d"
    rows[2]["captions"] = ["\ud83d"]
    for row in rows:
        picture(tmp_path / row["path"])
    config = DatasetConfig("set", "retrieval", str(write_jsonl(tmp_path / "m.jsonl", rows)), expect={"samples": 3})
    with caplog.at_level(logging.WARNING):
        result = evaluate(InstantModel(), IMAGE, config, workers=0)
    counts = {key: result["protocol"][key] for key in ("samples", "skipped_samples", "captions", "bad_captions")}
    assert counts == {"samples": 2, "skipped_samples": 1, "captions": 3, "bad_captions": 2}
    assert "set: left out 2 captions that are not valid UTF-8, the first of 1.png" in caplog.text
    text = make_page(tmp_path / "page", result | {"pretrained": "ours"}).text
    assert "2 of 3 samples" in text  # from the result: the page has no config of it
    assert "2 captions are not valid text" in text


def test_names_that_are_not_utf8_are_evaluated(tmp_path):
    folder = tmp_path / "set"
    for name in ("caf\u00e9", "bar"):
        picture(folder / name / "1.png")
    os.rename(folder / "caf\u00e9", os.fsencode(folder) + b"/caf\xe9")
    config = DatasetConfig("set", "classification", str(folder))
    assert list(class_names(config).values()) == ["bar", "café"]
    assert evaluate(InstantModel(), IMAGE, config, workers=0, export=tmp_path / "x.parquet")["protocol"]["samples"] == 2
    assert evaluate(InstantModel(), IMAGE, config, workers=0, export=tmp_path / "x.safetensors")
    keys = [json.loads(line).get("key") for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert keys[:2] == ["bar/1.png", "caf\udce9/1.png"]


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("table", "encoding"),
    [
        ("path,caption\ncafé.png,“one”\nsub/x.png,two\n", "utf-8"),
        ("path,caption\ncafé.png,“one”\nsub/x.png,two\n", "cp1252"),
        ("path;caption\ncafé.png;“one”\nsub/x.png;two\n", "utf-8-sig"),
        ("path\tcaption\ncafé.png\t“one”\nsub/x.png\ttwo\n", "utf-16"),
        ("path, caption\r\ncafé.png, “one”\r\nsub/x.png, two\r\n", "utf-8"),
        ('path,caption\ncafé.png, "“one”"\nsub\\x.png,two\n', "utf-8"),
        (unicodedata.normalize("NFD", "path,caption\ncafé.png,“one”\nsub/x.png,two\n"), "utf-8"),
    ],
)
def test_tables_of_other_programs_are_read_as_meant(pictures, table, encoding):
    report = pack(pictures, table.encode(encoding))
    assert (report["samples"], report["left_out"]) == (2, {})
    assert [record["captions"]["caption"] for record in packed(pictures / "out").values()] == ["“one”", "two"]


def test_a_table_of_a_french_spreadsheet_is_read(pictures):
    table = "fichier;légende\r\na.png;un été chaud\r\n;\r\nb c.png;deux\r\n;\r\n".encode("cp1252")  # rows without cells
    assert pack(pictures, table, "--columns", "path=fichier", "caption=légende")["samples"] == 2
    assert packed(pictures / "out")["a"]["captions"] == {"caption": "un été chaud"}


def test_columns_are_renamed(pictures):
    columns = ["--columns", "path=filename", "caption=first", "caption=second", "label=scene"]
    pack(pictures, "filename,first,second,scene\nb c.png,one,two,hall\nd[1].png,three,n/a,\n", *columns)
    found = packed(pictures / "out")
    assert found["b c"] == {"id": "b c", "captions": {"caption": ["one", "two"]}, "label": "hall"}
    assert found["d[1]"] == {"id": "d[1]", "captions": {"caption": ["three", ""]}}


@pytest.mark.parametrize(
    ("kind", "table", "flags", "message"),
    [
        (
            "csv",
            "path,text\na.png,x\n",
            [],
            r"m\.csv: no column 'caption', only path, text; .*--columns caption=COLUMN",
        ),
        ("csv", "file,text\na.png,x\n", [], r"m\.csv:2: no column 'path', only file, text; .*--columns path=COLUMN"),
        ("csv", "file,text\na.png,x\n", ["caption=text"], "no column 'path', only file, text;"),
        ("csv", "path,text\na.png,x\n", ["caption=words"], r"m\.csv:2: no column 'words', only path, text$"),
        ("csv", "path,text\na.png,x\n", ["text=caption"], "--columns text=caption: write one of path, id,"),
        ("csv", "path;caption\na.png;x;y\n", [], r"m\.csv:2: 3 columns, .*a text with a semicolon needs double quotes"),
        ("csv", "path,caption\n", [], r"m\.csv has no rows"),
        ("csv", "", [], r"m\.csv has no rows"),
        ("jsonl", '{"path": "a.png", "caption": "x"}\n{"path": 5}\n', [], r"m\.jsonl:2: 'path' is missing or empty"),
        (
            "csv",
            "file,text\n,x\n",
            ["path=file", "caption=text"],
            "'path' is missing or empty; the columns are file, text$",
        ),
        ("jsonl", '\n{"path": "a.png" "caption": "x"}\n', [], r"m\.jsonl:2: not valid JSON: .*delimiter: column 18"),
        ("jsonl", '[{"path": "a.png"}]\n', [], r"m\.jsonl:1: a row needs a path, as in "),
        ("csv", POINTER.decode(), [], r"cannot read .*m\.csv: it is a Git LFS pointer, .*git lfs pull"),
    ],
)
def test_mistakes_in_a_table_are_named(pictures, kind, table, flags, message):
    with pytest.raises(UserError, match=message):
        pack(pictures, table, *(["--columns", *flags] if flags else []), kind=kind)
    assert not list((pictures / "out").glob("*.tar"))
    assert pack(pictures, "path,caption\na.png,one\n")["samples"] == 1  # into the same folder


def test_blank_captions_are_counted(pictures, capsys):
    table = "path,caption\na.png,N/A\nb c.png,\n lead.png,None\ncafé.png,na und\nd[1].png,\udcd0\udcd1\udcd2\n"
    report = pack(pictures, table.encode(errors="surrogateescape"))
    assert report["samples"] == 1
    assert report["captions_left_out"] == {"blank or n/a": 3, "not valid UTF-8": 1}
    assert "captions left out: 3 blank or n/a, 1 not valid UTF-8" in capsys.readouterr().out


def test_rows_of_one_file_are_its_captions_wherever_they_are(pictures):
    rows = ["a.png,one,x", "b c.png,two,x", "a.png,three,y", "a.png,one,x", "b c.png,four,x"]
    report = pack(pictures, "path,caption,label\n" + "\n".join(rows))
    assert {name: each["count"] for name, each in report["left_out"].items()} == {"duplicate key": 1}
    assert packed(pictures / "out") == {
        "a": {"id": "a", "captions": {"caption": ["one", "three"]}, "labels": ["x", "y"]},
        "b c": {"id": "b c", "captions": {"caption": ["two", "four"]}, "label": "x"},
    }
    config = DatasetConfig("m", "retrieval", str(pictures / "m.csv"))
    evaluated = {sample.key.removesuffix(".png"): sample for sample in read_samples(config, IMAGE)}
    for key, record in packed(pictures / "out").items():
        assert list(dict.fromkeys(evaluated[key].captions)) == record["captions"]["caption"]


def test_a_wrong_root_can_be_corrected(pictures, capsys):
    table = "path,caption\na.png,one\n"
    with pytest.raises(UserError, match="no sample was packed, for the reasons above"):
        pack(pictures, table, root=pictures / "sub")
    assert "sub/a.png: No such file" in capsys.readouterr().out
    assert [path.name for path in (pictures / "out").iterdir()] == ["report.json"]
    assert pack(pictures, table)["samples"] == 1
    with pytest.raises(UserError, match=r"was made with root .*: use --overwrite to start again"):
        pack(pictures, table, root=pictures / "sub")


def test_a_split_divides_no_group(tmp_path):
    rows = [(f"{k}.png", f"text {k}", f"person {k % 11}") for k in range(44)]
    for name, _, _ in rows:
        picture(tmp_path / name)
    table = "path,caption,who\n" + "".join(",".join(row) + "\n" for row in rows)
    flags = ["--split", "train=0.7", "val=0.2", "test=0.1", "--by", "who"]
    pack(tmp_path, table, *flags)
    parts = {part: packed(tmp_path / "out" / part) for part in ("train", "val", "test")}
    assert {part: len(found) for part, found in parts.items()} == {"train": 32, "val": 8, "test": 4}  # 8, 2 and 1 of 11
    people = [{int(key) % 11 for key in found} for found in parts.values()]
    assert sum(map(len, people)) == len(set.union(*people)) == 11
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.tar")}
    pack(tmp_path, table, *flags)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.tar")} == before
    for wrong in (["train=0.7"], ["train=0.5", "val=0.6"], ["train", "val=1"], ["../x=1"], ["a=nan", "b=1"]):
        with pytest.raises(UserError, match="write shares that add up to 1"):
            pack(tmp_path, table, "--split", *wrong)
    with pytest.raises(UserError, match="--by needs --split"):
        pack(tmp_path, table, "--by", "who")


def test_zero_is_a_label_a_person_and_an_id(tmp_path):
    rows = [{"path": f"{k}.png", "caption": "x", "id": k, "label": k % 2, "who": k % 3} for k in range(12)]
    for row in rows:
        picture(tmp_path / row["path"])
    flags = ["--split", "train=0.4", "val=0.3", "test=0.3", "--by", "who"]
    pack(tmp_path, "\n".join(map(json.dumps, rows)), *flags, kind="jsonl")
    parts = [packed(tmp_path / "out" / part) for part in ("train", "val", "test")]
    assert {key: record["label"] for part in parts for key, record in part.items()} == {
        str(k): str(k % 2) for k in range(12)
    }
    assert sorted(sorted({int(key) % 3 for key in part}) for part in parts) == [[0], [1], [2]]


def test_a_column_of_parts_is_the_split():
    samples = [Sample(f"{k}", {}, group=("test", "train", "val")[k % 3]) for k in range(9)]
    assert assign(samples, {"train": 0.8, "val": 0.1, "test": 0.1}) == {part: part for part in ("train", "val", "test")}
    with pytest.raises(UserError, match="leaves val empty"):
        assign([sample for sample in samples if sample.group != "val"], {"train": 0.5, "val": 0.5, "test": 0.0})


def test_a_split_is_near_the_shares_and_does_not_depend_on_the_order():
    samples = [Sample(f"{k}", {}) for k in range(1000)]
    shares = {"train": 0.8, "val": 0.15, "test": 0.05}
    parts = assign(samples, shares)
    assert Counter(parts.values()) == {"train": 800, "val": 150, "test": 50}
    assert assign(reversed(samples), shares) == parts
    assert assign([*samples, *samples[:100] * 9], shares) == parts  # rows that repeat a caption of their file
    with pytest.raises(UserError, match=r"leaves .* empty: there are only 2 groups"):
        assign([Sample(f"{k}", {}, group=str(k % 2)) for k in range(10)], shares)


def test_an_evaluation_reads_such_tables_too(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "m.tsv").write_text('file\tscene\na.png\tliving_room\nb.png\t"the ""hall"""\n')
    columns = {"path": "file", "label": "scene"}
    config = DatasetConfig("m", "classification", str(tmp_path / "m.tsv"), columns=columns)
    assert class_names(config) == {"living_room": "living room", 'the "hall"': 'the "hall"'}
    assert evaluate(InstantModel(), IMAGE, config, workers=0)["protocol"]["samples"] == 2
    (tmp_path / "n.csv").write_text("file,label\na.png,3\n")
    with pytest.raises(UserError, match=r"n\.csv:2: a row needs a path.*its columns are file, label"):
        read_samples(DatasetConfig("n", "classification", str(tmp_path / "n.csv")), IMAGE)
    with pytest.raises(UserError, match="class_names is needed"):  # a number is no name
        class_names(DatasetConfig("n", "classification", str(tmp_path / "n.csv"), columns={"path": "file"}))
    with pytest.raises(UserError, match=r"n\.csv:2: no column 'scene', only file, label"):
        list(read_manifest(tmp_path / "n.csv", columns={"label": ["scene"]}))


# ---------------------------------------------------------------------------------------------------------- shards


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def test_a_dot_in_a_key_is_said(tmp_path):
    record = b'{"caption": "a wall", "label": "x"}'
    shard = write_tar(tmp_path / "0.tar", ("Dr. No (1962).depth.png", b"x"), ("Dr. No (1962).json", record))
    said = r"a key ends at the first dot of a name, as in <key>. no \(1962\).json: rename such files"
    (fault,) = check_shards(shard).faults
    with pytest.raises(UserError, match=said):
        train([*train_flags(shard, tmp_path, "--train-num-samples=8"), "--workers=0"])
    with pytest.raises(UserError, match=said):
        read_samples(DatasetConfig("d", "retrieval", str(shard)), MODALITIES["depth"])
    assert "Dr: the sample has no caption; a key ends at the first dot" in fault
    whole = write_tar(tmp_path / "1.tar", ("a.depth.png", depth_png(0, np.random.default_rng(0))),
                      ("a.json", record), ("a.meta.json", b"{}"))  # fmt: skip
    assert check_shards(whole).faults == []


def test_keys_and_records_that_are_not_utf8_train(tmp_path):
    record = '{"caption": "a café wall"}'.encode("cp1252")
    members = []
    for k in range(8):
        key = f"caf\udce9 [{k}]"
        png = depth_png(k % 4, np.random.default_rng(k))
        members += [(f"{key}.depth.png", png), (f"{key}.json", record)]
    shard = write_tar(tmp_path / "s [1]" / "0.tar", *members)
    flags = train_flags(shard, tmp_path, "--train-num-samples=8", "--caption-source=caption", "--name=run")
    train([*flags, "--workers=0", "--positives=id"])
    assert len(losses(tmp_path / "run")) == 1
    assert check_shards(shard).faults == []
    assert expand_shards(f"{shard.parent}/*.tar") == expand_shards(shard.parent) == [str(shard)]


@pytest.mark.parametrize("claimed", [20, 28])
def test_sizes_that_contradict_a_shard_are_said(tmp_path, claimed):
    shards = write_shards(tmp_path / "shards", [24])
    (shards / "index.json").unlink()
    (shards / "sizes.json").write_text(json.dumps({"00000.tar": str(claimed)}))  # some programs write text
    flags = train_flags(shards, tmp_path, "--max-bad-share=0.5", "--name=run")
    train([*flags, "--workers=0"])
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    found = "more" if claimed == 20 else "fewer"
    assert {each["reason"] for each in skipped} == {
        f"it has {found} samples than its index.json or sizes.json says: {claimed}"
    }
    assert [fault.partition(": ")[2] for fault in check_shards(shards).faults] == [
        f"it has 24 samples, but sizes.json says {claimed}"
    ]
    (shards / "sizes.json").write_text('{"00000.tar": "24 samples"}')
    with pytest.raises(UserError, match="should have a number of samples, not '24 samples'"):
        check_shards(shards)


def test_pointers_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(POINTER)
    with pytest.raises(UserError, match="no sample was packed"):
        pack(tmp_path, "path,caption\na.png,one\n")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "it is a Git LFS pointer" in report["left_out"]["Git LFS pointer"]["examples"][0]["detail"]
    for source in (tmp_path / "a.png", POINTER):
        with pytest.raises(DecodeError, match="it is a Git LFS pointer"):
            IMAGE.preprocess(source)
    shard = tmp_path / "0.tar"
    shard.write_bytes(POINTER)
    assert "it is a Git LFS pointer" in check_shards(shard).faults[0]
    with pytest.raises(UserError, match=r"0\.tar cannot be read as a tar file: it is a Git LFS pointer"):
        read_samples(DatasetConfig("p", "retrieval", str(shard)), IMAGE)
    with pytest.raises(UserError, match="broken shard: it is a Git LFS pointer"):
        train([*train_flags(shard, tmp_path, "--train-num-samples=8"), "--workers=0"])


def test_a_file_is_found_under_its_other_spellings(tmp_path):
    for name in (unicodedata.normalize("NFD", "ré"), "x/y", " z "):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("ré", "x\\y", " z "):
        assert as_on_disk(tmp_path / name).exists()
    assert as_on_disk(tmp_path / "z") == tmp_path / "z"


# --------------------------------------------------------------------------------------------------------- prepare


def test_blanks_in_names_and_other_counts_than_expected(tmp_path, capsys):
    """A name with a blank in front, as Clotho has one; a set that lost a file, as those on YouTube do."""
    source = tmp_path / "download"
    for name in (" a", "b", "c d "):
        sound(source / f"{name}.wav")
    (source / "l.csv").write_text('name,text\n a.wav,"one, two"\nb.wav,"three"\nc d .wav,cut \n', encoding="utf-8")
    (tmp_path / "set.yaml").write_text(
        "task: retrieval\ndata: set/test.jsonl\nexpect: {samples: 4}\n"
        'prepare: {kind: table, table: l.csv, key: name, media: "{name}", caption: text}\n'
    )
    argv = [str(tmp_path / "set.yaml"), "--source", str(source), "--output", str(tmp_path / "data")]
    with pytest.raises(UserError, match=r"3 samples, expected 4: .* is incomplete or from another release"):
        prepare([*argv, "--strict"])
    prepare(argv)
    assert "another version of it: 3 samples, expected 4" in capsys.readouterr().out
    report = json.loads((tmp_path / "data/set/test.jsonl.prepare.json").read_text())
    assert (report["samples"], report["unexpected"]) == (3, ["3 samples, expected 4"])
    rows = [json.loads(line) for line in (tmp_path / "data/set/test.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [" a.wav", "b.wav", "c d .wav"]
    (source / "l.csv").write_text("file,text\nb.wav,one\n")
    for key in ("name", "file"):  # as the key, and in `media` alone
        (tmp_path / "set.yaml").write_text((tmp_path / "set.yaml").read_text().replace("key: name", f"key: {key}"))
        with pytest.raises(UserError, match=r"l\.csv:2: no column 'name', only file, text\n"):
            prepare([*argv, "--overwrite"])


def test_captions_that_are_not_text_are_prepared_for_the_evaluation_to_count(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    rows = [{"id": "a", "text": ["one", "\ud83d"]}, {"id": "b", "text": "\ud83d"}, {"id": "c", "text": "\ud83d\ude00"}]
    (tmp_path / "l.json").write_text(json.dumps(rows))
    table = {"kind": "table", "table": "l.json", "key": "id", "media": "{id}.png", "caption": "text"}
    (tmp_path / "set.yaml").write_text(f"task: retrieval\ndata: set/test.jsonl\nprepare: {json.dumps(table)}\n")
    prepare([str(tmp_path / "set.yaml"), "--source", str(tmp_path), "--output", str(tmp_path / "data")])
    samples = read_samples(load_dataset_config(tmp_path / "set.yaml", tmp_path / "data"), IMAGE)
    assert [(sample.captions, sample.bad_captions) for sample in samples] == [(("one",), 1), ((), 1), (("😀",), 0)]


def test_the_command_prints_names_that_are_not_utf8(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"path,caption\n\xd0\xd1\xd2.png,one\n")
    flags = [f"--manifest={tmp_path / 'm.csv'}", f"--root={tmp_path}", "--modality=image"]
    printed = call("scripts/make_shards.py", "csv", *flags, f"--output={tmp_path / 'out'}", status=2)
    assert r"\udcd0\udcd1\udcd2.png: No such file or directory" in printed
