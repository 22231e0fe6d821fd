"""Imports point one way, down the floors, and never in a circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT

MODALITIES = {f"languagebind.modalities.{path.stem}" for path in (ROOT / "languagebind/modalities").glob("[!_]*.py")}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("languagebind", "training", "scripts")
    for path in (ROOT / folder).rglob("*.py")
}
# From the ground up, the longest name that fits counts: a file imports from its own floor and those below it.
FLOORS = {
    "languagebind": 0,
    "languagebind.modalities": 1,
    "languagebind.data": 2,
    "languagebind.hub": 3,
    "languagebind.sentence": 4,
    "languagebind.eval.data": 4,
    "languagebind.eval.score": 5,
    "languagebind.eval": 6,
    "languagebind.eval.prepare": 7,
    "languagebind.eval.report": 7,
    "languagebind.partner": 7,
    "languagebind.generate": 7,
    "languagebind.index": 7,
    "languagebind.indexing": 7,
    "languagebind.app": 8,
    "training": 8,
    "scripts": 9,
}
# The package's public names and the Auto classes name models, each when it is first used.
DOORS = {"languagebind", "languagebind._auto"}
# A modality and a model know nothing of each other.
MODELS = {
    f"languagebind.{name}"
    for name in ("model", "vit", "transformer", "text", "clip_text", "lora", "tuning", "loss", "weights")
}
# A package that one module alone may import, and then only when it is needed.
ONLY_IN = {
    "wandb": {"training/logger.py"},
    "open_clip": {"languagebind/text.py", "languagebind/weights.py"},
    "peft": {"languagebind/lora.py"},
    "openai": {"languagebind/generate/chat.py"},
}


def test_imports_point_down_the_floors():
    breaches = [
        f"{name} imports {other}"
        for name, others in graph().items()
        if name not in DOORS
        for other in others
        if floor(other) > floor(name)
    ]
    assert not breaches


def test_no_imports_make_a_circle():
    """Those inside functions and under TYPE_CHECKING too. Raises CycleError, which names the circle."""
    TopologicalSorter({name: others - DOORS for name, others in graph().items()}).prepare()


def test_modalities_and_models_know_nothing_of_each_other():
    breaches = [
        f"{name} imports {other}"
        for name, others in graph().items()
        if name not in DOORS
        for other in others
        if other in MODALITIES or (name.startswith("languagebind.modalities.") and other in MODELS)
    ]
    assert not breaches


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_in_its_own_place(package):
    places = {
        str(path.relative_to(ROOT))
        for path in FILES.values()
        if any(name.partition(".")[0] == package for name in imported(path))
    }
    assert places <= ONLY_IN[package]


def test_nothing_but_the_modalities_names_a_modality_class():
    names = {name.rpartition(".")[2] for name in MODALITIES}
    breaches = [
        f"{name}:{node.lineno} {node.value!r}"
        for name, path in FILES.items()
        if name.startswith("training") or floor(name) in (0, 4, 5, 6)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not breaches


def test_importing_the_library_imports_neither_torch_nor_decoders():
    heavy = {"torch", "cv2", "decord", "torchaudio", "open_clip"}
    code = f"import sys, languagebind; print(sorted({heavy} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def graph():
    """Of each of our modules, those of our modules that it imports, wherever in it."""
    found = {}
    for name, path in FILES.items():
        names = {next((parent for parent in parents(other) if parent in FILES), None) for other in imported(path)}
        found[name] = names - {None, name}
    return found


def parents(name):
    """`a.b.c`, `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def floor(name):
    return next(FLOORS[parent] for parent in parents(name) if parent in FLOORS)


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
