"""The datasets of configs/eval: from the files that their authors publish to a result, and the mistakes on the way."""

import json
import pickle
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_datasets import CONFIGS, MODALITIES, prepare, with_counts
from helpers import call
from lookalikes import FOLDERS, LOOKALIKES, PAIRS, class_folders, film, llvip, picture, sound, table, write_json
from report_world import Page

from languagebind.config import UserError, load_yaml
from languagebind.eval import load_dataset_config
from languagebind.eval import prepare as kinds_package
from languagebind.eval.data.pairing import load_pairs_config
from languagebind.eval.data.samples import class_names, count_missing, read_samples
from languagebind.eval.evaluate import evaluate
from languagebind.eval.features import EncodeOptions
from languagebind.eval.pairs import evaluate_pairs
from languagebind.eval.prepare.__main__ import main
from languagebind.eval.report.__main__ import main as page_main
from languagebind.eval.results import write_result
from languagebind.hub.encoders import Encoders

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
METRIC = {"segmentation": "mIoU", "classification": "top1", "multilabel": "mAP", "retrieval": "text_to_modality/R@1"}


@pytest.fixture(scope="session")
def models(clip_folder):
    """A real model of random weights for each modality."""
    from languagebind.model import DualEncoder, EncoderConfig
    from languagebind.text import TextConfig, build_text

    text = build_text(TextConfig(f"local-dir:{clip_folder}"))
    sizes = EncoderConfig(patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
    torch.manual_seed(0)
    return {name: DualEncoder(kind.input_shape, sizes, text).eval() for name, kind in MODALITIES.items()}


@pytest.fixture
def configs(tmp_path):
    """The configs, to be changed: a look-alike has other counts, and 80 prompts of 1000 classes take half a minute."""
    folder = shutil.copytree(CONFIGS, tmp_path / "configs")
    (folder / "templates" / "openai.txt").write_text("a photo of a {c}.\n")
    return folder


def score(models, kind, config, data_root, protocol="ours") -> dict:
    dataset = replace(load_dataset_config(config, data_root), protocol=protocol)
    return evaluate(models[kind], MODALITIES[kind], dataset, workers=0, batch_size=8)


def as_number(label: str) -> tuple[int, str]:
    return int(label) if label.isdecimal() else 0, label


# ---------------------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize("name", LOOKALIKES)
def test_download_to_result(name, models, configs, tmp_path):
    kind, write = LOOKALIKES[name]
    counts = write(tmp_path / "download")
    config = with_counts(configs / f"{name}.yaml", counts)
    report = prepare(config, tmp_path / "download", tmp_path / "data")
    assert {key: report[key] for key in counts} == counts
    assert report["missing"] == []
    dataset = load_dataset_config(config, tmp_path / "data")
    samples = read_samples(dataset, MODALITIES[kind])
    assert len(samples) == counts["samples"]
    if dataset.task == "retrieval":
        assert sum(len(sample.captions) for sample in samples) == counts["captions"]
    elif dataset.task == "segmentation":
        assert all(len(sample.masks) == 1 for sample in samples)
    else:
        assert len({label for sample in samples for label in sample.labels}) == counts["classes"]
    result = score(models, kind, config, tmp_path / "data")
    assert result["protocol"]["samples"] == counts["samples"]
    assert result["protocol"]["skipped_samples"] == 0
    assert dataset.metric == METRIC[dataset.task]
    assert 0 <= result["metrics"][dataset.metric] <= 1
    if dataset.paper is not None:
        paper = score(models, kind, config, tmp_path / "data", "paper")
        assert paper["protocol"]["protocol"] == "paper"
        assert paper["protocol"]["samples"] == counts["samples"]
        assert (paper["metrics"] == result["metrics"]) >= (dataset.paper == {})


@pytest.mark.parametrize("name", FOLDERS)
def test_class_folders_to_result(name, models, configs, tmp_path):
    kind, write = FOLDERS[name]
    counts = write(tmp_path)
    result = score(models, kind, configs / f"{name}.yaml", tmp_path)
    assert result["protocol"]["samples"] == counts["samples"]
    assert result["protocol"]["classes_with_samples"] == counts["classes"]
    assert result["protocol"]["classes"] == load_dataset_config(CONFIGS / f"{name}.yaml").expect["classes"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("pairs/*.yaml")), ids=lambda path: path.stem)
