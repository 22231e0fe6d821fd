"""The documents say what is true: every Python example runs."""

import re
import shutil

import pytest
from helpers import ROOT, call
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


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
