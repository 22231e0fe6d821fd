"""Segmentation: against scikit-learn's confusion matrix and plain loops, from files to a result and its page."""

import base64
import io
import json
import re

import colours
import numpy as np
import pytest
import torch
from eval_datasets import InstantModel
from helpers import call
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix
from torch.nn import functional as F

from languagebind.config import UserError
from languagebind.eval import evaluate, load_dataset_config
from languagebind.eval.data.samples import Sample
from languagebind.eval.models import ExternalModel
from languagebind.eval.probe import main as probe
from languagebind.eval.report.__main__ import main as page_main
from languagebind.eval.results import results_table, write_result
from languagebind.eval.score.segmentation import (
    PICTURES,
    count_pixels,
    describe_segmentation,
    pick_pictures,
    score_segmentation,
    take_maps,
)
from languagebind.modalities.image import Image as ImageModality

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
IMAGE = ImageModality(image_size=32)


class Colours(InstantModel):
    """Knows where colours are: a patch of 4 x 4 is its mean colour, a text the colour that it names."""

    def encode_dense(self, inputs, mode="qq"):
        mean, std = (torch.tensor(x)[:, None, None, None] for x in (IMAGE.image_mean, IMAGE.image_std))
        patches = F.avg_pool3d(inputs * std + mean, (1, 4, 4))  # (B, 3, T, h, w)
        return F.normalize(patches.permute(0, 2, 3, 4, 1), dim=-1)

    def tokenize(self, texts):
        return {"ids": torch.tensor([COLOURS[text.split()[-1]] for text in texts])}

    def encode_text(self, tokens):
        return F.normalize(tokens["ids"].float(), dim=-1)


def test_metrics_are_those_of_the_confusion_matrix():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.random((6, 5, 9, 7)))
    masks = torch.from_numpy(rng.choice([0, 1, 2, 4, 200], (6, 9, 7), p=[0.4, 0.2, 0.1, 0.1, 0.2]))
    scores[:, 3] -= 9  # class 3 is neither there nor predicted
    masks[0] = 1  # of one class
    counts = torch.stack([count_pixels(*pair, void=200) for pair in zip(scores, masks, strict=True)])
    found = score_segmentation(counts)
    known = masks != 200
    true, predicted = masks[known].numpy(), scores.argmax(dim=1)[known].numpy()
    matrix = confusion_matrix(true, predicted, labels=range(5))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    iou = [matrix[k, k] / union[k] for k in (0, 1, 2, 4)]
    hits, areas = [], []
    for each, mask in zip(scores.numpy(), masks.numpy(), strict=True):
        for k in sorted({*mask.flat} - {200}):
            contrast = each[k] - each.mean(axis=0)
            hits.append(mask[np.unravel_index(contrast.argmax(), contrast.shape)] == k)
            areas.append((mask == k).mean())
    wanted = {"mIoU": np.mean(iou), "pixel_accuracy": accuracy_score(true, predicted), "pointing": np.mean(hits)}
    assert found["metrics"] == pytest.approx(wanted)
    assert found["protocol"]["chance"] == pytest.approx({"pixel_accuracy": 0.2, "pointing": np.mean(areas)})
    assert (found["protocol"]["classes"], found["protocol"]["classes_with_samples"]) == (5, 4)
    details = describe_segmentation(counts, {f"c{k}": f"class {k}" for k in range(5)})
    assert [row["IoU"] for row in details["classes"]] == [*map(pytest.approx, iou[:3]), None, pytest.approx(iou[3])]
    assert details["classes"][1]["samples"] == sum(bool((mask == 1).any()) for mask in masks)
    for key, (low, high) in details["intervals"].items():
        assert low <= wanted[key] <= high
    # By the same draws, one at a time
    draws = np.random.default_rng(0).integers(6, size=(1000, 6))
    shares = [float((lambda s: s[0].sum() / s[2].sum())(counts[list(draw)].sum(0))) for draw in draws]
    assert details["intervals"]["pixel_accuracy"] == pytest.approx([sorted(shares)[25], sorted(shares)[-26]])