def test_the_paper_s_pairs_from_download_to_result(path, models, configs, tmp_path):
    data, samples = tmp_path / "data", None
    for name, write in PAIRS[path.stem].items():
        counts = write(tmp_path / name)
        prepare(with_counts(configs / f"{name}.yaml", counts), tmp_path / name, data)
        samples = counts["samples"]
    if samples is None:
        llvip(data)
        samples = 2
    config = load_pairs_config(configs / "pairs" / path.name, data)
    encoders = Encoders({name: (models[name], MODALITIES[name]) for name in config.used if name != "text"})
    result = evaluate_pairs(encoders, config, EncodeOptions(workers=0))
    assert (result["protocol"]["samples"], result["protocol"]["skipped_samples"]) == (samples, 0)
    assert result["protocol"]["missing_samples"] == 0
    if path.stem == "msrvtt_audio_video":  # of three modalities, but of one manifest
        (data / "msrvtt" / "test.jsonl.prepare.json").write_text('{"missing": ["a", "b"]}')
        again = evaluate_pairs(encoders, config, EncodeOptions(workers=0))
        assert again["protocol"]["missing_samples"] == 2
    assert 0 <= result["metrics"][config.metric] <= 1
    assert config.source
    assert all(config.metric in figure["values"] for figure in config.published)
    result["pretrained"] = "ours"
    write_result(result, tmp_path / "results" / f"{path.stem}.json")
    page_main([str(tmp_path / "results"), "--configs", str(CONFIGS)])
    shown = Page((tmp_path / "results" / "report.html").read_text()).table("Headline metric")
    values = {"ours": result["metrics"][config.metric]}
    values |= {figure["model"]: figure["values"][config.metric] for figure in config.published[:1]}
    for model, value in values.items():
        assert shown[model][0].split()[0] == f"{100 * value:.1f}"


@pytest.mark.parametrize("name", NAMES)
def test_every_config_says_where_its_data_comes_from(name):
    config = load_dataset_config(CONFIGS / f"{name}.yaml", "/nowhere", prepared=False)
    assert config.source
    assert config.layout
    assert config.metric == METRIC[config.task]
    assert config.expect
    assert (config.name, config.data[:9]) == (name, "/nowhere/")
    if config.task == "segmentation":  # a class has the index of its line
        assert len(config.class_names) == {"nyu_v2_13": 13, "nyu_v2_40": 40, "mfnet": 9}[name]
    elif config.class_names is not None:
        assert len(config.class_names) == config.expect["classes"]
        assert list(config.class_names) == sorted(config.class_names, key=as_number), "the order of the sorted folders"
    if config.task != "retrieval":
        assert len(config.templates) == (1 if config.templates == ("a sound of {c}.",) else 80)
    assert name in LOOKALIKES or name in FOLDERS, "has no look-alike"
    for figure in config.published:
        assert any(metric == config.metric for metric in figure["values"]), figure


def test_what_was_written_is_what_the_table_says(configs, tmp_path):
    """Labels, names of classes, paragraphs and splits, looked at one by one."""

    def rows(name):
        counts = LOOKALIKES[name][1](tmp_path / name)
        prepare(with_counts(configs / f"{name}.yaml", counts), tmp_path / name, tmp_path)
        dataset = load_dataset_config(configs / f"{name}.yaml", tmp_path)
        return dataset, {s.key: s for s in read_samples(dataset, MODALITIES[LOOKALIKES[name][0]])}

    dataset, samples = rows("audioset")
    assert dataset.class_names == {"/m/068hy": "Domestic animals, pets", "/m/07q6cd_": "Squeak", "/m/03l9g": "Hammer"}
    assert samples["eval_segments/-0BIyqJj9ZU.wav"].labels == ("/m/07q6cd_", "/m/03l9g")
    dataset, samples = rows("vggsound")
    assert class_names(dataset)["bird chirping, tweeting"] == "bird chirping, tweeting"
    assert samples["playing tennis/-3RH8_aeZkk_000105.flac"].labels == ("playing tennis",)
    dataset, samples = rows("kinetics400")
    assert list(dataset.class_names) == [
        "abseiling", "air drumming", "massaging person's head", "petting animal (not cat)"
    ]  # fmt: skip
    assert samples["val/0wR5jVB-WPk_000417_000427.mp4"].labels == ("petting animal (not cat)",)
    _, samples = rows("activitynet")
    assert samples["Activity_Videos/v_uqiMw7tQ1Cc.mp4"].captions == (
        "The two girls are in a gym. They a man is cooking.",
    )
    _, samples = rows("didemo")
    assert samples["videos/54322086@N00_2408598493_274c77d26a.mp4"].captions == (
        'a man is cooking 0 a dog runs in the rain 0 she says "stop" 0',
    )
    _, samples = rows("lsmdc")
    assert samples["videos/1014_2012/1014_2012_00.00.01.414-00.00.04.418.avi"].captions == ('He reads a note, "Run.',)
    _, samples = rows("msvd")
    assert samples["MSVD_Videos/-4wsuPCjDBc_1_10.avi"].captions == ("a man is cooking 1", "a dog runs in the rain 1")
    _, samples = rows("imagenet")
    assert sorted(samples)[-1] == "n15075141/ILSVRC2012_val_00000003.JPEG"


