"""Shards, text features and checkpoints behind URLs, with an S3 server of this machine; a run copied there."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from helpers import call, call_ranks, stripes_config, text_store, train_flags, write_pairs, write_shards

from languagebind.config import UserError
from languagebind.data.checking import check_shards
from languagebind.data.feature_store import write_text_features
from languagebind.data.members import stream_samples
from languagebind.data.shards import count_samples, expand_shards, indexed
from languagebind.eval.data.shards import list_shards, read_shard
from languagebind.hub.checkpoint import read_checkpoint
from languagebind.hub.encoders import load
from languagebind.modalities import modality_class
from languagebind.remote import is_url, local_copy
from training.batch import DataConfig, Plan
from training.checkpoint_files import damage
from training.loader import train_batches
from training.main import main
from training.remote_sync import RemoteSync
from training.worker import ShardBatches

DEPTH = modality_class("depth")(image_size=16)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def s3_server():
    """(process, file system) of an S3 server with a bucket `data`; its address and keys are in the environment."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    kind = fsspec.get_filesystem_class("s3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            for _ in range(200):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None
                time.sleep(0.1)
            kind.clear_instance_cache()
            fs = fsspec.filesystem("s3")
            fs.mkdir("data")
            yield server, fs
        finally:
            server.terminate()
            server.wait()
            kind.clear_instance_cache()  # fsspec does not tell two servers apart by the environment


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The file system of an S3 server with a bucket `data`."""
    for package in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[dev]'")
    with pytest.MonkeyPatch.context() as patch, s3_server() as (_, fs):
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield fs


@pytest.fixture(scope="module")
def shards(s3, tmp_path_factory):
    """The same shards in a folder and at a URL."""
    folder = write_shards(tmp_path_factory.mktemp("local"), [16, 16])
    s3.put(f"{folder}/", "data/depth/", recursive=True)
    return folder, "s3://data/depth"


@pytest.fixture(scope="module")
def runs(shards, s3, tmp_path_factory):
    """The logs of a run on local shards, and of the same at the URL, copied to s3://data/runs."""
    logs, (folder, url) = tmp_path_factory.mktemp("logs"), shards
    flags = ["--workers=2", "--save-every-n-steps=2"]
    main(train_flags(folder, logs, "--name=local", *flags))
    remote = ["--remote-sync=s3://data/runs", "--remote-sync-frequency=1"]
    main(train_flags(f"{url}/{{00000..00001}}.tar", logs, "--name=remote", *flags, *remote))  # workers are forked
    s3.invalidate_cache()
    return logs


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows}