def test_pointing_at_equal_pixels_counts_only_if_all_are_right():
    scores, mask = torch.zeros(2, 1, 4), torch.tensor([[0, 0, 1, 7]])
    assert count_pixels(scores, mask, void=7)[3].tolist() == [0, 0]
    scores[0, 0, :2] = 1
    assert count_pixels(scores, mask, void=7)[3].tolist() == [1, 0]  # class 1 is best where class 0 is not: void too
    assert count_pixels(scores[:1], torch.tensor([[0, 0, 7, 7]]), void=7)[3].tolist() == [1]


@pytest.fixture
def data(tmp_path):
    """Pictures of two halves, of 40 x 60 or turned, a manifest with masks, and the config."""
    rows = []
    for number, (left, right) in enumerate([("red", "green"), ("blue", "red"), ("green", "blue")]):
        pixels, mask = np.zeros((40, 60, 3), np.uint8), np.full((40, 60), 255, np.uint8)
        for name, part in ((left, slice(0, 32)), (right, slice(32, 60))):
            pixels[5:35, part] = COLOURS[name]
            mask[5:35, part] = list(COLOURS).index(name)
        turned = number == 2
        Image.fromarray(pixels.swapaxes(0, 1) if turned else pixels).save(tmp_path / f"{number}.png")
        picture = Image.fromarray(mask.T if turned else mask, mode="P")
        picture.putpalette(bytes(range(255, -1, -1)) * 3)  # the index counts, not the colour
        picture.save(tmp_path / f"{number}_mask.png")
        rows.append({"path": f"{number}.png", "labelled": f"{number}_mask.png"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = "task: segmentation\nmodality: image\ndata: data.jsonl\ncolumns: {mask: labelled}\n"
    (tmp_path / "halves.yaml").write_text(config + "class_names: [red, green, blue]\ntemplates: ['a {c}', '{c}']\n")
    return tmp_path


def run(folder, model=None, modality=IMAGE, **options):
    config = load_dataset_config(folder / "halves.yaml")
    return evaluate(model or Colours(), modality, config, workers=0, **options)


def test_files_to_a_result_and_its_page(data):
    result = run(data)
    assert result["metrics"]["pixel_accuracy"] > 0.93  # but for the blurred border between the halves
    assert result["metrics"]["mIoU"] > 0.87
    assert result["metrics"]["pointing"] == 1
    assert result["intervals"]["pointing"] == pytest.approx([0.025 ** (1 / 3), 1])  # exact, of three hits in three
    assert result["protocol"]["samples"] == 3
    assert result["protocol"]["templates"] == ["a {c}", "{c}"]
    assert "mIoU" in results_table([result])
    (data / "results").mkdir()
    write_result(result | {"pretrained": "colours"}, data / "results" / "halves_colours.json")
    page_main([str(data / "results"), "--output", str(data / "page.html"), "--configs", str(data)])
    page = (data / "page.html").read_text()
    assert "headline metric mIoU" in page
    assert "pointing" in page


def classes_of(example):
    """The predicted and the true classes of an example, (2, h, w)."""
    png = Image.open(io.BytesIO(base64.b64decode(example["maps"])))
    return np.array(png).astype(int).reshape(2, -1, png.width)


def test_a_result_holds_maps_of_the_best_and_the_worst(data):
    result = run(data)
    assert len(json.dumps(result["examples"])) < 10_000
    assert {kind: len(found) for kind, found in result["examples"].items()} == {"best": 2, "worst": 1}
    examples = [example for own in result["examples"].values() for example in own]
    assert sorted(example["key"] for example in examples) == ["0.png", "1.png", "2.png"]
    scores = [example["score"] for example in examples]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] <= 1
    for example in examples:
        predicted, true = classes_of(example)
        mask = np.array(Image.open(data / example["key"].replace(".", "_mask.")))
        rows, columns = (((np.arange(128) + 0.5) * side / 128).astype(int) for side in mask.shape)
        np.testing.assert_array_equal(true, np.where(mask == 255, 0, mask + 1)[np.ix_(rows, columns)])
        assert (predicted == true)[true > 0].mean() > 0.93
        assert predicted.min() > 0  # a model has no void
        assert example["source"] == [str(data / example["key"])]
    assert run(data, statistics=False).keys() == result.keys() - {"statistics", "intervals", "classes", "examples"}


def test_examples_are_picked_by_the_mean_iou_of_a_picture():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.random((20, 4, 6, 8)))
    masks = torch.from_numpy(rng.choice([0, 1, 2, 9], (20, 6, 8)))
    masks[7] = 9  # void alone has no IoU, and is not shown
    masks[3] = scores[3].argmax(dim=0)
    iou = {}
    for n in set(range(20)) - {7}:
        known = masks[n] != 9
        matrix = confusion_matrix(masks[n][known], scores[n].argmax(dim=0)[known], labels=range(4))
        with np.errstate(invalid="ignore"):
            iou[n] = np.nanmean(matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal()))
    counts = torch.stack([count_pixels(*pair, void=9) for pair in zip(scores, masks, strict=True)])
    samples = [Sample(str(n), None) for n in range(20)]
    blank = torch.zeros(2, 3, 4, dtype=torch.long)
    found = pick_pictures(counts, samples, lambda chosen: [blank + int(sample.key) for sample in chosen])
    order = sorted(iou, key=lambda n: -iou[n])
    shown = {kind: [int(example["key"]) for example in own] for kind, own in found.items()}
    assert shown == {"best": order[:PICTURES], "worst": order[: -PICTURES - 1 : -1]}
    assert shown["best"][0] == 3
    for example in found["best"] + found["worst"]:
        assert example["score"] == pytest.approx(iou[int(example["key"])])
        assert (classes_of(example) == int(example["key"])).all()
    few = pick_pictures(counts[:3], samples, lambda chosen: [blank] * len(chosen))
    assert [len(few[kind]) for kind in ("best", "worst")] == [2, 1]  # none twice