def test_names_of_imagenet():
    names = load_dataset_config(CONFIGS / "imagenet.yaml").class_names
    assert names["n01440764"] == "tench"
    assert names["n15075141"] == "toilet paper"
    assert list(names) == sorted(names), "the order of the class folders"
    second = load_dataset_config(CONFIGS / "imagenet_v2.yaml").class_names
    assert list(second) == [str(k) for k in range(1000)]
    assert list(second.values()) == list(names.values())


def test_a_dataset_that_is_not_there(tmp_path):
    (tmp_path / "kinetics400" / "val").mkdir(parents=True)
    (tmp_path / "kinetics400" / "k400_val.tar.gz").touch()
    (tmp_path / "msrvtt").mkdir()
    for name in ("kinetics400", "msrvtt", "nyu_v2"):
        with pytest.raises(UserError) as error:
            read_samples(load_dataset_config(CONFIGS / f"{name}.yaml", tmp_path), MODALITIES["video"])
        message, values = str(error.value), load_yaml(CONFIGS / f"{name}.yaml")
        assert values["source"] in message
        assert values["layout"].splitlines()[0] in message
        assert str(tmp_path) in message
        if name == "kinetics400":  # the file of class names is what is missed first
            assert "kinetics400/class_names.txt does not exist" in message
            assert f"{tmp_path}/kinetics400 holds k400_val.tar.gz, val/" in message
            assert "then: languagebind prepare kinetics400 --source" in message
        else:
            assert ("holds nothing" if name == "msrvtt" else "holds kinetics400/, msrvtt/") in message


def test_a_new_dataset_is_one_yaml(models, tmp_path):
    """Another layout than any above: records inside an object, a list of splits, labels beside the captions."""
    clips = [
        {"id": k, "split": "val" if k == 3 else "test", "file": f"a/{k}", "desc": [f"text {k}", "more"]}
        for k in range(5)
    ]
    write_json(tmp_path / "download" / "new.json", {"info": {}, "videos": clips})
    for k in range(5):
        film(tmp_path / "download" / "clips" / "a" / f"{k}.mp4")
    (tmp_path / "new.yaml").write_text(
        "task: retrieval\ndata: new/test.jsonl\nexpect: {samples: 4, captions: 8}\n"
        "prepare: {kind: table, table: new.json, records: videos, key: id, where: {split: [test, extra]}, "
        'media: "clips/{file}.mp4", caption: desc}\n'
    )
    assert prepare(tmp_path / "new.yaml", tmp_path / "download", tmp_path / "data")["samples"] == 4
    wrong = (tmp_path / "new.yaml").read_text().replace("[test, extra]", "dev")
    (tmp_path / "wrong.yaml").write_text(wrong)
    with pytest.raises(UserError, match=r"new.json: `where` selects no row. The columns hold split: test, val"):
        prepare(tmp_path / "wrong.yaml", tmp_path / "download", tmp_path / "wrong")
    result = score(models, "video", tmp_path / "new.yaml", tmp_path / "data")
    assert result["protocol"]["samples"] == 4


# ------------------------------------------------------------------------------------------------------ running


@pytest.fixture
def sounds(tmp_path):
    """A table of three sounds, and the YAML of its dataset."""
    table(tmp_path / "download" / "list.csv", [("id", "text"), ("a", "one"), ("b", "two"), ("c", "three")])
    for name in "abc":
        sound(tmp_path / "download" / "clips" / f"{name}.wav")
    return sounds_yaml(tmp_path)


def sounds_yaml(
    folder: Path, more: str = "", data: str = "set/test.jsonl", expect: str = "{samples: 3}", **options
) -> Path:
    known = {"kind": "table", "table": "list.csv", "key": "id", "media": "clips/{id}.wav", "caption": "text"}
    chosen = {key: value for key, value in (known | options).items() if value is not None}
    (folder / "set.yaml").write_text(
        f"task: retrieval\ndata: {data}\nexpect: {expect}\nprepare: {json.dumps(chosen)}\n{more}"
    )
    return folder / "set.yaml"


