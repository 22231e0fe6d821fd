"""Evaluation on real files: kinds of data, tasks, workers, ranks, mistakes, and the command line."""

import csv
import io
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_files import write_jsonl, write_shard
from helpers import call, call_ranks, retrieval_metrics
from PIL import Image as Picture
from torch import nn
from torch.nn import functional as F

from languagebind.config import UserError, to_dict
from languagebind.eval import DatasetConfig, load_dataset_config
from languagebind.eval.__main__ import main
from languagebind.eval.data.readers import EvalProtocol, Reader
from languagebind.eval.data.samples import read_samples
from languagebind.eval.evaluate import check_dataset, evaluate
from languagebind.eval.features import EncodeOptions, FeatureEncoder
from languagebind.eval.results import results_table, write_result
from languagebind.eval.score.statistics import settings
from languagebind.hub.checkpoint import checkpoint_name
from languagebind.modalities import DecodeError, Modality
from languagebind.modalities.image import Image

REPO = Path(__file__).parents[1]
COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "cyan": (0, 1, 1),
    "pink": (1, 0, 1),
}
IMAGE = Image(image_size=8)
SHORT = ["dataset", "model", "pretrained", "task", "metrics", "language", "protocol"]


class ColourModel(nn.Module):
    """Knows colours: a picture is its mean colour, a text the mean of the colours that it names."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.words = ["", *COLOURS]
        self.register_buffer("table", torch.tensor([(0.5, 0.5, 0.5), *COLOURS.values()]) - 0.5)

    def encode(self, inputs):
        return F.normalize(inputs.mean(dim=(2, 3, 4)) * 0.27 - 0.05, dim=-1)

    def tokenize(self, texts):
        ids = [[self.words.index(w) if w in self.words else 0 for w in text.strip(".").split()] for text in texts]
        length = max(map(len, ids))
        return {"ids": torch.tensor([row + [0] * (length - len(row)) for row in ids])}

    def encode_text(self, tokens):
        return F.normalize(self.table[tokens["ids"]].sum(dim=1) + 1e-3, dim=-1)

    def text_fingerprint(self):
        return "colours"


@dataclass(frozen=True)
class Frames(Modality):
    """Three picture files stacked; stands for any modality with frames."""

    extensions = ("png",)
    input_shape = (3, 3, 8, 8)

    def decode(self, source):
        if not isinstance(source, list) or len(source) != 3:
            raise DecodeError(source, "needs three frames")
        return [IMAGE.preprocess(frame) for frame in source]

    def from_memory(self, value):
        return value

    def transform(self, raw, rng=None):
        return torch.cat(raw, dim=1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The same 45 noisy pictures of six colours as class folders, csv, jsonl, our shards and CLIP_benchmark's."""
    root = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    rows = []
    for i in range(45):
        name = list(COLOURS)[i % 6]
        colour = np.clip(np.array(COLOURS[name]) * 0.4 + generator.random(3) * 0.6, 0, 1)
        pixels = np.clip(colour + generator.normal(0, 0.1, (11, 9, 3)), 0, 1)
        path = root / "folders" / name / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Picture.fromarray((pixels * 255).astype(np.uint8)).save(path)
        other = list(COLOURS)[generator.integers(6)]
        captions = [f"{name} and {other}", f"so {name}"]
        rows.append({"path": f"folders/{name}/{i:03d}.png", "label": name, "captions": captions})
    (root / "folders" / ".hidden").mkdir()
    (root / "folders" / "red" / ".DS_Store").write_bytes(b"x")
    with (root / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "captions"])
        writer.writeheader()
        writer.writerows(row | {"captions": "|".join(row["captions"])} for row in rows)
    write_jsonl(root / "data.jsonl", rows)
    for number, part in enumerate((rows[:20], rows[20:])):
        ours = [(f"{i:03d}", {"png": root / row["path"], "json": row}) for i, row in enumerate(part)]
        write_shard(root / "ours" / f"{number}.tar", ours)
        texts = [{"cls": list(COLOURS).index(row["label"]), "txt": "\n".join(row["captions"])} for row in part]
        theirs = [(f"s{i}", {"png": root / row["path"]} | texts[i]) for i, row in enumerate(part)]
        write_shard(root / "theirs" / f"{number}.tar", theirs)
    return root


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def dataset(data, task="classification", **options):
    names = {} if task == "retrieval" else {"class_names": {name: name for name in COLOURS}}
    return DatasetConfig(name="colours", task=task, data=str(data), **(names | options))


