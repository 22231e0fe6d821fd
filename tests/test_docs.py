"""The documents say what is true: every Python example runs."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from helpers import ROOT, call, give_own_text_tower, train_flags, wait_for, write_pairs
from lookalikes import picture, table
from PIL import Image

import languagebind
from languagebind.config import to_dict
from languagebind.data.vidal import media_paths, read_annotation
from languagebind.eval import load_dataset_config
from languagebind.modalities.image import Image as ImageOptions
from languagebind.modalities.video import Video

EXTENSIONS = {"video": ".mp4", "audio": ".wav", "depth": ".depth.png", "infrared": ".infrared.jpg"}


@pytest.fixture
def folder(toys, tmp_path, monkeypatch):
    """Where the examples run: models, audio's with its own text tower, and two scenes of the sample world."""
    shutil.copytree(toys, tmp_path / "models")
    give_own_text_tower(toys / "audio", tmp_path / "models" / "audio")
    call("-m", "languagebind.data.world", f"--output={tmp_path / 'world'}", "--num-train=2", "--num-test=8")
    root = tmp_path / "world" / "test"
    (tmp_path / "samples").mkdir()
    for letter, (key, entry) in zip("ab", read_annotation(root / "vidal.json", 2), strict=True):
        for name, extension in EXTENSIONS.items():
            place = next(paths for paths in media_paths(root, key, entry["folder"], name) if paths[0].exists())
            shutil.copy(place[0], tmp_path / "samples" / f"{letter}{extension}")
        clip = Video(num_frames=1).decode(tmp_path / "samples" / f"{letter}.mp4")  # (1, 3, H, W)
        Image.fromarray(clip[0].permute(1, 2, 0).numpy()).save(tmp_path / "samples" / f"{letter}.jpg")
    (tmp_path / "exports" / "depth-onnx").mkdir(parents=True)
    found = {"inputs": to_dict(languagebind.load(tmp_path / "models" / "depth").encoders["depth"][1])}
    (tmp_path / "exports" / "depth-onnx" / "config.json").write_text(json.dumps(found))
    monkeypatch.chdir(tmp_path)


def test_the_examples_of_the_api_page_run(folder):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert len(examples) > 10
    names = {}
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    assert names["both"].shape == (2, 16)
    assert (names["text_for_audio"] - names["text"]).abs().max() > 0.1
    assert names["tokens"].shape == (1, 8, 17, 32)
    expected = names["preprocess"]("samples/a.depth.png").numpy()
    np.testing.assert_allclose(names["inputs"][0], expected, atol=4e-6, rtol=0)  # of 0..1, divided by 0.26: 1e-6
    noise = np.random.default_rng(0).random((3, 90, 70), dtype=np.float32)
    for antialias, interpolation, mode, size in product(
        (False, True), ("bicubic", "bilinear"), ("shortest", "squash"), (32, 80)
    ):
        modality = ImageOptions(image_size=size, antialias=antialias, interpolation=interpolation, resize_mode=mode)
        found = names["fit"](noise, to_dict(modality))
        np.testing.assert_allclose(found, modality.preprocess(noise).numpy(), atol=1e-5, rtol=0)


def test_the_examples_of_the_dense_page_run(folder):
    names = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "dense.md").read_text(), re.DOTALL):
        exec(compile(example, "docs/dense.md", "exec"), names)
    assert names["patches"].shape == (1, 1, 4, 4, 16)
    assert names["classes"].shape == Image.open("samples/a.depth.png").size
    assert 0 < names["second"] < 0.98
    assert [tuple(x.shape) for x in names["pyramid"].values()] == [
        (2, 64, 32, 40), (2, 64, 16, 20), (2, 64, 8, 10), (2, 64, 4, 5),
    ]  # fmt: skip


def joined(page: str) -> str:
    """The page with each command on one line."""
    return re.sub(r" \\\n\s+", " ", page)


PAGE = joined((ROOT / "TRAIN_AND_VALIDATE.md").read_text())

TOY = {
    "--standalone": "",
    "--nproc_per_node 8": "--nproc_per_node 1",
    "node0:29500": "127.0.0.1:29571",
    "--nnodes 4": "--nnodes 1",
    "--nodes 4 --gpus-per-node 8 --ntasks-per-node 8": "--ntasks-per-node 2",
}
# Two tests of their own: what makes the environment of these tests, and the demo, which takes a quarter of an hour.
ELSEWHERE = {"bash scripts/setup.sh", "bash scripts/demo.sh"}


def commands(page: str) -> list[str]:
    """The commands of a page, in a table, an indented line or a sentence."""
    found = re.findall(
        r"(?:(?<=`)|^|(?<=    ))((?:python|torchrun --|bash|sbatch|languagebind [^\s`]+ )[^`\n]*)", page, re.MULTILINE
    )
    return sorted({line.strip() for line in found if " " in line and "…" not in line} - ELSEWHERE)


