"""Features on disk: the same bits, nothing encoded twice, killed runs, damaged files, several ranks."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image as Picture

from languagebind.config import UserError
from languagebind.eval import DatasetConfig, cache
from languagebind.eval.cache import FeatureCache
from languagebind.eval.data.readers import choose_protocol
from languagebind.eval.evaluate import evaluate
from languagebind.eval.features import _progress
from languagebind.modalities.image import Image
from languagebind.modalities.video import Video

IMAGE = Image(image_size=8)
SAMPLES, BATCH = 46, 4  # twelve batches, the last one of two
WORDS = ["red", "green", "blue", "dark", "bright", "noise"]


class Slow(torch.nn.Module):
    """A linear model of pictures and words, which notes what it encodes."""

    def __init__(self, seconds: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.picture = torch.nn.Parameter(torch.randn(192, 24, generator=generator))
        self.words = torch.nn.Parameter(torch.randn(len(WORDS) + 1, 24, generator=generator))
        self.seconds, self.sizes, self.texts = seconds, [], 0

    def project(self, inputs):
        time.sleep(self.seconds)
        self.sizes.append(len(inputs))
        return inputs.flatten(1) @ self.picture

    def encode(self, inputs):
        return torch.nn.functional.normalize(self.project(inputs), dim=-1)

    def tokenize(self, texts):
        rows = [[float(word in text.split()) for word in WORDS] + [1.0] for text in texts]
        return {"ids": torch.tensor(rows)}

    def project_text(self, tokens):
        self.texts += len(tokens["ids"])
        return tokens["ids"] @ self.words

    def encode_text(self, tokens):
        return torch.nn.functional.normalize(self.project_text(tokens), dim=-1)

    def text_fingerprint(self):
        return "words"


class WithExtraState(Slow):
    def get_extra_state(self):
        return {"shown": 3}

    def set_extra_state(self, state):
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(SAMPLES):
        Picture.fromarray(rng.integers(0, 255, (9, 11, 3), np.uint8)).save(root / f"{i}.png")
        captions = [" ".join(rng.choice(WORDS, 3)) + f" {i}", WORDS[i % 6]]
        rows.append({"path": f"{i}.png", "captions": captions, "label": WORDS[i % 6]})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(data, cache=None, model=None, modality=IMAGE, task="retrieval", **options):
    """The result, and how many samples and texts were encoded."""
    model = model or Slow()
    names = {"class_names": {word: word for word in WORDS}} if task == "classification" else {}
    rules = {"similarity": "dot"} if task == "retrieval" else {}
    config = DatasetConfig("noise", task, str(data / "data.jsonl"), paper=rules, **names, **options.pop("config", {}))
    before = sum(model.sizes), model.texts
    result = evaluate(model, modality, config, workers=0, batch_size=BATCH, feature_cache=cache, **options)
    return result, sum(model.sizes) - before[0], model.texts - before[1]


@pytest.mark.parametrize("task", ["retrieval", "classification"])
@pytest.mark.parametrize("protocol", ["ours", "paper"])
def test_the_same_bits_and_nothing_is_encoded_twice(data, tmp_path, task, protocol):
    rules = {"config": {"protocol": protocol}}
    expected, samples, texts = run(data, task=task, **rules)
    assert samples == SAMPLES
    first = run(data, tmp_path, task=task, **rules)
    assert first == (expected, samples, texts)
    assert run(data, tmp_path, task=task, **rules) == (expected, 0, 0)


def test_whatever_features_depend_on_is_part_of_the_key(data, tmp_path, monkeypatch):
    _, everything, texts = run(data, tmp_path)
    changed, other = Slow(), replace(IMAGE, max_pixels=10**6)
    with torch.no_grad():
        changed.picture[3, 3] += 1e-3
    other_text = Slow()
    other_text.text_fingerprint = lambda: "other words"
    for options in (
        {"model": changed},
        {"model": other_text},
        {"model": WithExtraState()},
        {"modality": other},
        {"precision": "amp_bf16"},
        {"config": {"protocol": "paper"}},
    ):
        assert run(data, tmp_path, **options)[1:] == (everything, texts), options
        assert run(data, tmp_path, **options)[1:] == (0, 0), options
    assert run(data, tmp_path)[1:] == (0, 0)
    with monkeypatch.context() as patch:
        patch.setattr("languagebind.eval.cache.__version__", "9.9")
        assert run(data, tmp_path)[1:] == (everything, texts)
    # Another batch is no part of the key of the others
    assert run(data, tmp_path, config={"limit": 23})[1] == 23


def test_changed_files_are_encoded_again(data, tmp_path):
    run(data, tmp_path)
    picture = data / "17.png"
    before = picture.read_bytes()
    Picture.fromarray(np.zeros((9, 11, 3), np.uint8)).save(picture)
    try:
        found, samples, texts = run(data, tmp_path)
        assert (samples, texts) == (BATCH, 0), "its batch alone"
        assert found == run(data)[0]
    finally:
        picture.write_bytes(before)
    os.utime(picture, ns=(0, 0))
    assert run(data, tmp_path)[1] == BATCH


def test_shards_are_told_apart_by_their_time(data, tmp_path):
    from eval_files import write_shard

    members = [(f"{i}", {"png": data / f"{i}.png", "json": {"captions": WORDS[i % 6]}}) for i in range(8)]
    shard = write_shard(tmp_path / "a.tar", members)
    config = DatasetConfig("noise", "retrieval", str(shard))
    counts = []
    for changes in (None, None, lambda: os.utime(shard, ns=(5, 5))):
        if changes:
            changes()
        model = Slow()
        evaluate(model, IMAGE, config, workers=0, batch_size=BATCH, feature_cache=tmp_path / "cache")
        counts.append(sum(model.sizes))
    assert counts == [8, 0, 8]


def test_unreadable_samples_are_tried_again(data, tmp_path):
    rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    for row in rows:
        row["path"] = str(data / row["path"])
    missing = tmp_path / "missing.png"
    rows[5]["path"] = str(missing)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="1 of 46 samples cannot be read"):
        run(tmp_path, tmp_path / "cache")
    first, samples, _ = run(tmp_path, tmp_path / "cache", skip_bad=True)
    assert samples == BATCH - 1, "what was read before the error is kept"
    assert first == run(tmp_path, skip_bad=True)[0]
    missing.write_bytes((data / "5.png").read_bytes())
    whole, samples, _ = run(tmp_path, tmp_path / "cache")
    assert samples == BATCH
    assert whole == run(tmp_path)[0]


def test_damaged_files_are_found_and_made_again(data, tmp_path, caplog):
    expected, *_ = run(data, tmp_path)
    parts = sorted(tmp_path.rglob("*.features"), key=lambda part: part.stat().st_mtime_ns)
    damaged = bytearray(parts[0].read_bytes())
    damaged[-5] ^= 1
    parts[0].write_bytes(damaged)
    parts[1].write_bytes(parts[1].read_bytes()[:-9])
    (parts[0].parent / ".half.features.tmp").write_bytes(b"half")  # as a killed run leaves it
    mine = parts[0].parent / "mine.features"
    mine.write_bytes(b"not of the cache")
    with caplog.at_level(logging.WARNING):
        found, samples, _ = run(data, tmp_path)
    assert found == expected
    assert samples == 2 * BATCH
    assert caplog.text.count("is damaged: its features are computed again") == 2
    assert mine.read_bytes() == b"not of the cache"
    assert run(data, tmp_path) == (expected, 0, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.*: Not a directory"):
        run(data, tmp_path / "file")


def test_two_runs_may_write_the_same_batch_at_once(tmp_path, monkeypatch):
    runs = [FeatureCache(tmp_path / "d", Slow(), choose_protocol("ours", None, None, IMAGE), "fp32") for _ in range(2)]
    fsync = os.fsync

    def meanwhile(file):
        monkeypatch.setattr(os, "fsync", fsync)
        runs[1].put(["x"], torch.ones(2, 3))
        fsync(file)

    monkeypatch.setattr(os, "fsync", meanwhile)
    runs[0].put(["x"], torch.ones(2, 3))
    assert torch.equal(runs[0].get(["x"]), torch.ones(2, 3))
    assert [path.suffix for path in runs[0].folder.iterdir()] == [".features"]


def test_a_killed_run_goes_on(data, tmp_path):
    code = (
        "import sys; from pathlib import Path; from test_eval_cache import *;"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), model=Slow(0.2))"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code, str(data), str(tmp_path)], env=env)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.features"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    parts = len(list(tmp_path.rglob("*.features")))
    assert 2 <= parts < SAMPLES / BATCH, "killed in the middle"
    found, samples, _ = run(data, tmp_path)
    assert samples == SAMPLES - parts * BATCH
    assert found == run(data)[0]


def _rank(rank, folder, data, world_size, caches):
    address = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    found = [run(Path(data), cache and Path(cache)) for cache in caches]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(data, tmp_path, world_size):
    torch.set_num_threads(1)
    expected, _, texts = run(data, tmp_path / "of one")
    caches = [None, str(tmp_path / "new"), str(tmp_path / "new"), str(tmp_path / "of one")]
    torch.multiprocessing.spawn(_rank, (str(tmp_path), str(data), world_size, caches), nprocs=world_size)
    counts = [[0, 0] for _ in caches]
    for rank in range(world_size):
        for k, (result, *encoded) in enumerate(json.loads((tmp_path / f"{rank}.json").read_text())):
            assert result == json.loads(json.dumps(expected))
            counts[k] = [a + b for a, b in zip(counts[k], encoded, strict=True)]
    assert counts == [[SAMPLES, texts], [SAMPLES, texts], [0, 0], [0, 0]]
    assert run(data, tmp_path / "new") == (expected, 0, 0)


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr("languagebind.eval.features.SECONDS_BETWEEN_LINES", 0.2)
    for _ in _progress(range(20), "samples"):
        time.sleep(0.05)
    lines = capsys.readouterr().err.replace("\r", "").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    assert 2 <= len(lines) <= 5
    assert all(re.fullmatch(r"samples: \d+ of 20 batches, about 00:0\d left", line) for line in lines)


def test_caches_from_before_an_option_was_added_stay_valid(tmp_path, monkeypatch):
    facts = []
    monkeypatch.setattr(cache, "digest", lambda value: facts.append(value) or "0")
    for modality in (IMAGE, Video(), replace(IMAGE, antialias=True), replace(Video(), frames_per_second=1.0)):
        FeatureCache(tmp_path, Slow(), choose_protocol("ours", None, None, modality), "fp32")
    image = ["image_size", "max_pixels", "exif", "hflip", "random_crop", "fast_resize"]
    video = [*image, "num_frames", "video_backend", "max_seconds"]
    added = [["antialias"], ["frames_per_second"]]
    assert [list(each["inputs"]) for each in facts[:2]] == [image, video]  # the hash covers the order
    assert [sorted({*each["inputs"]} - {*video}) for each in facts[2:]] == added
