"""The whole generation: from videos with sound and titles to trained encoders, by every runner; memory and speed."""

import json
import subprocess
import sys
import urllib.request

import pytest
import torch
from depth_models import depth_anything, glpn
from generating import RUNNERS, end_step, report
from helpers import ROOT, call, free_port, wait_for
from test_generate_captions import models as chat_models  # noqa: F401 - a fixture

from languagebind.data.making import main as make_shards
from languagebind.data.vidal import read_annotation
from languagebind.generate.__main__ import main

pytestmark = pytest.mark.slow

SCENES = 24
MODALITIES = ("audio", "depth", "infrared", "video")


class Warmth(torch.nn.Module):
    """An infrared net: red is warm, and edges are dark."""

    def forward(self, x):
        return (x[:, :1] - 0.5 * x[:, 2:]).roll(1, 3) + 0.1 * torch.nn.functional.avg_pool2d(x[:, 1:2], 3, 1, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The sample world's videos with their sounds in one folder, and a table of titles: nothing else of it."""
    folder = tmp_path_factory.mktemp("world")
    sizes = [f"--num-train={SCENES}", "--num-test=24", "--workers=2"]
    call("-m", "languagebind.data.world", f"--output={folder}", *sizes)
    videos = folder / "videos"
    videos.mkdir()
    rows = ["path\ttitle"]
    for key, fields in read_annotation(folder / "train/vidal.json"):
        parts = [folder / f"train/world_resize256_skip15/{key}.mp4", folder / f"train/world_audio/{key}.wav"]
        words = ["ffmpeg", "-v", "error", "-i", parts[0], "-i", parts[1], "-c:v", "copy", "-c:a", "aac"]
        subprocess.run([*words, videos / f"{key}.mp4"], check=True)
        rows.append(f"{key}.mp4\t{fields['raw']}")
    (videos / "titles.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    for make in (glpn, depth_anything):
        (folder / make.__name__).mkdir()
        make(folder / make.__name__)
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    exported = torch.export.export(Warmth().eval(), (torch.rand(2, 3, 96, 112),), dynamic_shapes=[free])
    torch.export.save(exported, folder / "warmth.pt2")
    return folder


@pytest.fixture(scope="module")
def served(chat_models, tmp_path_factory):  # noqa: F811
    """The flags of a step that asks a LLaVA with random weights behind `transformers serve`."""
    model, port = chat_models / "llava", free_port()
    serve = ["-m", "transformers.cli.transformers", "serve", str(model), f"--port={port}", "--device=cpu"]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, *serve], stdout=file, stderr=file)

    def healthy():
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200
        except OSError:
            assert process.poll() is None, log.read_text()
            return False

    try:
        wait_for(healthy, 120)
        yield [f"--endpoint=http://127.0.0.1:{port}/v1", f"--api-model={model}", "--concurrency=1"]
    finally:
        process.kill()
        process.wait()


def generate(runner, world, root, models, served):
    """Take the videos and titles through every step."""
    root.mkdir()
    flags = [f"--annotation={root / 'vidal.json'}", f"--root={root}"]
    titles = f"--titles={world / 'videos/titles.tsv'}"
    main(["annotate", f"--videos={world / 'videos'}", titles, "--folder=world", *flags])
    size = {"processes": 3, "ranks": 2, "ray": 4}[runner]
    for step, more in {
        "frames": [], "sound": [], "depth": [f"--model={models / 'depth_anything'}"],
        "infrared": [f"--model={models / 'warmth.pt2'}"], "captions": served, "polish": served,
        "filter": ["--min-seconds=0.5", "--max-cuts=3", "--near-duplicates=4"],
    }.items():  # fmt: skip
        end_step(runner, step, *flags, *more, f"--batch-size={size}")
        found = report(root, step)
        assert (found["entries"], found["made"], found["failed"]) == (SCENES, SCENES, 0), step
    main(["report", *flags])
    return root