def python(line: str) -> list[str]:
    """What Python is started with for a command of a page."""
    program, *words = shlex.split(line)
    return words if program == "python" else ["-m", program, *words]


FIRST_RUN = re.search(r"```bash\n(python -m languagebind.data.world.*?)```", PAGE, re.DOTALL)[1].splitlines()
TRAINING = [
    line for line in commands(PAGE) if "-m training.main" in line and "--train-data" in line and line not in FIRST_RUN
]
FOLLOWING = {
    "embed": "languagebind embed-text",
    "help": "python -m training.main --modality depth --help",
    "script": "bash scripts/train_depth.sh",
    "resume": "python -m training.main --config logs/depth-1/config.yaml --resume latest",
    "export": "languagebind export",
    "eval": "languagebind eval",
    "eval all": "bash scripts/eval_depth.sh",
    "slurm": "sbatch",
}


@pytest.mark.parametrize("line", TRAINING)
def test_the_training_commands_run_at_toy_size(line, depth_shards, tmp_path):
    for there, here in {**TOY, "--remote-sync s3://bucket/runs": f"--remote-sync file://{tmp_path}/store"}.items():
        line = line.replace(there, here)
    words = shlex.split(line)
    several = line.count("--config") > 1  # modalities in one run
    shards = write_pairs(tmp_path / "pairs", [16, 16]) if several else depth_shards
    more = train_flags(shards, tmp_path, "--lora-rank=2", "--workers=0", "--encoder-tower", "none", "--epochs=1")
    more = [flag for flag in more if not (several and flag == "--modality=depth")]
    module = words[1:] if words[0] == "python" else ["-m", "torch.distributed.run", *words[1:]]
    call(*module, *more, "--text-pretrained=none")
    assert list(tmp_path.glob("*/checkpoints/step_*.pt"))


def test_the_first_run_of_the_page(tmp_path):
    more = {"training.main": [f"--logs={tmp_path}/logs", "--depth=1"], "eval": [f"--output={tmp_path}/results"]}
    for line in FIRST_RUN:
        words = python(re.sub(r"(?<= )(?=(world|shards|logs|results)\b)", f"{tmp_path}/", line))
        call(*words, *more.get(words[1], more.get(words[2], [])))
    assert (tmp_path / "logs/first/checkpoints/step_00000012.pt").is_file()
    assert (tmp_path / "results/report.html").is_file()