def run(data, task="classification", modality=IMAGE, model=None, workers=0, **options):
    own = ("batch_size", "skip_bad", "precision", "statistics", "dual_softmax")
    encoding = {key: options.pop(key) for key in own if key in options}
    return evaluate(model or ColourModel(), modality, dataset(data, task, **options), workers=workers, **encoding)


def encoder(model, similarity="cosine", **options):
    return FeatureEncoder(model, EvalProtocol("ours", Reader(IMAGE), similarity), EncodeOptions(**options))


# ---------------------------------------------------------------------------------------------- kinds of data


@pytest.mark.parametrize("data", ["data.csv", "data.jsonl", "ours", "ours/{0..1}.tar", "theirs"])
def test_every_kind_of_data_gives_the_same_classification(world, data):
    expected = run(world / "folders")["metrics"]
    # Not trivial: neither always right nor at chance.
    assert 0.3 < expected["top1"] < 1
    assert expected["chance"] == 1 / 6
    assert expected["top5"] > expected["top1"]
    found = run(world / data)["metrics"]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("data", ["data.csv", "ours", "theirs"])
def test_every_kind_of_data_gives_the_same_retrieval(world, data):
    assert run(world / data, "retrieval")["metrics"] == run(world / "data.jsonl", "retrieval")["metrics"]


def test_class_folders_name_their_classes(world, tmp_path, caplog):
    (tmp_path / "traffic_red").symlink_to(world / "folders" / "red")
    (tmp_path / "a_blue").symlink_to(world / "folders" / "blue")
    result = run(tmp_path, class_names=None, templates=("one {c} thing",))
    assert result["metrics"]["top1"] > 0.5
    assert result["protocol"]["classes"] == 2
    assert "top5" not in result["metrics"]
    assert "colours: found 2 classes, but the dataset has 3" not in caplog.text
    run(tmp_path, class_names=None, expect={"classes": 3})
    assert "colours: found 2 classes, but the dataset has 3" in caplog.text, "fewer folders are an easier task"
    # Prompts are the sorted folder names, with spaces.
    same = run(tmp_path, class_names={"a_blue": "a blue", "traffic_red": "traffic red"}, templates=("one {c} thing",))
    assert same == result


def test_paths_of_a_manifest_start_at_its_folder_or_at_the_data_root(world, tmp_path):
    manifest = tmp_path / "data.csv"
    manifest.write_bytes((world / "data.csv").read_bytes())
    assert run(manifest, data_root=str(world))["metrics"] == run(world / "data.csv")["metrics"]


def test_rows_of_the_same_path_are_one_sample(world, tmp_path):
    rows = read_jsonl(world / "data.jsonl")
    single = [{"path": row["path"], "caption": caption} for row in rows for caption in row["captions"]]
    found = run(write_jsonl(tmp_path / "data.jsonl", single), "retrieval", data_root=str(world))
    assert found["metrics"] == run(world / "data.jsonl", "retrieval")["metrics"]
    assert found["protocol"]["captions"] == 90
    assert found["protocol"]["captions_per_sample"] == [2, 2]


def test_frames_of_a_shard(world, tmp_path):
    pictures = [
        world / "folders" / name / file
        for name, file in (("red", "000.png"), ("green", "001.png"), ("blue", "002.png"))
    ]
    # Out of order, and 10 after 9: sorted by number.
    members = {"10.png": pictures[2], "2.png": pictures[0], "9.png": pictures[1], "json": {"label": "green"}}
    shard = write_shard(tmp_path / "frames.tar", [("a/b", members)])
    (sample,) = read_samples(dataset(shard), IMAGE)
    assert torch.equal(IMAGE.preprocess(sample.load(1)), IMAGE.preprocess(pictures[1]))  # the middle one
    frames = Frames()
    expected = torch.cat([IMAGE.preprocess(picture) for picture in pictures], dim=1)
    assert torch.equal(frames.preprocess(sample.load(3)), expected)
    assert run(shard, modality=frames)["protocol"]["frames"] == 3
    # A manifest may list frames too.
    manifest = write_jsonl(
        tmp_path / "frames.jsonl", [{"path": [str(picture) for picture in pictures], "label": "green"}]
    )
    (listed,) = read_samples(dataset(manifest), frames)
    assert torch.equal(frames.preprocess(listed.load(3)), expected)
    lists = [[str(pictures[0]), str(picture)] for picture in pictures]
    rows = [{"path": paths, "label": "green"} for paths in [*lists, lists[0]]]
    assert len(read_samples(dataset(write_jsonl(tmp_path / "b.jsonl", rows)), frames)) == 3, (
        "one first frame, three clips"
    )