def test_many_classes_and_a_void_class_are_kept():
    scores, mask = torch.zeros(1000, 128, 128), torch.full((2, 2), 999)
    scores[700] = 1
    mask[0] = 0
    predicted, true = take_maps(scores, mask, void=0)
    assert (predicted.unique().tolist(), true[:64].unique().tolist(), true[64:].unique().tolist()) == (
        [701],
        [0],
        [1000],
    )


def test_the_page_shows_the_classes_over_the_picture(data):
    (data / "results").mkdir()
    write_result(run(data), data / "results" / "halves.json")

    def shown():
        page_main([str(data / "results"), "--output", str(data / "page.html"), "--configs", str(data)])
        page = (data / "page.html").read_text()
        images = re.findall(r'src="data:image/jpeg;base64,([^"]*)" alt="Sample ([^"]*)"', page)
        return page, {alt: np.array(Image.open(io.BytesIO(base64.b64decode(uri)))).astype(int) for uri, alt in images}

    page, images = shown()
    assert images.keys() == {f"{n}.png{what}" for n in range(3) for what in ("", ", predicted", ", true")}
    assert abs(images["0.png"][20, [15, 45]] - [(255, 0, 0), (0, 255, 0)]).max() < 30
    legend = {
        name: np.array([*bytes.fromhex(colour)]) for colour, name in re.findall(r"--colour: #(\w{6})\">(\w+)<", page)
    }
    assert legend.keys() == {"red", "green", "blue"}
    for what in ("predicted", "true"):
        over = images[f"0.png, {what}"]
        assert over.shape == (40, 60, 3)
        for place, name, grey in ((15, "red", 76), (45, "green", 150)):  # luma of the picture there
            assert abs(over[20, place] - (0.65 * legend[name] + 0.35 * (80 + grey / 2))).max() < 12
    assert np.ptp(images["0.png, true"][1], axis=-1).max() < 12  # void is grey
    (data / "0.png").unlink()
    page, images = shown()
    assert images.keys() == {f"{n}.png{what}" for n in (1, 2) for what in ("", ", predicted", ", true")}
    assert page.count("The file does not exist:") == 1


