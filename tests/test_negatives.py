"""Hard negatives: texts beside the captions that match no sample, from a table to the loss."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import CAPTIONS, MINILM, depth_png, losses, train_flags, write_shards
from test_accumulation import BASE, gradients
from test_data import DEPTH

from languagebind.config import UserError
from languagebind.data.embed_text import main as embed_text
from languagebind.data.feature_store import FeatureStore
from languagebind.data.making import main as make_shards
from languagebind.data.members import read_captions, stream_samples
from training.batch import DataConfig, Plan
from training.loader import train_batches
from training.main import main
from training.preflight import check_data
from training.worker import ShardBatches

# Of the four columns' samples; the third has but one, the fourth none
NEGATIVES = [["a wall on the far right", "a box left of the middle", CAPTIONS[0]], ["no box", "a hole"], ["a rope"], []]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards with the features of all their texts."""
    folder = write_shards(tmp_path_factory.mktemp("negatives"), [24], negatives=NEGATIVES)
    embed_text([f"--train-data={folder}", "--caption-source=raw", "--negatives=1", f"--text-tower={MINILM}"])
    return folder


def batches(shards, features=None, negatives=2):
    texts = []

    def tokenize(given):
        texts.append(given)
        return {"input_ids": torch.arange(len(given))[:, None]}

    config = DataConfig(batch_size=24, workers=0, caption_source="raw", negatives=negatives)
    given = ShardBatches({str(shards / "00000.tar"): 24}, DEPTH, tokenize, config, Plan(0, 0, 1, 1, 1), features)
    return list(train_batches(given)), texts


def test_each_sample_draws_its_own(shards):
    (batch,), (texts,) = batches(shards)
    assert len(texts) == len(set(texts))
    for row, caption in zip(batch.text["negatives"].tolist(), batch.captions, strict=True):
        own = set(NEGATIVES[CAPTIONS.index(caption)]) - {caption}
        drawn = [texts[i] for i in row if i >= 0]
        assert set(drawn) <= own
        assert len(set(drawn)) == len(drawn) == min(2, len(own))
    (plain,), _ = batches(shards, negatives=0)
    assert plain.keys == batch.keys
    assert torch.equal(plain.inputs, batch.inputs)  # what is drawn without negatives is drawn with them
    assert set(plain.text) == {"input_ids", "caption"}


def test_cached_features_are_those_of_the_texts(shards):
    (tower,) = {path.name.split("text-")[1].split(".")[0] for path in shards.glob("*.safetensors")}
    features = FeatureStore(tower)
    assert FeatureStore(tower).path(str(shards / "00000.tar")).is_file()
    (batch,), _ = batches(shards, features)
    (live,), (texts,) = batches(shards)
    for rows, found in zip(live.text["negatives"].tolist(), batch.text["negatives"], strict=True):
        for row, feature in zip(rows, found, strict=True):
            wanted = features.find(str(shards / "00000.tar"), texts[row]) if row >= 0 else torch.zeros(384).half()
            assert torch.equal(feature, wanted)


def test_losses_of_live_cached_and_accumulated_runs_agree(shards, tmp_path):
    flags, first = [*BASE, "--train-num-samples=24", "--matryoshka", "384", "96"], {}
    for name, more in {
        "plain": ["--text-features=live"],
        "live": ["--text-features=live", "--negatives=2"],
        "cached": ["--text-features=cached", "--negatives=2"],
        "parts": ["--text-features=cached", "--negatives=2", "--batch-size=8", "--accum-freq=3"],
    }.items():
        main(train_flags(shards, tmp_path, *flags, "--batch-size=24", *more, f"--name={name}"))
        first[name] = losses(tmp_path, name)[1]
    assert first["cached"] == pytest.approx(first["live"], abs=1e-3)
    assert first["parts"] == pytest.approx(first["cached"], abs=1e-6)
    assert first["live"] > first["plain"] + 0.05
    for key, value in gradients(tmp_path, "cached").items():
        torch.testing.assert_close(gradients(tmp_path, "parts")[key], value, atol=1e-6, rtol=0)


def test_a_first_sample_without_negatives_is_reported(depth_shards, tmp_path, caplog):
    shutil.copy(depth_shards / "00000.tar", tmp_path)  # without the index
    config = DataConfig(str(tmp_path), train_num_samples=8, batch_size=8, caption_source="raw", negatives=1)
    check_data(config, DEPTH, 1)
    assert "--negatives: the first sample, s0_0, has none; are they packed?" in caplog.text


def test_what_does_not_fit_is_refused(shards, depth_shards, tmp_path):
    with pytest.raises(UserError, match="no sample has 'negatives' among its captions"):
        main(train_flags(depth_shards, tmp_path, "--negatives=1"))
    with pytest.raises(UserError, match="works with --loss clip alone"):
        main(train_flags(shards, tmp_path, "--negatives=1", "--loss=siglip", "--init-logit-bias=-10"))
    embedded = write_shards(tmp_path / "some", [24], negatives=NEGATIVES)
    embed_text([f"--train-data={embedded}", "--caption-source=raw", f"--text-tower={MINILM}"])
    with pytest.raises(UserError, match="lacks captions of source negatives"):
        main(train_flags(embedded, tmp_path, "--negatives=1"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_have_a_column_of_them(tmp_path, kind, capsys):
    (tmp_path / "a.png").write_bytes(depth_png(0, np.random.default_rng(0)))
    (tmp_path / "b.png").write_bytes(depth_png(1, np.random.default_rng(0)))
    row = {"path": "a.png", "caption": "a wall", "negatives": ["a box", "a pole"]}
    text = json.dumps(row) if kind == "jsonl" else "path,caption,negatives\na.png,a wall,a box|a pole"
    text += "\n" + (json.dumps(row | {"path": "b.png", "negatives": []}) if kind == "jsonl" else "b.png,a wall,")
    (tmp_path / f"table.{kind}").write_text(text + "\n")
    make_shards([kind, f"--manifest={tmp_path / f'table.{kind}'}", f"--root={tmp_path}", "--modality=depth",
                 f"--output={tmp_path / 'shards'}"])  # fmt: skip
    one, other = stream_samples(str(tmp_path / "shards" / "00000.tar"))
    assert read_captions(one) == {"caption": "a wall", "negatives": ["a box", "a pole"]}
    assert read_captions(other) == {"caption": "a wall"}
    assert "blank" not in capsys.readouterr().out