def test_multilabel_needs_a_label_among_what_can_be_read(world, tmp_path):
    good = str(next((world / "folders").rglob("*.png")))
    rows = [{"path": good, "labels": []}, {"path": "gone.png", "labels": ["red"]}]
    with pytest.raises(UserError, match="none of the readable samples has a label"):
        run(write_jsonl(tmp_path / "data.jsonl", rows), "multilabel", skip_bad=True)


def test_multilabel_from_every_kind_of_label(world, tmp_path):
    paths = sorted((world / "folders").rglob("0*.png"))[:12]
    labels = [["red"], ["red", "blue"], [], ["blue", "yellow"]] * 3
    rows = [{"path": str(path), "labels": names} for path, names in zip(paths, labels, strict=True)]
    expected = run(write_jsonl(tmp_path / "data.jsonl", rows), "multilabel")
    assert set(expected["metrics"]) == {"mAP", "mAUC", "d_prime"}
    assert expected["protocol"]["classes_with_samples"] == 3
    with (tmp_path / "data.csv").open("w") as file:
        file.write("path,labels\n" + "".join(f"{row['path']},{'|'.join(row['labels'])}\n" for row in rows))
    assert run(tmp_path / "data.csv", "multilabel")["metrics"] == expected["metrics"]
    shard = []
    for i, (path, names) in enumerate(zip(paths, labels, strict=True)):
        buffer = io.BytesIO()
        np.save(buffer, np.array([name in names for name in COLOURS], dtype=np.int64))
        shard.append((f"{i}", {"png": path, "npy": buffer.getvalue()}))
    write_shard(tmp_path / "data.tar", shard)
    assert run(tmp_path / "data.tar", "multilabel")["metrics"] == expected["metrics"]


def test_caption_sources_are_chosen_not_guessed(world, tmp_path):
    picture = world / "folders" / "red" / "000.png"
    captions = {"raw": "red", "ofa": ["blue", "green"]}
    shard = write_shard(tmp_path / "a.tar", [("0", {"png": picture, "json": {"captions": captions}})])
    with pytest.raises(UserError, match="captions from raw, ofa: choose one with caption_source"):
        run(shard, "retrieval")
    assert run(shard, "retrieval", caption_source="raw")["protocol"]["captions"] == 1
    assert run(shard, "retrieval", caption_source="ofa")["protocol"]["captions"] == 2
    with pytest.raises(UserError, match="has 0 captions"):
        run(shard, "retrieval", caption_source="polish")
    row = {"path": str(picture), "caption": "pink", "captions": {"ofa": ["blue", "green"]}}
    manifest = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match="captions from caption, ofa: choose one with caption_source"):
        run(manifest, "retrieval")
    for source, expected in (("caption", ("pink",)), ("ofa", ("blue", "green"))):
        (sample,) = read_samples(dataset(manifest, "retrieval", caption_source=source), IMAGE)
        assert sample.captions == expected


def test_limit_is_spread_over_the_data(world):
    samples = read_samples(dataset(world / "folders", limit=6), IMAGE)
    assert sorted(sample.labels[0] for sample in samples) == sorted(COLOURS)
    assert run(world / "folders", limit=6)["protocol"]["samples"] == 6


# ---------------------------------------------------------------------------------------------- results


def test_retrieval_matches_the_metric_on_the_whole_matrix(world, monkeypatch):
    config = dataset(world / "data.jsonl", "retrieval")
    samples = read_samples(config, IMAGE)
    model = ColourModel()
    features, kept = encoder(model, workers=0).encode_samples(samples)
    captions = [caption for sample in samples for caption in sample.captions]
    with torch.no_grad():
        # One at a time: what a text's features are must not depend on its neighbours.
        texts = torch.cat([model.encode_text(model.tokenize([caption])) for caption in captions])
    owners = torch.arange(len(samples)).repeat_interleave(2)
    relevant = owners[:, None] == torch.arange(len(samples))
    expected = {f"text_to_modality/{k}": v for k, v in retrieval_metrics(texts @ features.T, relevant).items()}
    scores = (features @ texts.unique(dim=0).T)[:, texts.unique(dim=0, return_inverse=True)[1]]
    expected |= {f"modality_to_text/{k}": v for k, v in retrieval_metrics(scores, relevant.T).items()}
    assert kept == list(range(45))
    result = run(world / "data.jsonl", "retrieval")
    assert result["metrics"] == pytest.approx(expected)
    # Row by row instead of all at once changes nothing but the memory.
    monkeypatch.setattr("languagebind.eval.score.retrieval.SCORES_AT_A_TIME", 100)
    assert run(world / "data.jsonl", "retrieval")["metrics"] == pytest.approx(expected)