def test_the_commands_around_a_training_run_at_toy_size(depth_shards, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VENV", sys.prefix)
    monkeypatch.delenv("NPROC", raising=False)
    shutil.copytree(depth_shards, tmp_path / "data/depth")
    for number, scene in enumerate(("bedroom", "kitchen", "office")):
        place = tmp_path / "data/Depth/nyuv2/data/val" / scene / "0.png"
        place.parent.mkdir(parents=True)
        Image.fromarray(np.full((60, 80), 1000 * (1 + number), np.uint16)).save(place)
    rest = [line for line in commands(PAGE) if line not in FIRST_RUN]
    lines = {what: [line for line in rest if line.startswith(start)] for what, start in FOLLOWING.items()}
    assert sorted(sum(lines.values(), TRAINING + FIRST_RUN)) == commands(PAGE), (
        "a command of the page that no test runs"
    )

    def run(what: str, *more: str) -> str:
        (line,) = lines[what]
        for there, here in {
            "step_00002949": "step_00000012", "logs/": f"{tmp_path}/logs/", "results/": f"{tmp_path}/results/",
            "exports/": f"{tmp_path}/exports/", " /data": f" {tmp_path}/data",
        }.items():  # fmt: skip
            line = line.replace(there, here)
        if line.startswith(("python", "languagebind")):
            return call(*python(line), *more)
        done = subprocess.run([*shlex.split(line), *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    small = train_flags(tmp_path / "data/depth", tmp_path / "logs", "--encoder-tower=none", "--epochs=1")
    tower = [f"--text-tower=local-dir:{clip_folder}", "--text-pretrained=none"]
    run("script", *small, *tower)
    assert "--patch-dropout" in run("help")
    assert "nothing to do: 12 steps are done" in run("resume")
    run("embed", "--caption-source=raw", *tower)
    assert "text features" in run("resume")
    run("export")
    assert (tmp_path / "exports/depth-1/config.json").is_file()
    run("eval")
    one = json.loads(next((tmp_path / "results").glob("*.json")).read_bytes())
    assert one["dataset"] == "nyu_v2"
    run("eval all", f"--output={tmp_path / 'again'}")
    again = json.loads(next((tmp_path / "again").glob("*.json")).read_bytes())
    assert [again[key] for key in ("dataset", "metrics", "protocol")] == [
        one[key] for key in ("dataset", "metrics", "protocol")
    ]


SBATCH = """#!/bin/bash
# What SLURM does for a job of one node: its variables, and the script's own copy of the environment.
while [[ "$1" == --* ]]; do [ "$1" = --ntasks-per-node ] && tasks="$2"; shift 2; done
export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=localhost SLURM_NTASKS="$tasks" SLURM_SUBMIT_DIR="$PWD"
exec bash "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" > "$(dirname "$0")/scontrol.log"; fi
"""
SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys
command = sys.argv[2:]
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_job_of_slurm_saves_queues_again_and_goes_on(depth_shards, tmp_path, monkeypatch):
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("VENV", sys.prefix)
    (line,) = [line for line in commands(PAGE) if line.startswith("sbatch")]
    for there, here in TOY.items():
        line = line.replace(there, here)
    flags = train_flags(depth_shards, tmp_path, "--epochs=500", "--encoder-tower=none", "--save-every-n-steps=0")
    command, log = [*shlex.split(line), *flags, "--text-pretrained=none"], tmp_path / "depth-1/out.log"

    def part(until: str) -> None:
        """Run the job until its log says something; then SLURM's signal comes to the batch script alone."""
        job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: log.exists() and until in log.read_text())
            job.send_signal(signal.SIGUSR1)
            assert job.wait(60) == 0
        finally:
            job.kill()

    part("| step 2 ")
    (step,) = [path.stem for path in (tmp_path / "depth-1/checkpoints").iterdir()]
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert "stopped by SIGUSR1 after step" in log.read_text()
    part(f"{step}.pt at step")
    assert len(list((tmp_path / "depth-1/checkpoints").iterdir())) == 2


def test_the_worked_example_of_a_new_dataset(toys, tmp_path):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    example = page.partition("## Add a dataset")[2]
    config, lines = (re.search(rf"```{kind}\n(.*?)```", example, re.DOTALL)[1] for kind in ("yaml", "bash"))
    (tmp_path / "birds.yaml").write_text(config)
    names = {"wren": "a small brown bird", "heron": "grey, in the water", "swift": "a bird", "owl": "not of the test"}
    rows = [(name, "train" if name == "owl" else "test", text) for name, text in names.items()]
    table(tmp_path / "downloads" / "birds" / "birds.csv", [("file", "split", "text"), *rows])
    for name in names:
        picture(tmp_path / "downloads" / "birds" / "photos" / f"{name}.jpg")
    here = {
        "LanguageBind/LanguageBind_Image": str(toys / "image"), " birds.yaml": f" {tmp_path}/birds.yaml",
        "/downloads": f"{tmp_path}/downloads", " /data": f" {tmp_path}/data", "results/": f"{tmp_path}/results/",
    }  # fmt: skip
    for there, place in here.items():
        lines = lines.replace(there, place)
    for line in joined(lines).splitlines():
        call(*python(line))
    result = json.loads(next((tmp_path / "results").glob("birds_*.json")).read_bytes())
    assert (result["protocol"]["samples"], result["protocol"]["captions"]) == (3, 3)
    assert load_dataset_config(tmp_path / "birds.yaml", tmp_path / "data").metric in result["metrics"]
    assert all(f"`{key}`" in page for key in result), "a key of the result that the page leaves out"


def published_table(config) -> str:
    """The figures of a dataset's config, in percent, as its page has them."""
    names = {"text_to_modality/": "from ", "modality_to_text/": "to ", "_rank": ""}
    metrics = list(dict.fromkeys(metric for row in config.published for metric in row["values"]))
    header = ["model", *metrics, "source"]
    lines = [
        re.sub("|".join(names), lambda found: names[found[0]], " | ".join(header)),
        "|".join(["---"] * len(header)),
    ]
    for row in config.published:
        cells = [
            "" if metric not in row["values"] else f"{row['values'][metric]:g}" if metric.endswith("_rank")
            else f"{100 * row['values'][metric]:.1f}"
            for metric in metrics
        ]  # fmt: skip
        where = row["where"].replace("LanguageBind, arXiv 2310.01852v7", "paper")
        lines.append(" | ".join([row["model"], *cells, where]))
    return "\n".join(f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_dataset_has_its_page_with_the_figures_of_its_config(path):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    section = re.split("(?m)^##", page.partition(f"- **Config:** [`{path.name}`]")[2])[0]
    config = load_dataset_config(path, "/data", prepared=False)
    assert section, f"docs/evaluation.md says nothing of {path.name}"
    text = " ".join(section.split())  # lines are wrapped
    assert config.source in text
    assert f"`{config.metric}`" in section
    assert all(re.search(rf"\b{count:,} {what}", text) for what, count in config.expect.items())
    table = published_table(config)
    assert f"\n{table}\n" in section if config.published else "\n| model |" not in section, f"expected:\n{table}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