def test_command_line_and_report(sounds, tmp_path):
    argv = ["-m", "languagebind.eval.prepare", str(sounds), "--source", str(tmp_path / "download"),
            "--output", str(tmp_path / "data")]  # fmt: skip
    assert "test.jsonl: 3 samples, 3 captions" in call(*argv)
    assert "error: " in (again := call(*argv, status=2))
    assert "test.jsonl exists already: --overwrite" in again
    assert "Traceback" not in again


def test_media_are_linked_and_paths_do_not_tell_where_they_lie(sounds, tmp_path):
    elsewhere = prepare(sounds, tmp_path / "download", tmp_path / "data")
    manifest = (tmp_path / "data" / "set" / "test.jsonl").read_text()
    assert (tmp_path / "data" / "set" / "clips" / "a.wav").is_symlink()
    shutil.copytree(tmp_path / "download", tmp_path / "other" / "set")
    beside = prepare(sounds, tmp_path / "other" / "set", tmp_path / "other")
    assert not (tmp_path / "other" / "set" / "clips" / "a.wav").is_symlink()
    assert (tmp_path / "other" / "set" / "test.jsonl").read_text() == manifest
    assert beside["keys_sha256"] == elsewhere["keys_sha256"]


def test_a_users_own_links_stay(sounds, tmp_path):
    """The download may itself consist of links, and lie in the data root."""
    shutil.move(tmp_path / "download" / "clips", tmp_path / "store")
    (tmp_path / "download" / "clips").mkdir()
    for name in "abc":
        (tmp_path / "download" / "clips" / f"{name}.wav").symlink_to(tmp_path / "store" / f"{name}.wav")
    (tmp_path / "set").symlink_to(tmp_path / "download")
    prepare(sounds, tmp_path / "set", tmp_path)
    prepare(sounds, tmp_path / "download", tmp_path, "--overwrite")
    assert (tmp_path / "download" / "clips" / "a.wav").resolve() == (tmp_path / "store" / "a.wav").resolve()


def test_another_file_of_the_same_name_is_not_taken_for_it(sounds, tmp_path):
    sound(tmp_path / "data" / "set" / "clips" / "b.wav")
    with pytest.raises(UserError, match=r"b.wav exists and is not .*download/clips/b.wav"):
        prepare(sounds, tmp_path / "download", tmp_path / "data")


def test_missing_files_are_refused_or_counted(sounds, models, caplog, tmp_path):
    (tmp_path / "download" / "clips" / "b.wav").unlink()
    with pytest.raises(UserError, match=r"1 of 3 files .*clips/b.wav \(.*list.csv:3\); --skip-missing"):
        prepare(sounds, tmp_path / "download", tmp_path / "data")
    assert not (tmp_path / "data" / "set" / "test.jsonl").exists()
    gone = tmp_path / "data" / "set" / "clips" / "b.wav"
    assert not gone.parent.exists(), "a refused run leaves no links"
    gone.parent.mkdir()
    gone.symlink_to(tmp_path / "nowhere")
    report = prepare(sounds, tmp_path / "download", tmp_path / "data", "--skip-missing")
    assert (report["samples"], report["captions"]) == (2, 2)
    assert len(report["missing"]) == 1
    assert "clips/b.wav" in report["missing"][0]
    assert not gone.is_symlink()
    with caplog.at_level("WARNING"):
        result = score(models, "audio", sounds, tmp_path / "data")
    assert "prepare left out 1 samples with a missing file" in caplog.text
    assert (result["protocol"]["samples"], result["protocol"]["missing_samples"]) == (2, 1)
    shutil.rmtree(tmp_path / "download" / "clips")
    with pytest.raises(UserError, match="3 of 3 files"):
        prepare(sounds, tmp_path / "download", tmp_path / "data", "--skip-missing", "--overwrite")


@pytest.mark.parametrize("before", [False, True])
def test_a_run_that_is_stopped_before_its_report_leaves_no_old_one(sounds, tmp_path, monkeypatch, before):
    if before:
        prepare(sounds, tmp_path / "download", tmp_path / "data")
    (tmp_path / "download" / "clips" / "b.wav").unlink()
    argv = [str(sounds), "--source", str(tmp_path / "download"), "--output", str(tmp_path / "data"), "--skip-missing"]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("languagebind.eval.prepare.__main__._report", stop)
        with pytest.raises(KeyboardInterrupt):
            main([*argv, *(["--overwrite"] if before else [])])
    config = load_dataset_config(sounds, tmp_path / "data")
    assert len(read_samples(config, MODALITIES["audio"])) == 2
    assert count_missing(config) is None
    with pytest.raises(UserError, match="exists already: --overwrite replaces it"):
        main(argv)
    main([*argv, "--overwrite"])
    assert count_missing(config) == 1