def test_a_caption_of_two_samples_counts_against_both(world, tmp_path):
    paths = [str(world / "folders" / name) for name in ("red/000.png", "blue/002.png")]
    shared = [{"path": path, "caption": "so red"} for path in paths]
    result = run(write_jsonl(tmp_path / "data.jsonl", shared), "retrieval")
    # From a sample the two captions tie; from a caption one of the two samples is right.
    assert result["metrics"]["modality_to_text/R@1"] == 0.0
    assert result["metrics"]["text_to_modality/R@1"] == 0.5
    assert result["protocol"]["captions_of_several_samples"] == 2


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_the_same_bits_each_time_and_with_any_number_of_workers(world, task):
    state = torch.get_rng_state()
    first = run(world / "ours", task)
    assert all(run(world / "ours", task, workers=workers) == first for workers in (0, 1, 2))
    samples = read_samples(dataset(world / "ours"), IMAGE)
    features = [encoder(ColourModel(), workers=n).encode_samples(samples)[0] for n in (0, 2)]
    assert torch.equal(*features)
    assert torch.equal(torch.get_rng_state(), state), "an evaluation in the middle of training must not change it"


def test_result_does_not_depend_on_the_batch_size(world, tiny):
    model, _ = tiny
    samples = read_samples(dataset(world / "folders"), IMAGE)
    one, many = (encoder(model, batch_size=size, workers=0).encode_samples(samples)[0] for size in (1, 64))
    assert torch.allclose(one, many, atol=1e-5)
    for precision in ("amp", "amp_bf16"):
        half, _ = encoder(model, precision=precision, workers=0).encode_samples(samples)
        assert half.dtype == torch.float32
        assert torch.allclose(half.norm(dim=1), torch.ones(45), atol=1e-6)
        assert not torch.equal(half, many)
        assert torch.allclose(half, many, atol=0.05)


def test_the_model_keeps_its_mode(world):
    model = ColourModel().train()
    run(world / "folders", model=model)
    assert model.training


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_a_dataset_is_listed_once_for_several_evaluations(world, tmp_path, task):
    manifest = write_jsonl(tmp_path / "data.jsonl", read_jsonl(world / "data.jsonl"))
    config = dataset(manifest, task, data_root=str(world))
    expected = evaluate(ColourModel(), IMAGE, config, workers=0)
    listed = check_dataset(config, IMAGE)
    manifest.unlink()
    assert [evaluate(ColourModel(), IMAGE, listed, workers=0) for _ in range(2)] == [expected, expected]


