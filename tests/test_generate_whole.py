"""The whole generation: from videos with sound and titles to trained encoders, by every runner; memory and speed."""

import json
import subprocess

import pytest
import torch
from depth_models import depth_anything, glpn
from generating import STEP, report
from helpers import call, call_ranks

from languagebind.data.vidal import read_annotation
from languagebind.generate.__main__ import main

pytestmark = pytest.mark.slow

SCENES = 24
RUNNERS = {
    "processes": lambda *words: call(*STEP, *words, "--workers=2", "--batch-size=3"),
    "ranks": lambda *words: call_ranks(2, *STEP, *words, "--workers=0", "--batch-size=2"),
    "ray": lambda *words: call(*STEP, *words, "--engine=ray", "--workers=2", "--batch-size=4", fresh=True),
}


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


def generate(runner, world, root, models, url):
    """Take the videos and titles through every step."""
    root.mkdir()
    flags = [f"--annotation={root / 'vidal.json'}", f"--root={root}"]
    titles = f"--titles={world / 'videos/titles.tsv'}"
    main(["annotate", f"--videos={world / 'videos'}", titles, "--folder=world", *flags])
    server = [f"--endpoint={url}", "--api-model=m"]
    for step, more in {
        "frames": [], "sound": [], "depth": [f"--model={models / 'depth_anything'}"],
        "infrared": [f"--model={models / 'warmth.pt2'}"], "captions": server, "polish": server,
        "filter": ["--min-seconds=0.5", "--max-cuts=3"],
    }.items():  # fmt: skip
        RUNNERS[runner](step, *flags, *more)
        found = report(root, step)
        assert (found["entries"], found["made"], found["failed"]) == (SCENES, SCENES, 0), step
    main(["report", *flags])
    return root


def count(root, entries, *options):
    """Run the counting step on so many entries; return what it prints, and the times of its results."""
    root.mkdir()
    path = root / "vidal.json"
    path.write_text(json.dumps({f"clip{k:08d}": {"folder": "clips", "raw": f"title {k}"} for k in range(entries)}))
    found = json.loads(call("tests/counting_step.py", str(path), str(root), *options, fresh=True).splitlines()[-1])
    assert found["made"] == entries
    return found | {"times": sorted(float(fields["mplug"].split()[0]) for _, fields in read_annotation(path))}


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_memory_does_not_grow_with_the_annotation(engine, tmp_path):
    few, many = (count(tmp_path / str(n), n, engine, "1", "0") for n in (1000, 100_000))
    print(engine, [(found["MB"], found["MB of a worker"]) for found in (few, many)])
    assert many["MB"] < few["MB"] + 30
    assert many["MB of a worker"] < few["MB of a worker"] + 30


def test_two_workers_of_ray_are_faster_than_one(tmp_path):
    spans = []
    for workers in (1, 2):
        found = count(tmp_path / str(workers), 400, "ray", str(workers), "0.05")
        spans.append(found["times"][-1] - found["times"][0])
        print(f"{workers} workers: {spans[-1]:.1f} s, {found['seconds']:.1f} s with Ray's start")
    assert spans[0] > 1.6 * spans[1]
