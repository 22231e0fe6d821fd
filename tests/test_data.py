"""The training loader, on real shards."""

import gzip
import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, depth_png, train_flags, write_shards

from languagebind.config import UserError
from languagebind.data.members import choose_frame, media_sources, read_captions
from languagebind.data.shards import ShardWriter, count_samples, expand_shards, indexed
from languagebind.data.vidal import MissingCaption
from languagebind.modalities import DecodeError, modality_class
from training.batch import DataConfig, Plan
from training.loader import copied_ahead, train_batches
from training.main import main
from training.worker import ShardBatches

DEPTH = modality_class("depth")(image_size=16)


def tokenizer(texts):
    return {"input_ids": torch.tensor([[len(text)] for text in texts])}


def batches(
    shards, steps=12, per_epoch=12, rank=0, world=1, first=0, drawn=None, seed=0, counted=True, lengths=None, **options
):
    config = DataConfig(**{"batch_size": 8, "caption_source": "raw", "workers": 0, "shuffle_buffer": 20, **options})
    plan = Plan(seed, rank, world, per_epoch, steps, first, drawn or {}, lengths)
    counts = count_samples(indexed(expand_shards(shards)))
    if not counted:
        counts = dict.fromkeys(counts)
    return list(train_batches(ShardBatches(counts, DEPTH, tokenizer, config, plan)))


def select_input(sample, modality, rng, frame):
    sources = media_sources(sample, modality)
    return sources[choose_frame(sources, rng, frame)]