def test_result_is_json_with_the_protocol(world, tmp_path):
    result = run(world / "folders", templates=("a {c}", "the {c}"), split="val")
    assert list(result) == [
        *SHORT,
        "statistics",
        "intervals",
        "ties",
        "classes",
        "confusion",
        "calibration",
        "examples",
    ]
    assert result["statistics"] == settings()
    assert set(result["intervals"]) == set(result["metrics"]) - {"chance"}
    assert sum(count for *_, count in result["confusion"]) == 45
    rights = sum(count for true, predicted, count in result["confusion"] if true == predicted)
    assert rights / 45 == result["metrics"]["top1"]
    example = result["examples"]["worst"][0]
    assert example["source"] == [str(world / "folders" / example["key"])]
    assert example["key"].split("/")[0] == example["text"] != example["found"]
    short = run(world / "folders", templates=("a {c}", "the {c}"), split="val", statistics=False)
    assert short == {key: result[key] for key in SHORT}
    protocol = result["protocol"]
    assert (protocol["split"], protocol["samples"], protocol["classes"]) == ("val", 45, 6)
    assert (protocol["templates"], protocol["prompts"], protocol["similarity"]) == (["a {c}", "the {c}"], 12, "cosine")
    assert (protocol["frames"], protocol["text_fingerprint"], protocol["skipped_samples"]) == (1, "colours", 0)
    write_result(result, tmp_path / "new" / "a.json")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == result
    write_result(result | {"metrics": {"d_prime": float("inf")}}, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["metrics"] == {"d_prime": None}
    lines = results_table([result]).splitlines()
    assert lines[0].split() == ["dataset", "task", "samples", "metric", "value", "95", "%", "interval", "chance"]
    top1, (low, high) = f"{result['metrics']['top1']:.4f}", result["intervals"]["top1"]
    assert low < result["metrics"]["top1"] < high
    interval = [f"{low:.4f}", "to", f"{high:.4f}"]
    assert lines[1].split() == ["colours", "classification", "45", "top1", top1, *interval, "0.1667"]
    assert len(results_table([short]).splitlines()) == len(lines)


def test_the_data_is_identified_wherever_it_lies(world, tmp_path):
    (tmp_path / "elsewhere").symlink_to(world / "folders")
    digest = run(world / "folders")["protocol"]["data_sha256"]
    assert run(tmp_path / "elsewhere")["protocol"]["data_sha256"] == digest
    assert run(world / "folders", limit=40)["protocol"]["data_sha256"] != digest


def test_nan_of_the_model_is_an_error(world):
    model = ColourModel()
    model.table.fill_(torch.nan)
    with pytest.raises(UserError, match="returns NaN or infinity for 6 of 6 inputs, first for 'red'"):
        run(world / "folders", model=model)


def test_features_that_overflow_are_an_error_where_no_norm_tells():
    model = ColourModel()
    model.project_text = lambda tokens: model.table[tokens["ids"]].sum(dim=1) * math.inf
    with pytest.raises(UserError, match="NaN or infinity for 1 of 1 inputs, first for 'red'"):
        encoder(model, "dot").encode_texts(["red"])


# ---------------------------------------------------------------------------------------------- bad samples


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_stop_the_run_or_are_counted(world, tmp_path, workers, caplog):
    rows = read_jsonl(world / "data.jsonl")
    cut = tmp_path / "cut.png"
    cut.write_bytes((world / rows[0]["path"]).read_bytes()[:60])
    bad = [row | {"path": path} for row, path in ((rows[0], str(cut)), (rows[1], "missing.png"))]
    manifest = write_jsonl(tmp_path / "data.jsonl", [rows[2], *bad, *rows[3:]])
    for task in ("classification", "retrieval"):
        with pytest.raises(
            UserError, match=r"(?s)2 of 45 samples cannot be read.*cut.png: .*missing.png: No such file"
        ):
            run(manifest, task, workers=workers, data_root=str(world))
        with caplog.at_level(logging.WARNING):
            found = run(manifest, task, workers=workers, data_root=str(world), skip_bad=True, batch_size=4)
        assert "2 of 45 samples cannot be read; the result leaves them out" in caplog.text
        assert (found["protocol"]["samples"], found["protocol"]["skipped_samples"]) == (43, 2)
        rest = run(write_jsonl(tmp_path / "rest.jsonl", rows[2:]), task, data_root=str(world))
        assert found["metrics"] == pytest.approx(rest["metrics"])


def test_a_sample_without_media_is_bad_and_all_bad_is_an_error(world, tmp_path):
    shard = write_shard(tmp_path / "a.tar", [("0", {"json": {"label": "red"}})])
    with pytest.raises(
        UserError, match=r"a.tar/0: the sample holds no file that this modality reads; it holds caption"
    ):
        run(shard)
    with pytest.raises(UserError, match="1 of 1 samples cannot be read"):
        run(shard, skip_bad=True)


# ---------------------------------------------------------------------------------------------- ranks


def _rank(rank, address, folder, cases, world_size):
    address = f"file://{address}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    results = [run(data, task, **options) for data, task, options in cases]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def nearly(value):
    """The same JSON, with numbers that may differ in the last bits, as batches are others on other ranks."""
    if isinstance(value, dict):
        return {key: nearly(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nearly(item) for item in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_result_of_one(world, tmp_path, world_size):
    rows = read_jsonl(world / "data.jsonl")
    with_bad = write_jsonl(tmp_path / "bad.jsonl", [rows[0] | {"path": "none.png"}, *rows[1:]])
    alone = write_jsonl(tmp_path / "alone.jsonl", [rows[0] | {"captions": ["so red"]}])
    cases = [
        (str(world / "ours"), "classification", {"batch_size": 7}),
        (str(world / "ours"), "multilabel", {"batch_size": 7}),
        (str(world / "ours"), "retrieval", {"batch_size": 7, "dual_softmax": True}),
        (str(with_bad), "retrieval", {"skip_bad": True, "data_root": str(world)}),
        (str(alone), "retrieval", {"data_root": str(world)}),  # nothing for the other ranks
    ]
    args = str(tmp_path / "rendezvous"), str(tmp_path), cases, world_size
    torch.multiprocessing.spawn(_rank, args, nprocs=world_size)
    first, *others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size))
    assert all(other == first for other in others)
    for found, (data, task, options) in zip(first, cases, strict=True):
        expected = run(data, task, **options)
        assert found == nearly(expected)
        assert expected["intervals"].keys() == expected["metrics"].keys() - {"chance"}


# ---------------------------------------------------------------------------------------------- configs


def test_text_files_and_lists(tmp_path):
    (tmp_path / "names.txt").write_text("light\ttraffic light\n\ncar\n")
    (tmp_path / "prompts.txt").write_text("a {c}.\nthe {c}.\n")
    (tmp_path / "a.yaml").write_text(
        "task: classification\ndata: x\nclass_names: names.txt\ntemplates: prompts.txt\nlimit: 5\n"
    )
    config = load_dataset_config(tmp_path / "a.yaml")
    assert config.class_names == {"light": "traffic light", "car": "car"}
    assert config.templates == ("a {c}.", "the {c}.")
    assert (config.name, config.data, config.limit) == ("a", str(tmp_path / "x"), 5)
    (tmp_path / "b.yaml").write_text('name: c\ntask: multilabel\ndata: x\nclass_names: [dog, "no"]\ntemplates: a {c}\n')
    config = load_dataset_config(tmp_path / "b.yaml", tmp_path / "root")
    assert config.class_names == {"dog": "dog", "no": "no"}
    assert config.templates == ("a {c}",)
    assert (config.name, config.data) == ("c", str(tmp_path / "root" / "x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: classification\ndata: x\ntemplats: a {c}\n", "unknown key 'templats', did you mean 'templates'"),
        ("data: x\n", "task is missing"),
        ("task: sorting\ndata: x\n", "task should be 'classification', .* or 'segmentation', not 'sorting'"),
        (
            "task: classification\ndata: x\ntemplates: [a photo]\n",
            "templates.0 should be a prompt with {c} .*, not 'a photo'",
        ),
        ("task: classification\ndata: x\ntemplates: none.txt\n", "no such file: .*none.txt"),
        ("task: classification\ndata: x\nclass_names: none.txt\n", "none.txt does not exist"),
        ("task: classification\ndata: x\nclass_names: [a, b, a]\n", "class_names: 'a' is listed twice"),
        (
            "task: classification\ndata: x\nclass_names: [yes, b]\n",
            "class_names: .True, .* only text: put yes, no and null in quotes",
        ),
        ("task: classification\ndata: x\nclass_names: []\n", "class_names: .* at least 1 item"),
        ("task: classification\ndata: [x]\n", "data should be text"),
        ("task: classification\ndata: x\nlimit: few\n", "limit should be a whole number, not 'few'"),
        ("task: classification\ndata: x\nlimit: 0\n", "limit should be at least 1"),
        ("task: classification\ndata: x\nname: a/b\n", "name should be a file name"),
    ],
)
def test_mistakes_in_a_config(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_dataset_config(tmp_path / "a.yaml")


# ---------------------------------------------------------------------------------------------- mistakes in the data


@pytest.mark.parametrize(
    ("name", "text", "task", "message"),
    [
        (
            "a.jsonl",
            '{"path": "x.png", "label": "rde"}\n',
            "classification",
            "label 'rde' of x.png .*did you mean 'red'",
        ),
        ("a.jsonl", '{"path": "x.png", "label": 6}\n', "classification", "the label 6 of x.png is not in class_names"),
        ("a.jsonl", '{"path": "x.png", "labels": ["red", "blue"]}\n', "classification", "x.png has 2 labels"),
        ("a.jsonl", '{"path": "x.png"}\n', "classification", "x.png has 0 labels"),
        ("a.jsonl", '{"path": "x.png", "label": 1.5}\n', "classification", "a.jsonl:1: labels should be text"),
        ("a.jsonl", '{"path": "x.png"}\n', "retrieval", "x.png has 0 captions"),
        (
            "a.jsonl",
            '{"path": "x", "caption": "a"}\n{"path": "y", "caption": " "}\n',
            "retrieval",
            "1 of 2 samples do not fit retrieval: y has 0 captions; --skip-bad leaves them out",
        ),
        ("a.jsonl", '{"path": "x", "caption": 3}\n', "retrieval", "captions should be text"),
        ("a.jsonl", '{"label": "red"}\n', "classification", "a.jsonl:1: a row needs a path"),
        ("a.jsonl", "{path}\n", "classification", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", "[1]\n", "classification", "a.jsonl:1: a row needs a path"),
        ("a.jsonl", "", "classification", "no samples"),
        ("a.csv", "file,label\nx.png,red\n", "classification", "a.csv:2: a row needs a path"),
        ("a.csv", "path,label\n", "classification", "no samples"),
        ("a.txt", "x", "classification", "is not a .csv or .jsonl manifest"),
        ("a.tar", "no tar", "classification", "cannot be read as a tar file"),
    ],
)
def test_mistakes_in_the_data(tmp_path, name, text, task, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        run(tmp_path / name, task)


def test_a_number_that_means_two_classes_is_refused(world, tmp_path):
    # As in COCO, whose categories are numbered from 1: the index 1 is the second of them
    names = {str(k): name for k, name in enumerate(COLOURS, 1)}
    picture = str(world / "folders" / "red" / "000.png")
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"path": picture, "label": 1}])
    with pytest.raises(UserError, match=r"the label 1 of .* index of one class and the label of another"):
        run(wrong, class_names=names)
    text = write_jsonl(tmp_path / "text.jsonl", [{"path": picture, "label": "1"}])
    assert run(text, class_names=names)["classes"][0]["samples"] == 1
    index = run(wrong, class_names={"0": "blue", "1": "red"})  # where both are the same
    assert index["classes"][1]["samples"] == 1


