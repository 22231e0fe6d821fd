"""Text features beside the shards: written once, the same losses, and never those of another tower."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from helpers import CAPTIONS, MINILM, call, text_store, train_flags, write_shards
from safetensors.torch import load_file

from languagebind import remote
from languagebind.config import UserError
from languagebind.data.feature_store import FeatureStore, write_text_features
from languagebind.text import TextConfig, build_text, encode_text, fingerprint
from training.main import main


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def embed(*flags, status=0):
    return call("-m", "languagebind", "embed-text", *flags, status=status)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Shards with the features of all their captions."""
    folder = write_shards(tmp_path_factory.mktemp("embedded"), [24, 24, 24])
    flags = ["--caption-source=mix", f"--text-tower={MINILM}", "--batch-size=3"]
    output = embed(f"--train-data={folder}", *flags)
    assert f"{3 * len(CAPTIONS)} captions of 3 shards" in output
    return folder


@pytest.fixture(scope="module")
def tower():
    text_model, text_projection, _ = build_text(TextConfig(MINILM))
    return text_model.eval(), text_projection, fingerprint(text_model, text_projection)


def shards_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def test_features_are_those_of_the_tower(embedded, tower):
    text_model, text_projection, own = tower
    expected = encode_text(text_model, text_projection, text_model.tokenizer(CAPTIONS))
    for shard in shards_of(embedded):
        found = torch.stack([FeatureStore(own).find(shard, caption) for caption in CAPTIONS])
        assert found.dtype == torch.float16
        assert (found - expected).abs().max() < 3e-4


def test_losses_are_those_of_the_live_tower(embedded, tmp_path):
    for mode in ("live", "cached", "auto"):
        flags = train_flags(embedded, tmp_path, f"--name={mode}", f"--text-features={mode}", "--caption-source=mix")
        main([*flags, "--workers=0"])
    live, cached, auto = (losses(tmp_path / mode) for mode in ("live", "cached", "auto"))
    assert len(live) == 9
    assert cached == pytest.approx(live, abs=2e-3)
    assert auto == cached != live  # float16 features leave their trace: they were used


def test_only_what_is_missing_is_written_again(embedded, tower, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(embedded, folder)
    paths = [FeatureStore(tower[2]).path(shard) for shard in shards_of(folder)]
    paths[1].unlink()
    before = [paths[i].stat().st_mtime_ns for i in (0, 2)]
    flags = [f"--train-data={folder}", f"--text-tower={MINILM}"]
    output = embed(*flags)
    assert f"{len(CAPTIONS)} captions of 1 shards" in output
    assert "; 2 shards were complete" in output
    assert [paths[i].stat().st_mtime_ns for i in (0, 2)] == before
    both = load_file(paths[0]), load_file(paths[1])
    assert torch.equal(both[0]["captions"], both[1]["captions"])


def test_a_second_source_is_added_to_the_first(tower, tmp_path):
    text_model, text_projection, own = tower
    (shard,) = shards_of(write_shards(tmp_path, [6]))

    def encode(texts):
        return encode_text(text_model, text_projection, text_model.tokenizer(texts))

    write_text_features(shard, "raw", own, encode)
    with pytest.raises(UserError, match="lacks captions of source ofa"):
        text_store("cached", [shard], "ofa", own)
    assert write_text_features(shard, "ofa", own, encode) is not None
    for source in ("raw", "ofa"):
        assert write_text_features(shard, source, own, encode) is None
        assert text_store("cached", [shard], source, own) is not None
    with pytest.raises(UserError, match="no caption of source 'none'"):
        write_text_features(str(shutil.copy(shard, tmp_path / "copy.tar")), "none", own, encode)


def test_features_that_do_not_fit_are_refused(embedded, tower, tmp_path):
    own, folder = tower[2], tmp_path / "shards"
    shutil.copytree(embedded, folder)
    shards = shards_of(folder)
    assert text_store("live", shards, "mix", own) is None
    for mode in ("auto", "cached"):
        with pytest.raises(UserError, match="belongs to another text tower than this run's, ffffff"):
            text_store(mode, shards, "mix", "f" * 64)
    FeatureStore(own).path(shards[0]).rename(FeatureStore("f" * 64).path(shards[0]))
    with pytest.raises(UserError, match="belongs to another text tower than this one, fffff"):
        text_store("cached", shards[:1], "mix", "f" * 64)
    FeatureStore("f" * 64).path(shards[0]).unlink()
    for mode in ("auto", "cached"):
        with pytest.raises(UserError, match=r"1 of 3 shards lack text features, .*languagebind embed-text"):
            text_store(mode, shards, "mix", own)
    FeatureStore(own).path(shards[1]).write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"is damaged .*; delete it"):
        text_store("cached", shards[1:], "mix", own)


def test_a_shard_made_anew_is_noticed(embedded, tmp_path):
    shutil.copytree(embedded, tmp_path / "shards")
    write_shards(tmp_path / "shards", [24, 24, 24], captions=[f"{caption}, so they say" for caption in CAPTIONS])
    with pytest.raises(UserError, match=r"lacks the caption .*if the shard has changed"):
        main([*train_flags(tmp_path / "shards", tmp_path), "--workers=0"])


def test_without_features_auto_is_live_and_cached_is_refused(tmp_path):
    shards = shards_of(write_shards(tmp_path, [6]))
    assert text_store("auto", shards, "mix", "f" * 64) is None
    with pytest.raises(UserError, match="1 of 1 shards lack text features"):
        text_store("cached", shards, "mix", "f" * 64)


def test_streams_have_no_place_for_features():
    assert "features cannot be written beside" in embed("--train-data=pipe:cat a.tar", status=2)


def test_a_recipe_names_the_captions_and_the_text_tower(tmp_path):
    shards = write_shards(tmp_path / "shards", [4])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"modality: depth\nmodel: vit-tiny-demo\ndata:\n  caption_source: raw\n  batch_size: 9999\n"
        f"towers:\n  text_tower: {MINILM}\nlr: 1e-3\nreport_to: [tensorboard]\n"
    )
    output = embed(f"--config={recipe}", f"--train-data={shards}")
    assert "captions of 1 shards" in output
    text_store("cached", [str(shards / "00000.tar")], "raw", fingerprint(*build_text(TextConfig(MINILM))[:2]))
    assert "no option 'lr'" in embed("--lr=1", f"--train-data={shards}", status=2)


def test_folders_of_many_shards_are_listed_once(tmp_path, monkeypatch):
    listed, glob, sizes = [], Path.glob, remote.folder_sizes
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: listed.append(folder) or glob(folder, pattern))
    monkeypatch.setattr(remote, "folder_sizes", lambda url: listed.append(url) or sizes(url))
    store, names = FeatureStore("f" * 64), [f"{number}.tar" for number in range(3)]
    assert not store.serves("auto", [str(tmp_path / name) for name in names])
    fsspec.filesystem("memory").pipe("/many/1.tar", b"1234")
    assert list(remote.file_sizes([f"memory://many/{name}" for name in names])) == [None, 4, None]
    assert not store.serves("auto", [f"memory://many/{name}" for name in names])
    assert listed == [tmp_path, *["memory://many"] * 2]