def keys(found):
    return [key for batch in found for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own(depth_shards, workers):
    found = keys(batches(depth_shards, steps=24, workers=workers))
    first, second = found[:96], found[96:]
    assert len(set(first)) == len(set(second)) == 96
    assert first != second
    assert first != sorted(first)


def test_the_seed_decides_the_order(depth_shards):
    assert keys(batches(depth_shards, workers=2)) == keys(batches(depth_shards, workers=2))
    assert keys(batches(depth_shards)) != keys(batches(depth_shards, seed=1))


def test_ranks_and_workers_share_the_samples_among_them(depth_shards):
    parts = [keys(batches(depth_shards, steps=6, per_epoch=6, rank=rank, world=2, workers=2)) for rank in range(2)]
    assert Counter(parts[0] + parts[1]) == Counter(keys(batches(depth_shards)))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_uneven_shards_are_shared_out_fairly(tmp_path, workers):
    shards = write_shards(tmp_path, [3, 29, 1, 7, 8])
    parts = [batches(shards, steps=3, per_epoch=3, rank=rank, world=2, workers=workers) for rank in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    assert len(set(keys(parts[0] + parts[1]))) == 48  # every sample of the epoch, once


def test_without_counts_a_rank_with_fewer_samples_repeats_its_own(tmp_path):
    shards = write_shards(tmp_path, [4, 28])
    parts = [batches(shards, steps=2, per_epoch=2, rank=rank, world=2, counted=False) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    assert sorted(len(set(keys(part))) for part in parts) == [4, 16]


@pytest.mark.parametrize("first", range(1, 6))
@pytest.mark.parametrize("rank", [0, 1])
def test_goes_on_after_a_worker_has_begun_its_part_again(tmp_path, rank, first):
    shards, options = write_shards(tmp_path, [4, 28]), {"steps": 6, "per_epoch": 6, "world": 2, "counted": False}
    whole = batches(shards, rank=rank, **options)
    rest = batches(shards, rank=rank, first=first, drawn={0: whole[first - 1].drawn}, **options)
    assert keys(rest) == keys(whole[first:])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("first", [5, 12, 17])
def test_goes_on_from_any_step_with_the_same_samples(depth_shards, first, resampled, workers):
    options = {"steps": 24, "workers": workers, "dataset_resampled": resampled}
    whole = batches(depth_shards, **options)
    epoch = first // 12
    drawn = {batch.worker: batch.drawn for batch in whole[:first] if batch.epoch == epoch}
    rest = batches(depth_shards, first=first, drawn=drawn, **options)
    assert keys(rest) == keys(whole[first:])
    for ours, theirs in zip(rest, whole[first:], strict=True):
        assert torch.equal(ours.inputs, theirs.inputs)


@pytest.mark.parametrize("case", ["counted", "uncounted", "resampled", "damaged", "remote"])
def test_a_resumed_loader_reads_only_what_is_to_come(tmp_path, case):
    bad = {f"s{shard}_{number}": b"junk" for shard in (2, 30) for number in (3, 20)}
    folder = write_shards(tmp_path, [20] * 40, replace=bad)
    options = {"per_epoch": 100, "rank": 1, "world": 2, "batch_size": 4, "dataset_resampled": case == "resampled"}
    options["counted"] = case != "uncounted"
    for number, shard in enumerate(sorted(folder.glob("*.tar"))):
        if case == "damaged" and number % 3 == 0:
            shard.write_bytes(shard.read_bytes()[: -3000 * (1 + number % 7)])
        if case == "damaged" and number % 3 == 1:
            shard.write_bytes(gzip.compress(shard.read_bytes()))
    shards = f"file://{folder}" if case == "remote" else folder
    whole = batches(shards, steps=104, **options)
    for first in (1, 37, 90, 102):
        known = [batch for batch in whole[:first] if batch.epoch == whole[first].epoch]
        drawn = {0: known[-1].drawn}
        lengths = {0: {number: length for batch in known for number, length in batch.lengths.items()}}
        rest = batches(shards, steps=104, first=first, drawn=drawn, lengths=lengths, **options)
        assert keys(rest) == keys(whole[first:])
        assert [batch.skipped for batch in rest] == [batch.skipped for batch in whole[first:]]
        for ours, theirs in zip(rest, whole[first:], strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)
        if case != "damaged" and first == 90:
            begin = bytes_read()
            batches(shards, steps=first + 1, first=first, drawn=drawn, lengths=lengths, **options)
            share = (bytes_read() - begin) / sum(path.stat().st_size for path in folder.glob("*.tar"))
            assert share < 0.1


def bytes_read():
    """Return the number of bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


CORRUPT = {
    "s0_3": b"",
    "s0_9": b"no picture",
    "s1_2": depth_png(0, np.random.default_rng(0))[:60],
    "s1_11": depth_png(1, np.random.default_rng(0))[:-40],
    "s2_5": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


def test_corrupt_samples_are_replaced_and_counted_exactly(tmp_path):
    shards = write_shards(tmp_path / "shards", [24, 24, 24, 24], replace=CORRUPT)
    # In the order of the shards, 88 of the 91 good samples: all of the bad ones lie before the last.
    main(train_flags(shards, tmp_path, "--name=run", "--shuffle-buffer=0", "--train-num-samples=88", "--seed=3"))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert rows[-1]["train/skipped"] == len(skipped) == 5
    assert {sample["key"] for sample in skipped} == set(CORRUPT)
    assert all(sample["reason"] and sample["shard"].endswith(".tar") for sample in skipped)
    assert rows[-1]["step"] == 11


def test_the_loss_does_not_see_corrupt_samples(tmp_path):
    found = batches(write_shards(tmp_path, [24, 24, 24, 24], replace=CORRUPT), steps=11, per_epoch=11)
    assert not set(keys(found)) & set(CORRUPT)
    assert len(set(keys(found))) == 88


def test_a_truncated_shard_costs_its_end_alone(tmp_path):
    shards = write_shards(tmp_path, [24, 24])
    shard = shards / "00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2 + 512])  # within a member
    found = batches(shards, steps=5, per_epoch=5, shuffle_buffer=0)
    assert {key for key in keys(found) if key.startswith("s1")} == {f"s1_{i}" for i in range(24)}
    reasons = [sample.reason for batch in found for sample in batch.skipped]
    assert any(reason.startswith("broken shard: unexpected end of data") for reason in reasons)


def test_a_shard_that_lost_its_end_unseen_is_refused_before_training(tmp_path):
    shards = write_shards(tmp_path / "shards", [24, 24])
    shard = shards / "00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])  # between two members: it reads like a whole one
    with pytest.raises(UserError, match=r"00000\.tar has \d+ bytes, but its index\.json says \d+"):
        main(train_flags(shards, tmp_path))


def test_too_many_bad_samples_stop_the_run(tmp_path):
    bad = {f"s{shard}_{number}": b"junk" for shard in range(4) for number in range(0, 24, 3)}
    shards = write_shards(tmp_path / "shards", [24, 24, 24, 24], replace=bad)
    flags = train_flags(shards, tmp_path, "--epochs=2", "--name=run")
    with pytest.raises(UserError, match=r"\d+ of \d+ samples cannot be used, more than --max-bad-share 10%"):
        main(flags)
    main([*flags, "--max-bad-share=0.5", "--name=patient"])


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_one_usable_sample_stop_the_run(depth_shards, workers):
    with pytest.raises(UserError, match=r"not one sample can be used.*no caption of source 'nosuch'"):
        batches(depth_shards, caption_source="nosuch", workers=workers)


def test_a_fault_of_the_code_is_not_taken_for_a_bad_sample(depth_shards, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(type(DEPTH), "transform", broken)
    with pytest.raises(ZeroDivisionError) as raised:
        batches(depth_shards)
    assert "while reading sample s" in raised.value.__notes__[0]


def test_the_captions_frame_picks_the_inputs_frame(tmp_path):
    captions = {"ofa": [f"frame {i}" for i in range(8)]}
    with ShardWriter(tmp_path / "0.tar") as writer:
        for number in range(4):
            frames = {f"{i}.depth.png": depth_png(i % 4, np.random.default_rng(i)) for i in range(8)}
            writer.add(f"s{number}", frames, {"id": str(number), "captions": captions})
    expected = {i: DEPTH.preprocess(depth_png(i % 4, np.random.default_rng(i))) for i in range(8)}

    def frame_number(texts):
        return {"input_ids": torch.tensor([[int(text.split()[1])] for text in texts])}

    config = DataConfig(batch_size=4, caption_source="mix", workers=0)
    seen = set()
    plan = Plan(0, 0, 1, 1, 20)
    for batch in train_batches(ShardBatches({str(tmp_path / "0.tar"): 4}, DEPTH, frame_number, config, plan)):
        for x, number in zip(batch.inputs, batch.text["input_ids"][batch.text["caption"], 0].tolist(), strict=True):
            seen.add(number)
            assert torch.equal(x, expected[number])
    assert len(seen) == 8


def test_inputs_are_whole_members_or_frames():
    video = modality_class("video")(image_size=16, num_frames=2)
    frames = {"10.jpg": b"c", "2.jpg": b"b", "0.jpg": b"a", "__key__": "k"}
    assert select_input(frames, video, random.Random(0), None) == [b"a", b"b", b"c"]
    assert select_input({**frames, "mp4": b"whole"}, video, random.Random(0), None) == b"whole"
    depth = {"0.depth.png": b"a", "3.depth.png": b"d", "__key__": "k"}
    assert select_input(depth, DEPTH, random.Random(0), 3) == b"d"
    assert {select_input(depth, DEPTH, random.Random(i), None) for i in range(20)} == {b"a", b"d"}
    with pytest.raises(DecodeError, match="no member is named"):
        select_input({"mp3": b"", "__key__": "k"}, DEPTH, random.Random(0), None)


def test_captions_are_read_from_json_or_text():
    assert read_captions({"json": b'{"captions": {"raw": "a"}}'}) == {"raw": "a"}
    assert read_captions({"json": b'{"caption": "a"}', "txt": b"b"}) == {"caption": "a", "txt": "b"}
    assert read_captions({"json": b'{"captions": ["a", "b"]}'}) == {"caption": ["a", "b"]}
    for broken in (b"{", b"[]", b"{}"):
        with pytest.raises(MissingCaption, match=r"unreadable \.json"):
            read_captions({"json": broken})


def test_a_caller_that_fails_is_not_held_by_its_workers(depth_shards):
    code = f"""
from languagebind.modalities import modality_class
from training.batch import DataConfig, Plan
from training.loader import train_batches
from training.worker import ShardBatches
shards = {{"{depth_shards}/00000.tar": 24}}
tokens = lambda texts: {{}}
config = DataConfig(caption_source="raw", batch_size=4)
depth = modality_class("depth")(image_size=16)
batches = train_batches(ShardBatches(shards, depth, tokens, config, Plan(0, 0, 1, 6, 60)))
next(batches)
raise SystemExit(3)
"""
    begin = time.monotonic()
    call("-c", code, status=3)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_copied_ahead_are_the_same_ones_in_order(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("copies to a GPU need one")
    write_shards(tmp_path, [24])
    expected, own = batches(tmp_path, steps=3), batches(tmp_path, steps=3)
    ahead = copied_ahead(iter(own), torch.device(device))
    for before, after in zip(expected, ahead, strict=True):
        assert after.keys == before.keys
        assert {tensor.device.type for tensor in after.tensors()} == {device}
        assert all(torch.equal(x, y.cpu()) for x, y in zip(before.tensors(), after.tensors(), strict=True))