def test_mistakes_in_folders_and_shards(world, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a \.csv or \.jsonl manifest"):
        run(tmp_path)
    with pytest.raises(UserError, match=r"no such shard or folder: .*/2.tar"):
        run(world / "ours" / "{1..2}.tar")
    with pytest.raises(UserError, match="class_names is needed"):
        run(world / "ours", class_names=None)
    with pytest.raises(UserError, match="45 of 45 samples do not fit retrieval"):
        run(world / "folders", "retrieval")
    picture = world / "folders" / "red" / "000.png"
    for member, message in (
        ({"json": b"{"}, "cannot read the labels and captions of k"),
        ({"cls": "red"}, "cannot read the labels and captions of k"),
        ({"npy": b"junk"}, "cannot read the labels and captions of k"),
    ):
        write_shard(tmp_path / "a.tar", [("k", {"png": picture} | member)])
        with pytest.raises(UserError, match=message):
            run(tmp_path / "a.tar")
    whole = write_shard(tmp_path / "whole.tar", [("k", {"json": {"label": "red"}, "png": picture})])
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:1600])
    with pytest.raises(UserError, match=r"cut.tar"):
        run(tmp_path / "cut.tar")


# ---------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A real model of random weights, and its checkpoint."""
    import open_clip

    from languagebind.model import DualEncoder, EncoderConfig, InitConfig, ModelConfig, TextConfig
    from languagebind.text import build_text

    folder = tmp_path_factory.mktemp("tiny")
    sizes = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    tower = open_clip.CLIP(**sizes)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": {}}))
    torch.save(tower.state_dict(), folder / "open_clip_pytorch_model.bin")
    encoder = EncoderConfig(patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32)
    config = ModelConfig(encoder, TextConfig(f"local-dir:{folder}"), init=InitConfig("none"))
    model = DualEncoder(IMAGE.input_shape, config.encoder, build_text(config.text)).eval()
    path = folder / "run" / "checkpoints" / "epoch_1.pt"
    path.parent.mkdir(parents=True)
    saved = {
        "model": model.encoder_state(),
        "config": {"model": to_dict(config), "modality": "image", "inputs": to_dict(IMAGE)},
        "text_fingerprint": model.text_fingerprint(),
    }
    torch.save(saved, path)
    return model, path