def test_a_bad_sample_is_skipped_only_if_asked(data):
    (data / "1.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"1 of 3 samples cannot be read \(--skip-bad"):
        run(data)
    result = run(data, skip_bad=True)
    assert (result["protocol"]["samples"], result["protocol"]["skipped_samples"]) == (2, 1)
    assert {example["key"] for own in result["examples"].values() for example in own} == {"0.png", "2.png"}


def test_mistakes_are_named(data):
    with pytest.raises(UserError, match="halves: segmentation is of pictures, by models with `encode_dense`"):
        run(data, ExternalModel(colours.Colours(), "colours"))
    Image.fromarray(np.full((40, 60), 3, np.uint8)).save(data / "1_mask.png")
    with pytest.raises(UserError, match=r"1_mask\.png has 3, which is neither one of 3 classes nor void \(255\)"):
        run(data)
    Image.new("RGB", (60, 40)).save(data / "1_mask.png")
    with pytest.raises(UserError, match=r"1_mask\.png is \(40, 60, 3\), but its picture is \(40, 60\)"):
        run(data)
    (data / "1_mask.png").unlink()
    with pytest.raises(UserError, match=r"(?s)1 of 3 samples cannot be read.*1\.png: .*No such file.*1_mask\.png"):
        run(data)
    for change in ({"feature_cache": data / "cache"}, {"export": data / "x.safetensors"}):
        with pytest.raises(UserError, match="halves: segmentation has no features to export or to cache"):
            run(data, **change)
    config = (data / "halves.yaml").read_text()
    (data / "halves.yaml").write_text(config.replace("columns: {mask: labelled}", ""))
    with pytest.raises(UserError, match=r"3 of 3 samples do not fit segmentation: 0\.png has 0 masks"):
        run(data)
    (data / "halves.yaml").write_text(config.replace("class_names: [red, green, blue]\n", ""))
    with pytest.raises(UserError, match="segmentation needs class_names: masks hold their indices"):
        run(data)
    (data / "halves.yaml").write_text(config + "void: 0\n")
    for number in range(3):
        Image.fromarray(np.zeros((60, 40) if number == 2 else (40, 60), np.uint8)).save(data / f"{number}_mask.png")
    with pytest.raises(UserError, match="no pixel has a class: check the masks, `class_names` and `void`"):
        run(data)


def test_every_rank_hears_of_a_mask_that_stops_one(data, monkeypatch):
    told = []
    monkeypatch.setattr("languagebind.eval.features.gather_objects", lambda value: told.append(value) or [value])
    Image.fromarray(np.full((40, 60), 3, np.uint8)).save(data / "1_mask.png")
    with pytest.raises(UserError, match="neither one of 3 classes nor void"):
        run(data)
    assert isinstance(told[-1][1], UserError)


def test_the_worlds_masks_show_the_object(tmp_path):
    call("-m", "languagebind.data.world", f"--output={tmp_path}", "--num-train=2", "--num-test=6", "--size=64",
         "--modalities", "depth", "audio")  # fmt: skip
    config = load_dataset_config(tmp_path / "eval" / "depth_segmentation.yaml")
    labels = list(config.class_names)
    rows = [json.loads(line) for line in (tmp_path / "eval" / "depth_test.jsonl").read_text().splitlines()]
    for row in rows:
        depth = np.array(Image.open(tmp_path / "eval" / row["path"])).astype(float)
        mask = np.array(Image.open(tmp_path / "eval" / row["mask"]))
        assert {*mask.flat} == {labels.index(row["label"]), 255}
        assert depth[mask != 255].max() < 0.98 * depth[mask == 255].min()
    assert "mask" not in (tmp_path / "eval" / "audio_test.jsonl").read_text()


def test_a_linear_head_on_patches_finds_what_texts_do_not(toys, data):
    """Masks of four quarters' colours, by a real encoder of random weights."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        rows = []
        for number in range(count):
            mask = np.kron(rng.integers(0, 3, (2, 2)), np.ones((28, 28), np.uint8)).astype(np.uint8)
            Image.fromarray(np.array(list(COLOURS.values()), np.uint8)[mask]).save(data / f"{split}{number}.png")
            mask[:3] = 255
            Image.fromarray(mask).save(data / f"{split}{number}_mask.png")
            rows.append({"path": f"{split}{number}.png", "labelled": f"{split}{number}_mask.png"})
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(toys / "image"), "--config", str(data / "halves.yaml"), "--workers=0"]
    parts = ["--train", str(data / "train.jsonl"), "--test", str(data / "test.jsonl"), "--output", str(data / "out")]
    probe([*flags, *parts, "--dense"])
    result = json.loads(next((data / "out").glob("halves_probe_*.json")).read_text())
    assert result["metrics"]["top1"] > 0.8
    assert (result["protocol"]["samples"], result["protocol"]["train"]["samples"]) == (6, 24)
    assert "intervals" not in result
    with pytest.raises(UserError, match="a probe needs a dataset for classification, not segmentation"):
        probe([*flags, *parts])