def test_a_link_to_a_download_that_is_gone_is_made_again(sounds, tmp_path):
    prepare(sounds, tmp_path / "download", tmp_path / "data")
    (tmp_path / "download").rename(tmp_path / "moved")
    prepare(sounds, tmp_path / "moved", tmp_path / "data", "--overwrite")
    assert (tmp_path / "data" / "set" / "clips" / "a.wav").is_file()


def test_class_folders_are_whole_or_not_there(tmp_path):
    download = tmp_path / "download"
    table(download / "list.csv", [("id", "text"), ("a", "dog"), ("b", "cat")])
    sound(download / "clips" / "a.wav")
    config = sounds_yaml(tmp_path, data="set/test", expect="{samples: 2, classes: 2}", caption=None, label="text")
    config.write_text(config.read_text().replace("retrieval", "classification"))
    with pytest.raises(UserError, match=r"1 of 2 files are not below .*: clips/b\.wav \("):
        prepare(config, download, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data" / "set").iterdir()] == [".test.lock"]
    sound(download / "clips" / "b.wav")
    assert prepare(config, download, tmp_path / "data")["classes"] == 2
    (download / "clips" / "b.wav").unlink()
    with pytest.raises(UserError, match="1 of 2 files"):
        prepare(config, download, tmp_path / "data", "--overwrite")
    assert (tmp_path / "data" / "set" / "test" / "dog" / "a.wav").is_file(), "what was there stays"
    (tmp_path / "data" / "set" / "test.prepare.json").unlink()
    with pytest.raises(UserError, match="was not made by prepare"):
        prepare(config, download, tmp_path / "data", "--overwrite")


def test_class_names_that_differ_are_not_replaced(configs, tmp_path):
    counts = LOOKALIKES["audioset"][1](tmp_path / "download")
    names = tmp_path / "data" / "Audio" / "audioset" / "class_names.txt"
    names.parent.mkdir(parents=True)
    names.write_text("/m/068hy\tpets\n")
    config = with_counts(configs / "audioset.yaml", counts)
    with pytest.raises(UserError, match=r"class_names.txt exists and differs"):
        prepare(config, tmp_path / "download", tmp_path / "data")
    assert names.read_text() == "/m/068hy\tpets\n"
    assert not names.with_name("eval.jsonl").exists()
    prepare(config, tmp_path / "download", tmp_path / "data", "--overwrite")
    assert names.read_text().startswith("/m/068hy\tDomestic animals, pets\n")


def test_a_dataset_that_lacks_samples_says_so(sounds, tmp_path, caplog):
    (tmp_path / "download" / "clips" / "b.wav").unlink()
    prepare(sounds, tmp_path / "download", tmp_path / "data", "--skip-missing")
    read_samples(load_dataset_config(sounds, tmp_path / "data"), MODALITIES["audio"])
    assert "set: found 2 samples, but the dataset has 3" in caplog.text


def test_a_kind_is_a_module_found_by_name(tmp_path, monkeypatch):
    """It may write files itself, and return the counts of what it left out."""
    kinds = tmp_path / "kinds"
    kinds.mkdir()
    (kinds / "halves.py").write_text(
        "def prepare(source, output, options):\n"
        "    for name in ('a', 'b'):\n"
        "        (output / name).mkdir()\n"
        "        (output / name / '1.png').write_bytes((source / f'{name}.png').read_bytes())\n"
        "        yield {'path': f'{name}/1.png', 'label': name}\n"
        "    return {options['reason']: 2}\n"
    )
    monkeypatch.setattr(kinds_package, "__path__", [*kinds_package.__path__, str(kinds)])
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "x.yaml").write_text(
        "task: classification\ndata: x/test\nexpect: {samples: 2}\nprepare: {kind: halves, reason: small}\n"
    )
    report = prepare(tmp_path / "x.yaml", tmp_path, tmp_path / "data")
    assert report["left_out"] == {"small": 2}
    assert not (tmp_path / "data" / "x" / "test" / "a" / "1.png").is_symlink()
    assert len(read_samples(load_dataset_config(tmp_path / "x.yaml", tmp_path / "data"), MODALITIES["image"])) == 2