@pytest.fixture
def configs(world, tmp_path):
    (tmp_path / "first.yaml").write_text("task: classification\ndata: folders\ntemplates: a {c}\n")
    (tmp_path / "second.yaml").write_text("task: retrieval\ndata: data.jsonl\n")
    return tmp_path


def flags(world, checkpoint, folder, *names):
    words = [
        "--checkpoint",
        str(checkpoint),
        "--data-root",
        str(world),
        "--output",
        str(folder / "results"),
        "--workers",
        "0",
    ]
    return words + [word for name in names for word in ("--config", str(folder / name))]


def test_command_line(world, tiny, configs, capsys, monkeypatch):
    model, checkpoint = tiny
    argv = flags(world, checkpoint, configs, "first.yaml", "second.yaml")
    main([*argv, "--device", "cpu", "--dual-softmax"])
    out = capsys.readouterr().out
    assert "first" in out
    for metric in ("text_to_modality/R@1", "dual_softmax/modality_to_text/mean_rank"):
        (line,) = (line.split() for line in out.splitlines() if f" {metric} " in line)
        assert line[6] == "to"
        assert float(line[5]) <= float(line[4]) <= float(line[7])
    path = configs / "results" / "first_run-epoch_1.json"
    result = json.loads(path.read_text())
    assert result["pretrained"] == "run-epoch_1"
    assert result["model"] == "image"
    config = load_dataset_config(configs / "first.yaml", world)
    assert len(result["weights_sha256"]) == 64
    assert Path(result["checkpoint"]).samefile(checkpoint)
    plain = evaluate(model, IMAGE, config, workers=2) | {"pretrained": "run-epoch_1"}
    assert {key: result[key] for key in plain} == plain
    # A result is never lost: neither twice by chance, nor when one is there already.
    before = path.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"first_run-epoch_1.json exists: --overwrite replaces it"):
        main(argv)
    main([*argv, "--skip-existing"])
    assert path.stat().st_mtime_ns == before
    main([*argv, "--overwrite", "--device", "cpu"])
    assert path.stat().st_mtime_ns > before
    again = json.loads(path.read_text())
    assert again.pop("asked") != result.pop("asked"), "without the dual softmax, which is of retrieval"
    assert again == result


