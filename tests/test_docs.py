"""The documents say what is true: every Python example runs."""

import re
import shlex
import shutil

import pytest
from helpers import ROOT, call, train_flags
from PIL import Image

from languagebind.data.vidal import media_paths, read_annotation
from languagebind.modalities.video import Video

EXTENSIONS = {"video": ".mp4", "audio": ".wav", "depth": ".depth.png", "infrared": ".infrared.jpg"}


@pytest.fixture
def folder(toys, tmp_path, monkeypatch):
    """Where the examples run: models, and two scenes of the sample world in each modality."""
    shutil.copytree(toys, tmp_path / "models")
    call("-m", "languagebind.data.world", f"--output={tmp_path / 'world'}", "--num-train=2", "--num-test=8")
    root = tmp_path / "world" / "test"
    (tmp_path / "samples").mkdir()
    for letter, (key, entry) in zip("ab", read_annotation(root / "vidal.json", 2), strict=True):
        for name, extension in EXTENSIONS.items():
            place = next(paths for paths in media_paths(root, key, entry["folder"], name) if paths[0].exists())
            shutil.copy(place[0], tmp_path / "samples" / f"{letter}{extension}")
        clip = Video(num_frames=1).decode(tmp_path / "samples" / f"{letter}.mp4")  # (1, 3, H, W)
        Image.fromarray(clip[0].permute(1, 2, 0).numpy()).save(tmp_path / "samples" / f"{letter}.jpg")
    monkeypatch.chdir(tmp_path)


def test_the_examples_of_the_api_page_run(folder):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert len(examples) > 10
    names = {}
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    assert names["both"].shape == (2, 16)
    assert names["tokens"].shape == (1, 8, 17, 32)


TOY = {
    "--standalone": "",
    "--nproc_per_node 8": "--nproc_per_node 1",
    "node0:29500": "127.0.0.1:29571",
    "--nnodes 4": "--nnodes 1",
}


def commands(page: str) -> list[str]:
    """The training commands of a page, in a table, an indented line or a sentence."""
    found = re.findall(r"(?:python|torchrun [^`\n]*?) ?-m training\.main[^`\n]*", page)
    return sorted({line.strip() for line in found if "--train-data" in line})


@pytest.mark.parametrize("line", commands((ROOT / "TRAIN_AND_VALIDATE.md").read_text()))
def test_the_training_commands_run_at_toy_size(line, depth_shards, tmp_path):
    for there, here in {**TOY, "--remote-sync s3://bucket/runs": f"--remote-sync file://{tmp_path}/store"}.items():
        line = line.replace(there, here)
    words = shlex.split(line)
    more = train_flags(depth_shards, tmp_path, "--lora-rank=2", "--workers=0", "--encoder-tower", "none", "--epochs=1")
    module = words[1:] if words[0] == "python" else ["-m", "torch.distributed.run", *words[1:]]
    call(*module, *more, "--text-pretrained=none")
    assert list(tmp_path.glob("*/checkpoints/step_*.pt"))


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
