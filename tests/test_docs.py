"""The documents say what is true: every Python example runs."""

import re
import shutil

import pytest
from helpers import ROOT

NAMES = {"video": ".mp4", "audio": ".wav", "depth": ".depth.png", "thermal": ".infrared.jpg", "image": ".jpg"}


@pytest.fixture
def folder(toys, files, tmp_path, monkeypatch):
    """Where the examples run: models, and two samples of each modality."""
    shutil.copytree(toys, tmp_path / "models")
    (tmp_path / "samples").mkdir()
    for name, extension in NAMES.items():
        for letter, file in zip("ab", files[name], strict=True):
            shutil.copy(file, tmp_path / "samples" / f"{letter}{extension}")
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