def test_two_ranks_give_the_result_of_one_process(world, tiny, configs):
    argv = [*flags(world, tiny[1], configs, "second.yaml"), "--device", "cpu"]
    output = call_ranks(2, "-m", "languagebind.eval", *argv)
    assert output.count("text_to_modality/R@1 ") == 1, "one rank reports"
    assert output.count("retrieval on 45 samples") == 1, "and one logs"
    found = json.loads((configs / "results" / "second_run-epoch_1.json").read_text())
    expected = evaluate(tiny[0], IMAGE, load_dataset_config(configs / "second.yaml", world), workers=0)
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)


def test_mistakes_on_the_command_line(world, tiny, configs, capsys):
    checkpoint = tiny[1]
    cases = [
        (flags(world, checkpoint, configs), "no datasets: name some with --config"),
        (flags(world, checkpoint, configs, "none.yaml"), "no dataset .*none.yaml.; pass a file or one of"),
        (
            flags(world, checkpoint, configs, "first.yaml", "first.yaml"),
            "two results would be .*first_run",
        ),
        (flags(configs, checkpoint, configs, "first.yaml"), "folders does not exist"),
        (flags(world, configs / "none.pt", configs, "first.yaml"), "no checkpoint at .*none.pt"),
        ([*flags(world, checkpoint, configs, "first.yaml"), "--overwrite", "--skip-existing"], "not both"),
        ([*flags(world, checkpoint, configs, "first.yaml"), "--device", "gpu"], "--device gpu"),
        ([*flags(world, checkpoint, configs, "first.yaml"), "--device", "meta"], "--device meta cannot be used here"),
        ([*flags(world, checkpoint, configs), "--config"], "--config needs a value"),
    ]
    for argv, message in cases:
        with pytest.raises(UserError, match=message):
            main(argv)
    for wrong, message in ((("--batchsize", "3"), "--batch-size"), (("--batch-size", "0"), "at least 1")):
        with pytest.raises(SystemExit) as stop:
            main([*flags(world, checkpoint, configs, "first.yaml"), *wrong])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not any((configs / "results").iterdir())


def test_a_mistake_is_one_line_and_status_2(world, configs):
    output = call("-m", "languagebind.eval", *flags(world, "none.pt", configs, "first.yaml"), status=2)
    assert output.splitlines()[-1] == "error: no checkpoint at none.pt"
    assert "Traceback" not in output


def test_names_of_checkpoints(tmp_path):
    (tmp_path / "logs/depth/checkpoints").mkdir(parents=True)
    file = tmp_path / "logs/depth/checkpoints/step_0.5.pt"
    file.touch()
    assert checkpoint_name(str(file)) == "depth-step_0.5"
    assert checkpoint_name("org/Model_V1.5_FT") == "Model_V1.5_FT"


def test_options_that_make_no_sense():
    with pytest.raises(UserError, match="workers should be a number of at least 0"):
        EncodeOptions(workers=-1)
    with pytest.raises(UserError, match="amp_bf16, amp, fp32, not fp8"):
        EncodeOptions(precision="fp8")


def test_captions_of_several_samples_bound_recall_and_are_said(world, tmp_path, caplog):
    files = sorted(path for path in world.rglob("*.png"))[:10]
    texts = ["a"] * 4 + [f"caption {i}" for i in range(6)]
    rows = [{"path": str(path), "caption": text} for path, text in zip(files, texts, strict=True)]
    manifest = write_jsonl(tmp_path / "data.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        own = run(manifest, "retrieval")
    assert "4 of 10 captions belong to several samples: R@1 cannot exceed 0.70 / 0.60" in caplog.text
    assert own["protocol"]["ceiling"]["text_to_modality/R@1"] == 0.7
    assert own["protocol"]["split"] is None  # none was named
    caplog.clear()
    twins = run(manifest, "retrieval", relevant="caption")
    assert "ceiling" not in twins["protocol"]
    assert "cannot exceed" not in caplog.text
    assert twins["protocol"]["relevance"] == "a caption is relevant to every sample that has it"
    assert twins["metrics"]["modality_to_text/R@5"] >= own["metrics"]["modality_to_text/R@5"]
    # Four equal captions of ten: a random one of ten is right for 4 of the 10 queries with probability 0.4
    assert twins["protocol"]["chance"]["text_to_modality/R@1"] == pytest.approx((4 * 0.4 + 6 * 0.1) / 10)
