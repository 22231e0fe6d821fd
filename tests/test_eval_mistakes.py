"""Data and configs that would be read as something else than was meant: refused with the place, or read as meant."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from eval_files import write_jsonl, write_shard
from helpers import ROOT
from PIL import Image as Picture

from languagebind._yaml import PlainLoader
from languagebind.config import UserError
from languagebind.eval import DatasetConfig, load_dataset_config
from languagebind.eval.__main__ import main
from languagebind.eval.data.datasets import load_folder
from languagebind.eval.data.pairing import load_pairs_config
from languagebind.eval.data.samples import class_names, list_samples, read_samples
from languagebind.eval.prepare.__main__ import PrepareConfig, prepare
from languagebind.eval.prepare.writing import Listing
from languagebind.eval.score.zero_shot import label_targets
from languagebind.files import locked
from languagebind.modalities.image import Image

IMAGE = Image(image_size=8)
CLASSES = {"cat": "cat", "dog": "dog"}


def dataset(data, task="classification", **options):
    names = {"class_names": CLASSES} if task == "classification" else {}
    return DatasetConfig(name="pets", task=task, data=str(data), **(names | options))


def keys(data, **options):
    return [sample.key for sample in list_samples(dataset(data, **options), IMAGE)]


def targets(data):
    config = dataset(data)
    return label_targets(read_samples(config, IMAGE), class_names(config), config.name).tolist()


@pytest.fixture
def folders(tmp_path):
    """a/0.png, a/1.png, b/0.png, b/1.png"""
    for name in ("a/0", "a/1", "b/0", "b/1"):
        path = tmp_path / "folders" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Picture.new("RGB", (9, 9)).save(path)
    return tmp_path / "folders"


FILES = ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]

# ------------------------------------------------------------------------------------------------ class folders


@pytest.mark.parametrize(("link", "to"), [("a/up", ".."), ("a/far", "../.."), ("a/self", ".")])
def test_links_that_lead_back_are_not_followed(folders, link, to):
    (folders / link).symlink_to(to)
    assert keys(folders) == FILES
    assert list(class_names(dataset(folders, class_names=None))) == ["a", "b"]


@pytest.mark.parametrize("to", ["a", ".", "a/.."])
def test_a_class_that_links_to_another_is_refused(folders, to):
    (folders / "z").symlink_to(to)
    with pytest.raises(UserError, match=r"the class folder .*z is a link to files of another class: remove it"):
        class_names(dataset(folders, class_names=None))


def test_links_to_folders_elsewhere_are_followed(folders, tmp_path):
    (tmp_path / "store").mkdir()
    (folders / "b").rename(tmp_path / "store" / "b")
    (folders / "b").symlink_to(tmp_path / "store" / "b")
    (tmp_path / "store" / "more").mkdir()
    Picture.new("RGB", (9, 9)).save(tmp_path / "store" / "more" / "2.png")
    (folders / "a" / "more").symlink_to(tmp_path / "store" / "more")
    assert keys(folders) == ["a/0.png", "a/1.png", "a/more/2.png", "b/0.png", "b/1.png"]


def test_files_in_hidden_folders_are_no_samples(folders):
    (folders / "a" / ".ipynb_checkpoints").mkdir()
    Picture.new("RGB", (9, 9)).save(folders / "a" / ".ipynb_checkpoints" / "x.png")
    assert keys(folders) == FILES


# ---------------------------------------------------------------------------------------------- manifests, shards


@pytest.mark.parametrize("label", [True, False, [True]])
def test_true_and_false_are_no_labels(tmp_path, label):
    data = write_jsonl(tmp_path / "a.jsonl", [{"path": "x.png", "label": label}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: labels should be text or class indices"):
        keys(data)
    shard = write_shard(tmp_path / "a.tar", [("k", {"png": b"x", "json": {"label": label}})])
    with pytest.raises(UserError, match=r"a\.tar/k: labels should be text or class indices"):
        keys(shard)


@pytest.mark.parametrize("label", ["dog", 1])
def test_csv_and_jsonl_give_the_same_labels(tmp_path, label):
    rows = write_jsonl(tmp_path / "a.jsonl", [{"path": "x.png", "label": label}])
    (tmp_path / "a.csv").write_text(f"path,label\nx.png,{label}\n")
    assert targets(rows) == targets(tmp_path / "a.csv") == [[False, True]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('path,caption\n0.png,a\n1.png,"b\n2.png,c\n', "a.csv as csv after .*a.csv:2: unexpected end of data"),
        ('path,caption\n0.png,"a" b\n', "a.csv as csv: .* expected after"),
        ("path,caption\n0.png,a dog, running\n", "a.csv:2: 3 columns, expected 2: path, caption; a text with a comma"),
        ("path,caption,caption\n0.png,a,b\n", "a.csv:1: the column 'caption' is listed twice"),
    ],
)
def test_a_csv_loses_no_rows_and_cells(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        keys(tmp_path / "a.csv", task="retrieval")


BROKEN = [
    ('{"label": "cat", "label": "dog"}', "the key 'label' is given twice"),
    ("[" * 100_000, "nested too deeply"),
    ('{"label": ' + "9" * 5000 + "}", "Exceeds the limit"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=["twins", "deep", "digits"])
def test_json_is_refused_with_its_place(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text('{"path": "x.png", "label": "cat"}\n' + text + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:2: not valid JSON: .*{message}"):
        keys(tmp_path / "a.jsonl")
    shard = write_shard(tmp_path / "a.tar", [("k", {"png": b"x", "json": text.encode()})])
    with pytest.raises(UserError, match=rf"a\.tar: cannot read the labels and captions of k: .*{message}"):
        keys(shard)


def test_a_label_of_thousands_of_digits_is_no_index(tmp_path):
    (tmp_path / "a.csv").write_text(f"path,label\nx.png,{'9' * 5000}\n")
    with pytest.raises(UserError, match=r"the label '9+' of x\.png is not in class_names"):
        targets(tmp_path / "a.csv")


def test_a_key_or_a_member_of_a_shard_is_there_once(tmp_path):
    cat = {"png": b"x", "json": {"label": "cat"}}
    with pytest.raises(UserError, match=r"a\.tar: write the members of a next to each other"):
        keys(write_shard(tmp_path / "a.tar", [("a", cat), ("b", cat), ("a", cat)]))
    with pytest.raises(UserError, match=r"b\.tar: a\.json: duplicate file name"):
        keys(write_shard(tmp_path / "b.tar", [("a", cat), ("a", {"json": {"label": "dog"}})]))
    hidden = write_shard(tmp_path / "c.tar", [("./._a", {"png": b""}), ("./a", cat), ("./._b", {"png": b""})])
    assert keys(hidden) == ["c.tar/./a"]


def test_captions_of_a_shard_end_where_lines_end(tmp_path):
    text = "\ufeffa\u2028dog\r\na\fcat\n\n"
    shard = write_shard(tmp_path / "a.tar", [("k", {"png": b"x", "txt": text})])
    (sample,) = list_samples(dataset(shard, "retrieval"), IMAGE)
    assert sample.captions == ("a\u2028dog", "a\fcat")


# ---------------------------------------------------------------------------------------------- limit


@pytest.mark.parametrize(
    ("labels", "limit", "expected"),
    [("ababab", 3, "abb"), ("aabbab", 2, "ab"), ("aaaabb", 3, "aab"), ("abcabcabc", 3, "abc"), ("aaabbb", 2, "ab")],
)
def test_each_class_keeps_its_share_of_the_limit(tmp_path, labels, limit, expected):
    data = write_jsonl(tmp_path / "a.jsonl", [{"path": f"{i}", "label": label} for i, label in enumerate(labels)])
    samples = read_samples(dataset(data, limit=limit), IMAGE)
    assert sorted(sample.labels[0] for sample in samples) == sorted(expected)
    assert [sample.key for sample in samples] == sorted(sample.key for sample in samples)


# ---------------------------------------------------------------------------------------------- configs


def test_a_byte_order_mark_is_no_part_of_a_prompt_or_a_label(tmp_path):
    (tmp_path / "names.txt").write_text("cat\r\nsea\u2028horse\n", encoding="utf-8-sig", newline="")
    (tmp_path / "prompts.txt").write_text("a {c}\n", encoding="utf-8-sig")
    (tmp_path / "a.yaml").write_text(
        "task: classification\ndata: x\nclass_names: names.txt\ntemplates: prompts.txt\n", encoding="utf-8"
    )
    config = load_dataset_config(tmp_path / "a.yaml")
    assert list(config.class_names) == ["cat", "sea\u2028horse"]
    assert config.templates == ("a {c}",)


def test_paths_are_as_good_as_texts(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "prompts.txt").write_text("a {c}\n")
    found = [
        DatasetConfig("pets", "classification", kind(tmp_path / "a.csv"), class_names=kind(tmp_path / "names.txt"),
                      templates=kind(tmp_path / "prompts.txt"), data_root=kind(tmp_path))
        for kind in (Path, str)
    ]  # fmt: skip
    assert found[0] == found[1]
    assert (found[0].data_root, found[0].class_names) == (str(tmp_path), CLASSES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("expect: {samples: -5}", "expect.samples should be at least 0"),
        (
            "published: [{model: m, where: t, values: {median_rank: nan}}]",
            "published.0.values.median_rank should be a finite number",
        ),
        ("published: [{model: m, where: t, values: {null: 1}}]", "published.0.values.None should be text"),
        ("modality: dephth", "modality should be one of .*depth.*, not 'dephth'"),
        ("templates: {'a {c}': x}", "templates should be a list, not"),
        ("data_root: /data", "unknown key 'data_root': use --data-root"),
        ("limit: !!int x", "limit should be a whole number, not 'x'"),
        ("limit: !!bool x", "is not valid YAML: 'x'"),
        ("clip: !!timestamp x", "clip should be a list, not 'x'"),
        ("class_names: {a: ''}", "class_names.a: String should have at least 1 character"),
        ("class_names: [a, ' ']", "class_names.*: String should have at least 1 character"),
    ],
)
def test_mistakes_in_a_config(tmp_path, line, message):
    (tmp_path / "a.yaml").write_text(f"task: retrieval\ndata: x\n{line}\n")
    with pytest.raises(UserError, match=rf"a\.yaml.*{message}"):
        load_dataset_config(tmp_path / "a.yaml")


def test_a_recipe_of_training_is_refused_in_a_few_lines():
    with pytest.raises(UserError) as refused:
        load_dataset_config(ROOT / "configs" / "depth.yaml")
    assert 3 < len(str(refused.value).splitlines()) <= 5
    assert "depth.yaml (a recipe of training, not a dataset): task is missing" in str(refused.value)
    assert str(refused.value).splitlines()[-1].endswith("more errors")


def test_a_name_that_no_file_can_have(tmp_path):
    (tmp_path / "a.yaml").write_text(f"task: retrieval\ndata: x\nname: {'x' * 5000}\n")
    with pytest.raises(UserError, match="name should be a file name: at most 100 letters"):
        load_dataset_config(tmp_path / "a.yaml")


def test_the_keys_of_a_large_mapping_are_checked_at_once():
    keys = [yaml.ScalarNode("tag:yaml.org,2002:str", f"c{number}") for number in range(40_000)]
    start = time.process_time()
    found = PlainLoader("").construct_mapping(yaml.MappingNode("tag:yaml.org,2002:map", [(key, key) for key in keys]))
    assert len(found) == 40_000
    assert time.process_time() - start < 5  # a count for each key takes twice as long


def test_data_of_a_name_that_no_file_can_have_is_not_there(tmp_path):
    (tmp_path / "a.yaml").write_text(f"task: retrieval\ndata: {'x' * 5000}\n")
    with pytest.raises(UserError, match="x does not exist"):
        keys(load_dataset_config(tmp_path / "a.yaml").data)


@pytest.mark.parametrize("weight", ["0", "1e-300", "-1e-4", "1e300", "nan", "inf"])
def test_weights_that_drown_a_modality_are_refused(tmp_path, weight):
    (tmp_path / "p.yaml").write_text(
        f"query: {{depth: {weight}, text: 1}}\ngallery: infrared\ndata: {{depth: a, text: a, infrared: b}}\n"
    )
    with pytest.raises(UserError, match=r"p\.yaml: query.depth should be (from 0\.001 to 1000|a finite number)"):
        load_pairs_config(tmp_path / "p.yaml")


def test_class_names_of_clip_benchmark_keep_their_numbers(tmp_path):
    folder = tmp_path / "wds"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("cat\ndog\n\n", encoding="utf-8-sig")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n\nthe {c}\n")
    assert load_folder(folder).class_names == {"0": "cat", "1": "dog"}
    assert load_folder(folder).templates == ("a {c}", "the {c}")
    (tmp_path / "a.yaml").write_text('task: classification\ndata: wds\ntemplates: ["{c}"]\n')
    config = load_dataset_config(tmp_path / "a.yaml")
    assert (config.class_names, config.templates) == ({"0": "cat", "1": "dog"}, ("{c}",))
    (folder / "classnames.txt").write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match=r"wds: class_names\.1: String should have at least 1 character"):
        load_folder(folder)


# ---------------------------------------------------------------------------------------------- prepare


def download(folder, **options):
    """Three pictures with a table of their labels, and the YAML of class folders of them."""
    (folder / "download").mkdir()
    (folder / "download" / "list.csv").write_text("id,label\n0,cat\n1,dog\n2,cat\n")
    for number in range(3):
        Picture.fromarray(np.full((4, 4), number, np.uint8)).save(folder / "download" / f"{number}.png")
    table = {"kind": "table", "table": "list.csv", "key": "id", "media": "{id}.png", "label": "label"}
    values = {"task": "classification", "data": "pets/test", "prepare": table | options.pop("prepare", {})} | options
    (folder / "pets.yaml").write_text(json.dumps(values))
    return PrepareConfig(folder / "pets.yaml", folder / "download", folder / "data")


@pytest.mark.parametrize("data", ["pets/test", "pets/test.jsonl"])
def test_of_two_runs_at_once_the_second_is_refused(tmp_path, data):
    options = download(tmp_path, data=data)
    lock = tmp_path / "data" / "pets" / f".{data[5:]}.lock"
    lock.parent.mkdir(parents=True)
    hold = (
        "import sys; from pathlib import Path; from languagebind.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another run is making .*{data}: wait for it to end"):
            prepare(options)
        other.stdin.close()
    assert prepare(options)["samples"] == 3
    assert len(keys(tmp_path / "data" / data)) == 3


def test_a_run_holds_the_lock_while_it_works(tmp_path, monkeypatch):
    options = download(tmp_path)
    held = []

    def rows(source, output, rest):
        (lock,) = (tmp_path / "data" / "pets").glob(".test.lock")
        code = (
            f"from pathlib import Path; from languagebind.files import locked\nwith locked(Path({str(lock)!r})): pass"
        )
        held.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr)
        yield {"path": "0.png", "label": "cat"}

    monkeypatch.setattr("languagebind.eval.prepare.table.prepare", rows)
    assert prepare(options)["samples"] == 1
    assert "BlockingIOError" in held[0]
    with locked(tmp_path / "data" / "pets" / ".test.lock"):  # and no longer
        pass


def test_overwrite_replaces_no_manifest_that_prepare_did_not_make(tmp_path):
    options = download(tmp_path, data="pets/test.jsonl")
    manifest = tmp_path / "data" / "pets" / "test.jsonl"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("my own\n")
    again = PrepareConfig(options.config, options.source, options.output, overwrite=True)
    with pytest.raises(UserError, match=r"test\.jsonl was not made by prepare"):
        prepare(again)
    assert manifest.read_text() == "my own\n"
    manifest.unlink()
    prepare(options)
    assert prepare(again)["samples"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ["a"]}, r"pets\.yaml: prepare: label should be text .*, not \['a'\]"),
        ({"encoding": "undefined"}, r"list\.csv.* as csv: undefined encoding"),
        ({"classes": {"table": ["a"], "label": "id"}}, r"pets\.yaml: prepare: classes\.table should be text"),
        ({"classes": {"table": "list.csv"}}, r"prepare: classes\.label is missing"),
    ],
)
def test_options_of_a_wrong_kind(tmp_path, change, message):
    options = download(tmp_path, prepare=change, class_names="names.txt")
    with pytest.raises(UserError, match=message):
        prepare(options)


def test_a_table_names_its_columns_once(tmp_path):
    options = download(tmp_path)
    (options.source / "list.csv").write_text("id,label,label\n0,cat,dog\n")
    with pytest.raises(UserError, match=r"list\.csv:1: the column 'label' is listed twice"):
        prepare(options)
    (options.source / "list.csv").write_text("id,label,,\n0,cat,,\n")
    assert prepare(options)["samples"] == 1


def test_wrong_counts_name_the_download(tmp_path):
    options = replace(download(tmp_path, expect={"samples": 4}), strict=True)
    with pytest.raises(UserError, match=r"pets: 3 samples, expected 4: .*/download is incomplete or from"):
        prepare(options)


def test_many_labels_are_checked_at_once(tmp_path):
    labels = {str(number): "" for number in range(20_000)}
    start = time.process_time()
    rows = {label: {"path": label} for label in labels}
    Listing(rows=rows, labels=labels).check(dataset(tmp_path), labels, tmp_path, skip_missing=False)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (("99", "4"), "4x4 pixels, but 99x4"),
        ((5.0, 4), "4x4 pixels, but 5x4"),
        ((4.5, 4), "4x4 pixels, but 4.5x4"),
        (("wide", 4), r"cannot read .*c\.json: ValueError"),
        (("4", 4.0), None),
        ((None, None), None),
    ],
)
def test_the_size_of_a_picture_is_checked_however_it_is_written(tmp_path, size, message):
    crops = {"kind": "crops", "format": "coco", "annotations": "c.json", "classes": {"cat": "cat"}}
    options = download(tmp_path)
    options.config.write_text(json.dumps({"task": "classification", "data": "pets/test", "prepare": crops}))
    coco = {
        "images": [{"id": 0, "file_name": "0.png", "width": size[0], "height": size[1]}],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 2, 2]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (options.source / "c.json").write_text(json.dumps(coco))
    if message is None:
        assert prepare(options)["samples"] == 1
        return
    with pytest.raises(UserError, match=re.compile(message)):
        prepare(options)


def test_an_error_in_the_data_comes_before_the_model_is_loaded(tmp_path):
    (tmp_path / "data.csv").write_text("path,caption\na.png,\n")
    (tmp_path / "mine.yaml").write_text("task: retrieval\nmodality: depth\ndata: data.csv\n")
    with pytest.raises(UserError, match="mine: 1 of 1 samples do not fit retrieval"):
        main(["--checkpoint=none.pt", f"--config={tmp_path / 'mine.yaml'}", f"--output={tmp_path}"])
    (tmp_path / "data.csv").write_text("path,label\na.png,brid\n")
    (tmp_path / "mine.yaml").write_text("task: classification\ndata: data.csv\nclass_names: [bird, cat]\n")
    with pytest.raises(UserError, match="'brid'"):
        main(["--checkpoint=none.pt", f"--config={tmp_path / 'mine.yaml'}", f"--output={tmp_path}"])