def batches(counts, **options) -> list:
    config = DataConfig(**{"batch_size": 8, "caption_source": "raw", "workers": 0, **options})
    plan = Plan(0, 0, 1, sum(counts.values()) // 8, sum(counts.values()) // 8)
    dataset = ShardBatches(counts, DEPTH, lambda texts: {"ids": torch.zeros(len(texts), 1)}, config, plan)
    return list(train_batches(dataset))


def test_losses_are_those_of_local_shards(runs):
    assert losses(runs / "remote") == losses(runs / "local")
    assert losses(runs / "local").keys() == {1, 2, 3, 4}


def test_the_store_has_the_whole_run_at_its_end(runs, s3):
    folder = runs / "remote"
    expected = [folder / name for name in ("config.yaml", "metrics.jsonl", "out.log")]
    expected += (folder / "checkpoints").glob("step_*.pt")
    assert len(expected) == 5
    for path in expected:
        assert s3.cat_file(f"data/runs/remote/{path.relative_to(folder)}") == path.read_bytes()


def test_a_run_goes_on_from_the_store_on_another_machine(runs, s3, tmp_path, shards):
    s3.copy("data/runs/remote/checkpoints/step_00000002.pt", "data/runs/moved/checkpoints/step_00000002.pt")
    s3.copy("data/runs/remote/metrics.jsonl", "data/runs/moved/metrics.jsonl")
    data = f"{shards[1]}/{{00000..00001}}.tar"
    flags = train_flags(data, tmp_path, "--name=moved", "--workers=2", "--remote-sync=s3://data/runs")
    with pytest.raises(UserError, match="s3://data/runs/moved exists"):
        main(flags)
    main([*flags, "--resume=latest"])
    log = (tmp_path / "moved/out.log").read_text()
    assert "fetched s3://data/runs/moved/checkpoints/step_00000002.pt" in log
    assert "step_00000002.pt at step 2 of 4" in log
    assert losses(tmp_path / "moved") == losses(runs / "local")
    whole = torch.load(runs / "local/checkpoints/step_00000004.pt", weights_only=True)["model"]
    ours = torch.load(tmp_path / "moved/checkpoints/step_00000004.pt", weights_only=True)["model"]
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_a_run_of_several_modalities_goes_on_from_the_store(s3, tmp_path):
    shards = write_pairs(tmp_path / "shards", [8, 8])
    names = ("depth", "infrared")
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(f"modality: {name}\n")
    common = [flag for flag in train_flags(shards, tmp_path, "--name=pair", "--image-size=32", "--workers=0")
              if flag != "--modality=depth"]  # fmt: skip
    common += [f"--config={tmp_path / name}.yaml" for name in names]
    common += ["--remote-sync=s3://data/runs", "--save-every-n-steps=2"]
    main(common)
    whole = tmp_path / "pair"
    expected = {name: losses(whole / name) for name in names}
    whole.rename(tmp_path / "before")
    s3.rm("data/runs/pair/checkpoints/step_00000004.pt")
    main([*common, "--resume=latest"])
    assert {name: losses(whole / name) for name in names} == expected
    assert expected["depth"].keys() == {1, 2}
    assert s3.exists("data/runs/pair/infrared/config.yaml")


def test_a_damaged_checkpoint_of_the_store_is_passed_over(runs, s3, tmp_path, shards):
    for step in (2, 4):
        name = f"checkpoints/step_{step:08d}.pt"
        s3.copy(f"data/runs/remote/{name}", f"data/runs/hurt/{name}")
    content = bytearray(s3.cat_file("data/runs/remote/checkpoints/step_00000004.pt"))
    content[len(content) // 2] ^= 1
    s3.pipe_file("data/runs/hurt/checkpoints/step_00000004.pt", bytes(content))
    flags = train_flags(shards[0], tmp_path, "--name=hurt", "--remote-sync=s3://data/runs", "--resume=latest")
    call_ranks(2, "-m", "training.main", *flags, "--batch-size=4")
    log = (tmp_path / "hurt/out.log").read_text()
    assert re.search(r"skipping .*step_00000004.pt, which is damaged: ", log)
    assert "at step 2 of 4" in log
    assert damage(tmp_path / "hurt/checkpoints/step_00000004.pt") is None
    assert not list((tmp_path / "hurt/checkpoints").glob(".*"))


def test_what_a_run_has_left_is_set_aside_in_the_store(s3, tmp_path, shards):
    flags = train_flags(shards[0], tmp_path, "--name=left", "--remote-sync=s3://data/runs", "--save-every-n-steps=1")
    main(flags)
    back = f"--resume={tmp_path / 'left/checkpoints/step_00000002.pt'}"
    main([*flags, back, "--train-num-samples=24"])
    s3.invalidate_cache()
    names = {name.rpartition("/")[2] for name in s3.ls("data/runs/left/checkpoints")}
    assert names == {f"step_{step:08d}.pt" for step in (1, 2, 3)} | {f"step_{step:08d}.pt.left" for step in (3, 4)}


def test_the_best_checkpoint_is_copied_and_comes_back(s3, tmp_path, shards):
    val = stripes_config(tmp_path, shards[0])
    flags = ["--name=best", "--remote-sync=s3://data/runs", f"--val-config={val}", "--keep-best=stripes/top1",
             "--keep-last=1", "--val-every-n-steps=1"]  # fmt: skip
    main(train_flags(shards[0], tmp_path / "here", *flags))
    record = json.loads((tmp_path / "here/best/checkpoints/best.json").read_bytes())
    s3.invalidate_cache()
    assert json.loads(s3.cat_file("data/runs/best/checkpoints/best.json")) == record
    main(train_flags(shards[0], tmp_path / "there", *flags, "--resume=latest"))
    assert json.loads((tmp_path / "there/best/checkpoints/best.json").read_bytes()) == record
    assert read_checkpoint(tmp_path / "there/best/checkpoints/best.pt")["step"] == record["step"]


def test_a_checkpoint_loads_from_its_url(runs, shards, tmp_path):
    url = "s3://data/runs/remote/checkpoints/step_00000004.pt"
    assert read_checkpoint(url)["step"] == 4
    assert list(load(url).modalities) == ["depth"]
    for missing in ("s3://data/runs/none/step_1.pt", "s3://nobucket/step_1.pt"):
        with pytest.raises(UserError, match=f"there is no {missing}"):
            read_checkpoint(missing)
    with pytest.raises(UserError, match=r"no checkpoint at s3://data/none\.pt"):
        main(train_flags(shards[0], tmp_path, "--name=x", "--resume=s3://data/none.pt"))


def test_shards_are_listed_counted_and_checked_at_the_url(shards):
    folder, url = shards
    names = [f"{url}/00000.tar", f"{url}/00001.tar"]
    for spec in (url, f"{url}/", f"{url}/*.tar", f"{url}/{{00000..00001}}.tar", "::".join(names)):
        assert expand_shards(spec) == names
    assert count_samples(indexed(names)) == dict.fromkeys(names, 16)
    checked = check_shards(url, DEPTH, decode=True)
    assert not checked.faults
    assert checked.statistics() == check_shards(folder).statistics()
    local, remote = (
        [list(read_shard(shard, DEPTH.extensions, None)) for shard in list_shards(str(spec))] for spec in (folder, url)
    )
    assert [[(key, source.read()) for key, source, *_ in shard] for shard in remote] == [
        [(key, source.read()) for key, source, *_ in shard] for shard in local
    ]


@pytest.mark.parametrize("name", ["none.tar", "none/", "none/*.tar", "depth/{00000..00002}.tar"])
def test_what_is_not_there_is_named_before_the_first_step(shards, name, tmp_path):
    with pytest.raises(UserError, match="there is no s3://data/"):
        main(train_flags(f"s3://data/{name}", tmp_path))


def test_a_shard_of_another_size_than_its_index_says_is_refused(shards, s3, tmp_path):
    s3.copy("data/depth/index.json", "data/cut/index.json")
    s3.pipe_file("data/cut/00000.tar", s3.cat_file("data/depth/00000.tar")[:-2000])
    s3.copy("data/depth/00001.tar", "data/cut/00001.tar")
    with pytest.raises(UserError, match=r"s3://data/cut/00000.tar has \d+ bytes, but its index.json says"):
        main(train_flags("s3://data/cut", tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_away_costs_its_samples(shards, s3, workers):
    name = f"data/gone{workers}"
    s3.copy("data/depth/", name, recursive=True)
    s3.invalidate_cache()
    counts = count_samples(indexed(expand_shards(f"s3://{name}")))
    s3.rm_file(f"{name}/00001.tar")
    found = batches(counts, workers=workers)
    skipped = [sample for batch in found for sample in batch.skipped]
    assert len(found) == 4
    assert 16 <= len(skipped) <= 32  # a lap, or two
    assert {sample.shard for sample in skipped} == {f"s3://{name}/00001.tar"}
    assert all(sample.reason.startswith("broken shard: ") for sample in skipped)


@pytest.mark.usefixtures("s3")
def test_a_connection_that_is_lost_costs_the_rest_of_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("languagebind.remote._BLOCK", 4096)
    folder, errors = write_shards(tmp_path / "shards", [200]), []
    with s3_server() as (server, fs):
        fs.put(f"{folder}/", "data/depth/", recursive=True)
        samples = stream_samples("s3://data/depth/00000.tar", handler=lambda error: errors.append(error) or True)
        found = [next(samples) for _ in range(20)]
        server.terminate()
        server.wait()
        begin = time.monotonic()
        found += samples
        assert time.monotonic() - begin < 20
    assert 20 <= len(found) < 200
    assert errors
    whole = {sample["__key__"]: sample for sample in stream_samples(str(folder / "00000.tar"))}
    for sample in found:  # none is made of what was left over
        assert sample["depth.png"] == whole[sample["__key__"]]["depth.png"]


def test_text_features_beside_the_shards(shards, s3):
    folder, url = shards
    fingerprint = "a" * 64
    names = expand_shards(url)
    assert text_store("auto", names, "raw", fingerprint) is None
    local = expand_shards(folder)
    for shard in local:
        write_text_features(shard, "raw", fingerprint, lambda texts: torch.randn(len(texts), 4))
    s3.put(f"{folder}/", "data/embedded/", recursive=True)
    names = expand_shards("s3://data/embedded")
    remote = text_store("cached", names, "raw", fingerprint)
    kept = text_store("cached", local, "raw", fingerprint)
    for ours, theirs in zip(names, local, strict=True):
        assert torch.equal(remote.find(ours, "a wall on the far left"), kept.find(theirs, "a wall on the far left"))
    with pytest.raises(UserError, match="another text tower"):
        text_store("auto", names, "raw", "b" * 64)
    for path in folder.glob("*.safetensors"):
        path.unlink()


def test_checkpoints_that_are_gone_are_removed_when_a_newer_one_is_there(s3, tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    s3.pipe_file("data/kept/run/checkpoints/step_00000001.pt", b"of another machine")
    sync = RemoteSync(tmp_path / "run", "s3://data/kept/run", 1000)

    def names() -> list[str]:
        sync.copy()
        return [Path(name).name for name in s3.ls("data/kept/run/checkpoints", detail=False, refresh=True)]

    for step in (2, 3):
        (checkpoints / f"step_0000000{step}.pt").write_bytes(b"weights")
    (checkpoints / ".step_00000004.pt.tmp").write_bytes(b"half")
    assert names() == [f"step_0000000{step}.pt" for step in (1, 2, 3)]
    (checkpoints / "step_00000002.pt").unlink()
    assert names() == [f"step_0000000{step}.pt" for step in (1, 3)]
    (checkpoints / "step_00000003.pt").unlink()
    assert names() == [f"step_0000000{step}.pt" for step in (1, 3)]  # the last one stays


class Deleted(MemoryFileSystem):
    """A store whose bucket was deleted."""

    protocol = "deleted"

    def put_file(self, *args, **kwargs):
        raise FileNotFoundError("The specified bucket does not exist")


def test_a_bucket_that_was_deleted_is_named(tmp_path, caplog):
    fsspec.register_implementation("deleted", Deleted, clobber=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    sync = RemoteSync(tmp_path, "deleted://bucket/run", 1000)
    sync.attempt()
    assert "cannot copy to deleted://bucket/run, trying again: " in caplog.text
    assert not sync.copied


def test_a_store_out_of_reach_neither_stops_nor_holds_up_a_run(tmp_path, monkeypatch, shards):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    flags = ["--name=run", "--remote-sync=s3://data/runs", "--remote-sync-frequency=1"]
    output = call("-m", "training.main", *train_flags(shards[0], tmp_path, *flags))
    assert len(losses(tmp_path / "run")) == 4
    assert "s3://data/runs/run lacks the last changes: cannot reach s3://data/runs/run" in output
    assert output.count("trying again") == 1


def test_a_store_that_never_answers_is_left_at_the_end(tmp_path, caplog):
    sync = RemoteSync(tmp_path, "memory://runs/run", 1000)
    sync.copy = lambda: time.sleep(5)
    sync.start()
    begin = time.monotonic()
    sync.stop(wait=0.2)
    assert time.monotonic() - begin < 2
    assert "did not finish in 0" in caplog.text


def test_other_stores_and_their_packages(tmp_path):
    fs = fsspec.filesystem("memory")
    folder = write_shards(tmp_path / "shards", [8])
    fs.put(f"{folder}/", "/depth/", recursive=True)
    assert expand_shards("memory://depth") == ["memory://depth/00000.tar"]
    assert len(batches(count_samples(indexed(expand_shards("memory://depth/*.tar"))))) == 1
    assert expand_shards(f"file://{folder}") == [f"file://{folder}/00000.tar"]
    assert local_copy(f"file://{folder}/00000.tar").read_bytes() == (folder / "00000.tar").read_bytes()
    assert not is_url("pipe:curl http://x/y.tar")
    assert len(batches({f"pipe:cat {folder}/00000.tar": 8})) == 1
    with pytest.raises(UserError, match="nope://x: Protocol not known"):
        expand_shards("nope://x")
    shutil.rmtree(folder)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match="s3://data/depth: Install s3fs"):
        expand_shards("s3://data/depth")
