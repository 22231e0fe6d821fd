"""Imports point one way: scripts, tests -> training -> languagebind.eval -> languagebind core."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

MODALITIES = {f"languagebind.modalities.{path.stem}" for path in (ROOT / "languagebind/modalities").glob("[!_]*.py")}
CORE = {f"languagebind.{name}" for name in ("model", "vit", "transformer", "text", "lora", "tuning", "loss", "weights")}

# (files, exceptions, what they must not import)
FORBIDDEN = [
    ("languagebind/**/*.py", (), {"training", "scripts", "tests"}),
    (
        "languagebind/*.py",
        ("encoders.py", "factory.py", "hub.py", "sentence.py", "__init__.py"),
        {"languagebind.modalities", "languagebind.eval", "languagebind.data"},
    ),
    ("languagebind/hub.py", (), MODALITIES | {"languagebind.eval"}),
    (
        "languagebind/modalities/*.py",
        (),
        CORE | MODALITIES | {"languagebind.hub", "languagebind.eval", "languagebind.data"},
    ),
    ("languagebind/eval/**/*.py", (), MODALITIES),
    ("training/*.py", (), MODALITIES | {"scripts", "tests"}),
]
# A package that one module alone may import, and then only when it is needed.
ONLY_IN = {
    "wandb": {"training/logger.py"},
    "open_clip": {"languagebind/text.py", "languagebind/weights.py"},
    "peft": {"languagebind/lora.py"},
}


@pytest.mark.parametrize(("files", "exceptions", "forbidden"), FORBIDDEN)
def test_imports_point_one_way(files, exceptions, forbidden):
    breaches = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in ROOT.glob(files)
        if path.name not in exceptions
        for name in imported(path)
        if any(name == other or name.startswith(other + ".") for other in forbidden)
    ]
    assert not breaches


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_in_its_own_place(package):
    places = {
        str(path.relative_to(ROOT))
        for folder in ("languagebind", "training", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if any(name.partition(".")[0] == package for name in imported(path))
    }
    assert places <= ONLY_IN[package]


def test_nothing_but_the_modalities_names_a_modality_class():
    names = {path.stem for path in (ROOT / "languagebind/modalities").glob("[!_]*.py")}
    breaches = []
    for path in [
        *(ROOT / "training").glob("*.py"),
        *(ROOT / "languagebind").glob("*.py"),
        *(ROOT / "languagebind/eval").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                breaches.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value!r}")
    assert not breaches


def test_importing_the_library_imports_neither_torch_nor_decoders():
    heavy = {"torch", "cv2", "decord", "torchaudio", "open_clip"}
    code = f"import sys, languagebind; print(sorted({heavy} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def imported(path):
    """Full names of all that a file imports, wherever in it."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    package = module.removesuffix(".__init__") if module.endswith(".__init__") else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, node.module] if node.module else base)
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
            yield prefix