def test_mistakes_on_the_command_line(sounds, tmp_path):
    with pytest.raises(UserError, match=r"--source .*none is not a folder"):
        prepare(sounds, tmp_path / "none", tmp_path / "data")
    with pytest.raises(UserError, match="its YAML has no `prepare`"):
        prepare(CONFIGS / "imagenet_v2.yaml", tmp_path, tmp_path / "data")
    with pytest.raises(UserError, match=r"no kind 'tabel', only .*table"):
        prepare(sounds_yaml(tmp_path, kind="tabel"), tmp_path / "download", tmp_path / "data")
    with pytest.raises(UserError, match=r"writes a .jsonl manifest or class folders"):
        prepare(sounds_yaml(tmp_path, data="set/a.csv"), tmp_path / "download", tmp_path / "data")
    with pytest.raises(UserError, match=r"3 samples, expected 4: .*download is incomplete"):
        prepare(sounds_yaml(tmp_path, expect="{samples: 4}"), tmp_path / "download", tmp_path / "data", "--strict")
    with pytest.raises(UserError, match=r"`where` selects no row. The columns hold text: one, three, two"):
        prepare(sounds_yaml(tmp_path, where={"text": ["five", "six"]}), tmp_path / "download", tmp_path / "data")


# ----------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("id,text\na,one\nb\n", r"list.csv:3: 1 columns, expected 2: id, text"),
        ("id,text\na,one\n\nb,two,three\n", r"list.csv:4: 3 columns, expected 2"),
        ("name,text\na,one\n", r"list.csv:2: no column 'id', only name, text"),
        ("id,caption\na,one\n", r"list.csv:2: no column 'text', only id, caption"),
        ("id,text\na,one\nb,two\na,three\n", r"list.csv:4: 'a' is listed twice, first at .*list.csv:2"),
        ("id,text\na,one\nb,\n", r"list.csv:3: text is empty"),
        ("id,text\na,one\n ,two\n", r"list.csv:3: id is empty"),
        ('id,text\na,"one\nb,two\n', r"list.csv as csv.*: unexpected end of data"),
        ("id,text\na,caf\xe9\n".encode("latin-1"), r"list.csv as csv: 'utf-8' codec can't decode .*set `encoding`"),
        ("id,text\n../../etc/passwd,one\n", r"list.csv:2: .* is not a path in the folder of the download"),
        ("id,text\n", r"0 samples, expected 3"),
        ("", r"0 samples, expected 3"),
    ],
)
def test_bad_rows(sounds, tmp_path, rows, message):
    (tmp_path / "download" / "list.csv").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    with pytest.raises(UserError, match=message):
        prepare(sounds, tmp_path / "download", tmp_path / "data")
    assert not (tmp_path / "data" / "set" / "test.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "none.csv"}, "cannot read .*none.csv as csv: .*No such file"),
        ({"table": None}, r"set\.yaml: prepare: table is missing"),
        ({"tabel": "x"}, "unknown key 'tabel', did you mean 'table'"),
        ({"caption": None}, "prepare: set caption, label or labels"),
        ({"caption": ["text", "texts"]}, "no column 'texts'"),
        ({"media": "clips/{name}.wav"}, "list.csv:2: no column 'name'"),
        ({"media": "clips/{id.wav"}, "cannot fill in"),
        ({"format": "xlsx"}, "unknown table format 'xlsx'"),
        ({"format": "json"}, "cannot read .*list.csv as json: "),
        ({"format": "jsonl"}, "list.csv:1: not valid JSON"),
        ({"format": "pkl"}, "cannot read .*list.csv as pkl: "),
        ({"encoding": "utf-99"}, "cannot read .*list.csv as csv: unknown encoding: utf-99"),
        ({"split_list": "split.txt"}, r"split.txt: 1 of 2 keys are not in list.csv, such as 'z'"),
        ({"split_list": "twice.txt"}, r"twice.txt:2: 'a' is listed twice"),
        ({"match": {"id": "(x)"}}, "list.csv:2: 'a' does not match"),
        ({"match": {"id": "("}}, "match.id should be a valid regular expression"),
        ({"match": {"id": "(a)|(b)"}}, r"match.id should be a pattern with one group.*, not '\(a\)\|\(b\)'"),
        ({"match": {"id": "a|(b)"}}, "list.csv:2: 'a' does not match"),
        ({"match": "id"}, "match should be"),
        ({"where": {"split": "test"}}, "no column 'split'"),
        ({"join": "lines"}, "join should be 'paragraph', not 'lines'"),
        ({"columns": ["id", "text", "more"]}, "list.csv:1: 2 columns, expected 3"),
    ],
)
def test_bad_options(sounds, tmp_path, options, message):
    (tmp_path / "download" / "split.txt").write_text("a\nz\n")
    (tmp_path / "download" / "twice.txt").write_text("a\na\n")
    with pytest.raises(UserError, match=message):
        prepare(sounds_yaml(tmp_path, **options), tmp_path / "download", tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.json", '{"a": {"text": "x"}, "a": {"text": "y"}}', r"the key 'a' is given twice"),
        ("l.json", '[{"id": "a", "text": "x"},\n{"id": "b" "text": "y"}]', r"cannot read .*l.json as json: .*line 2"),
        ("l.json", '[{"id": "a", "text": []}]', r"entry 1: text is empty"),
        ("l.json", '[{"id": "a", "text": ["x", " "]}]', r"entry 1: text is empty"),
        ("l.json", '[{"id": "a", "text": {"en": "x"}}]', r"entry 1: text should be text"),
        ("l.json", '[{"id": "a", "text": null}]', r"entry 1: text should be text"),
        ("l.json", '"a"', r"should hold a list or a mapping"),
        ("l.jsonl", '{"id": "a", "text": "x"}\n{"id": "b", "text": 3.5}\n', r"l.jsonl:2: text should be text"),
        ("l.pkl", pickle.dumps({"a": Path("x")}), r"has pathlib.*only containers, strings and numbers are allowed"),
        ("l.pkl", pickle.dumps([{"id": "a", "text": "x"}])[:20], r"cannot read .*l.pkl as pkl: "),
    ],
)
def test_bad_entries(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        prepare(sounds_yaml(tmp_path, table=name), tmp_path, tmp_path / "data")


def test_a_pickle_runs_no_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    (tmp_path / "l.pkl").write_bytes(pickle.dumps([Harm()]))
    with pytest.raises(UserError, match=r"has (builtins|_?io).open"):
        prepare(sounds_yaml(tmp_path, table="l.pkl"), tmp_path, tmp_path / "data")
    assert not (tmp_path / "harm").exists()


def test_names_in_unicode_and_other_encodings(tmp_path):
    """A name written as a letter and an accent is the one with the accented letter; macOS unpacks it so."""
    names = ["café", "日本", "naïve.mp3"]
    rows = [("id", "text"), *((name, f"le {name}") for name in names)]
    table(tmp_path / "download" / "list.csv", rows)
    for name in names:
        sound(tmp_path / "download" / "clips" / f"{unicodedata.normalize('NFD', name)}.wav")
    config = sounds_yaml(tmp_path, media="clips/{id}.*")
    assert prepare(config, tmp_path / "download", tmp_path / "data")["samples"] == 3
    dataset = load_dataset_config(config, tmp_path / "data")
    assert read_samples(dataset, MODALITIES["audio"])[1].captions == ("le 日本",)
    (tmp_path / "download" / "list.csv").write_bytes("id,text\ncafé,un thé\n".encode("latin-1"))
    config = sounds_yaml(tmp_path, media="clips/{id}.*", encoding="latin-1", expect="{samples: 1}")
    prepare(config, tmp_path / "download", tmp_path / "data", "--overwrite")
    assert read_samples(load_dataset_config(config, tmp_path / "data"), MODALITIES["audio"])[0].captions == ("un thé",)


def test_lines_end_where_lines_end(tmp_path):
    """A caption may hold a character that Unicode calls the end of a line; Windows ends lines with two characters."""
    texts, trailing = ["one\u2028two", "three\x85four", "five\x0csix"], ["", "\t", "\t\t"]
    (tmp_path / "l.tsv").write_bytes("".join(f"{k}\t{text}{trailing[k]}\r\n" for k, text in enumerate(texts)).encode())
    for k in range(3):
        sound(tmp_path / "clips" / f"{k}.wav")
    config = sounds_yaml(tmp_path, table="l.tsv", columns=["id", "text"])
    prepare(config, tmp_path, tmp_path / "data")
    rows = (tmp_path / "data" / "set" / "test.jsonl").read_text().split("\n")
    assert [json.loads(row)["captions"] for row in rows if row] == [[text] for text in texts]


def test_a_paragraph_may_have_an_empty_sentence_but_not_be_empty(tmp_path):
    film(tmp_path / "clips" / "v_a.mp4")
    options = {"table": "l.json", "key": "key", "media": "clips/{key}.mp4", "caption": "sentences", "join": "paragraph"}
    config = sounds_yaml(tmp_path, expect="{samples: 1, captions: 1}", **options)
    write_json(tmp_path / "l.json", {"v_a": {"sentences": [" One.", "", "Two. "]}})
    prepare(config, tmp_path, tmp_path / "data")
    assert json.loads((tmp_path / "data" / "set" / "test.jsonl").read_text())["captions"] == ["One. Two."]
    write_json(tmp_path / "l.json", {"v_a": {"sentences": [" ", ""]}})
    with pytest.raises(UserError, match="entry 'v_a': the paragraph is empty"):
        prepare(config, tmp_path, tmp_path / "data", "--overwrite")


def test_a_sample_may_be_of_none_of_the_classes(models, tmp_path):
    for k in range(3):
        picture(tmp_path / "clips" / f"{k}.png")
    rows = [{"id": k, "tags": tags} for k, tags in enumerate((["red"], [], ["red", "blue"]))]
    options = {"table": "l.json", "media": "clips/{id}.png", "caption": None, "labels": "tags"}
    config = sounds_yaml(tmp_path, more="class_names: [red, blue]\n", **options)
    config.write_text(config.read_text().replace("retrieval", "multilabel"))
    write_json(tmp_path / "l.json", rows)
    prepare(config, tmp_path, tmp_path / "data")
    result = score(models, "image", config, tmp_path / "data")
    assert (result["protocol"]["samples"], [each["samples"] for each in result["classes"]]) == (3, [2, 1])
    write_json(tmp_path / "l.json", [*rows[:2], {"id": 2, "tags": [" "]}])
    with pytest.raises(UserError, match="entry 3: tags is empty"):
        prepare(config, tmp_path, tmp_path / "data", "--overwrite")


def test_two_files_that_fit(sounds, tmp_path):
    sound(tmp_path / "download" / "clips" / "b.flac")
    with pytest.raises(UserError, match=r"list.csv:3: clips/b.flac and clips/b.wav both match"):
        prepare(sounds_yaml(tmp_path, media="clips/{id}.*"), tmp_path / "download", tmp_path / "data")


def test_two_samples_of_one_file_and_labels_that_are_no_classes(tmp_path):
    picture(tmp_path / "clips" / "x.png")
    table(tmp_path / "list.csv", [("id", "text", "file"), ("a", "red", "x"), ("b", "blue", "x")])
    with pytest.raises(UserError, match=r"list.csv:3: clips/x.png is listed twice, first at .*list.csv:2"):
        prepare(sounds_yaml(tmp_path, media="clips/{file}.png"), tmp_path, tmp_path / "data")
    table(tmp_path / "list.csv", [("id", "text", "file"), ("a", "rde", "x")])
    options = {"media": "clips/{file}.png", "caption": None, "label": "text", "expect": "{samples: 1}"}
    config = sounds_yaml(tmp_path, more="class_names: [red, blue]\n", **options)
    with pytest.raises(UserError, match=r"list.csv:2: 'rde' is not a class of set"):
        prepare(config, tmp_path, tmp_path / "data")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("expect: {sample: 3}", "expect.sample should be 'samples', 'captions' or 'classes'"),
        ("expect: {samples: many}", "expect.samples should be a whole number, not 'many'"),
        ("expect: 3", "expect should be `key: value` lines"),
        ("published: {top1: 0.5}", "published should be a list"),
        (
            "published: [{model: A, values: {top1: 65.1}, where: B}]",
            "published.0.values should be fractions of 1, not percentages, .*65.1",
        ),
        (
            "published: [{model: A, values: {top1: high}, where: B}]",
            "published.0.values.top1 should be a number, not 'high'",
        ),
        ("published: [{model: A, values: {top1: 0.5}}]", "published.0.where is missing"),
        ("published: [{model: A, where: B}]", "published.0.values is missing"),
        ("prepare: table", "prepare should be `key: value` lines"),
        ("source: [a]", r"source should be text .*, not \['a'\]"),
        ("sauce: a", "unknown key 'sauce', did you mean 'source'"),
    ],
)
def test_mistakes_in_the_yaml(tmp_path, line, message):
    (tmp_path / "a.yaml").write_text(f"task: classification\ndata: a\n{line}\n")
    with pytest.raises(UserError, match=message):
        load_dataset_config(tmp_path / "a.yaml")


def test_class_folders_that_hold_another_class_are_named(models, tmp_path):
    class_folders("Thermal/llvip/val/persons", suffix="jpg")(tmp_path)
    with pytest.raises(UserError, match=r"'persons' .*did you mean 'person'"):
        score(models, "infrared", CONFIGS / "llvip.yaml", tmp_path)