def results(root):
    """The files of the layout, and the annotation."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(("generate", "."))}


@pytest.fixture(scope="module")
def made(world, models, served, tmp_path_factory):
    return generate("processes", world, tmp_path_factory.mktemp("made") / "root", models, served)


@pytest.mark.parametrize("runner", [name for name in RUNNERS if name != "processes"])
def test_every_runner_makes_the_same_bytes(runner, world, made, models, served, tmp_path):
    other = results(generate(runner, world, tmp_path / "root", models, served))
    assert other == results(made)
    assert len(other) == 1 + SCENES * (8 + 1 + 1 + 8 + 8)


def test_glpn_estimates_depth_too(made, models, tmp_path):
    flags = [f"--annotation={made / 'vidal.json'}", f"--root={tmp_path}"]
    (tmp_path / "world_resize256_skip15").symlink_to(made / "world_resize256_skip15")
    end_step("processes", "depth", *flags, f"--model={models / 'glpn'}")
    assert report(tmp_path, "depth")["made"] == SCENES


@pytest.mark.parametrize("name", MODALITIES)
def test_the_result_packs_trains_and_scores(name, world, made, tmp_path):
    shards, logs = tmp_path / "shards", tmp_path / "logs"
    source = [f"--annotation={made / 'vidal.json'}", f"--root={made}", f"--modality={name}"]
    make_shards(["vidal", *source, f"--output={shards}", "--samples-per-shard=8"])
    config = ROOT / f"configs/demo/{name}.yaml"
    left_out = sum("left_out" in fields for _, fields in read_annotation(made / "vidal.json"))
    assert json.loads((shards / "index.json").read_bytes())["samples"] == SCENES - left_out
    call("-m", "training.main", f"--config={config}", f"--train-data={shards}", f"--logs={logs}", "--name=run",
         "--epochs=1", "--batch-size=8", "--warmup=1", "--text-features=live")  # fmt: skip
    config = world / f"eval/{name}_test.yaml"
    call(
        "-m", "languagebind.eval", f"--config={config}", f"--checkpoint={logs / 'run'}", f"--output={logs / 'results'}"
    )
    (found,) = (logs / "results").glob("*.json")
    assert 0 <= json.loads(found.read_bytes())["metrics"]["top1"] <= 1


def count(root, entries, *options):
    """Run the counting step on so many entries; return what it prints, and the times of its results."""
    root.mkdir()
    path = root / "vidal.json"
    path.write_text(json.dumps({f"clip{k:08d}": {"folder": "clips", "raw": f"title {k}"} for k in range(entries)}))
    found = json.loads(call("tests/counting_step.py", str(path), str(root), *options, fresh=True).splitlines()[-1])
    assert found["made"] == entries
    captions = [fields["mplug"].split() for _, fields in read_annotation(path)]
    times, peaks = zip(*[(float(seconds), float(peak)) for seconds, peak in captions], strict=True)
    return found | {"times": sorted(times), "MB of a worker": max(peaks)}


@pytest.mark.parametrize(("engine", "more"), [("processes", 30), ("ray", 60)])  # Ray's driver is flat from 300,000 on
def test_memory_does_not_grow_with_the_annotation(engine, more, tmp_path):
    few, many = (count(tmp_path / str(n), n, engine, "1", "0") for n in (1000, 100_000))
    print(engine, [(found["MB"], found["MB of a worker"]) for found in (few, many)])
    assert many["MB"] < few["MB"] + more
    assert many["MB of a worker"] < few["MB of a worker"] + more


def test_two_workers_of_ray_are_faster_than_one(tmp_path):
    spans = []
    for workers in (1, 2):
        found = count(tmp_path / str(workers), 400, "ray", str(workers), "0.05")
        spans.append(found["times"][-1] - found["times"][0])
        print(f"{workers} workers: {spans[-1]:.1f} s, {found['seconds']:.1f} s with Ray's start")
    assert spans[0] > 1.6 * spans[1]
