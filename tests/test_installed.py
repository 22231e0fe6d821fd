"""An installed package without a checkout: its files, the console command, and configs by name."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import languagebind
from languagebind import configs
from languagebind.__main__ import COMMANDS, main
from languagebind.config import UserError, load_yaml
from languagebind.eval import evaluate, load_dataset_config
from languagebind.eval.data.pairing import load_pairs_config
from languagebind.eval.models import load_eval_model
from training.params import parse_args

SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "languagebind", "training", "configs")
CACHES = shutil.ignore_patterns("__pycache__")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as pip installs it, from a wheel of a source archive, without a network."""
    root = tmp_path_factory.mktemp("installed")
    (root / "sources").mkdir()
    for name in SOURCES:
        source, target = ROOT / name, root / "sources" / name
        shutil.copytree(source, target, ignore=CACHES) if source.is_dir() else shutil.copy(source, target)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, root], cwd=root / "sources", check=True, capture_output=True)
    (archive,) = root.glob("*.tar.gz")
    offline, elsewhere = ["--no-index", "--no-deps"], tmp_path_factory.mktemp("elsewhere")
    subprocess.run([*PIP, "wheel", *offline, "--no-build-isolation", "-w", root, archive], cwd=elsewhere, check=True)
    (wheel,) = root.glob("*.whl")
    subprocess.run([*PIP, "install", *offline, "--target", root / "there", wheel], cwd=elsewhere, check=True)
    return root / "there"


def run(installed: Path, folder: Path, *words: str | Path) -> str:
    """Run a program that imports the installed package, in a folder without a checkout; return its output."""
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> dict[str, bytes]:
    """What each file below a folder holds, without Python's caches."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_wheel_holds_every_file(installed):
    ours = {f"languagebind/{name}": data for name, data in files(ROOT / "languagebind").items()}
    ours |= {f"languagebind/_configs/{name}": data for name, data in files(ROOT / "configs").items()}
    ours |= {f"training/{name}": data for name, data in files(ROOT / "training").items()}
    found = {name: data for name, data in files(installed).items() if name.startswith(("languagebind/", "training/"))}
    assert found == ours
    assert {"languagebind/py.typed", "languagebind/eval/report/templates/style.css"} <= found.keys()


def test_help_lists_the_commands_without_importing_torch(installed, tmp_path):
    code = "import sys; from languagebind.__main__ import main; [main([word]) for word in sys.argv[1:]]; print("
    words = [sys.executable, "-c", f"{code}'torch' in sys.modules)", "--help", "--version", "configs"]
    printed = run(installed, tmp_path, *words).splitlines()
    assert all(any(line.startswith(f"  {name} ") for line in printed) for name in COMMANDS)
    assert f"languagebind {languagebind.__version__}" in printed
    assert any(line.startswith("dataset: activitynet, ") and ", msrvtt, " in line for line in printed)
    assert printed[-1] == "False"


# Trains with a recipe's name, then evaluates the run through the console entry, whose words follow `then`.
TRAIN_THEN = """
import runpy, sys
from training.main import main
then = sys.argv.index("then")
main(sys.argv[1:then])
sys.argv = sys.argv[then + 1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_train_and_evaluate_by_name(installed, depth_shards, clip_folder, tmp_path):
    rng = np.random.default_rng(0)
    for scene in ("bedroom", "kitchen", "office"):
        place = tmp_path / "data/Depth/nyuv2/data/val" / scene
        place.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(rng.integers(500, 9000, (60, 80)).astype(np.uint16)).save(place / f"{number}.png")
    (tmp_path / "nyu_v2").mkdir()  # a folder does not hide the config of its name
    training = ["--config=demo/depth", "--model=vit-s-16", f"--train-data={depth_shards}", "--caption-source=raw",
                f"--text-tower=local-dir:{clip_folder}", "--text-pretrained=none", "--batch-size=32", "--epochs=1",
                "--workers=0", "--depth=1", "--name=first", "--device=cpu"]  # fmt: skip
    evaluation = ["eval", "--checkpoint=logs/first", "--config=nyu_v2", "--data-root=data", "--workers=0",
                  "--device=cpu"]  # fmt: skip
    words = [*training, "then", installed / "bin" / "languagebind", *evaluation]
    run(installed, tmp_path, sys.executable, "-c", TRAIN_THEN, *words)
    assert load_yaml(tmp_path / "logs/first/config.yaml")["model"]["encoder"]["mlp_dim"] == "512", "of the recipe"
    found = json.loads((tmp_path / "results/nyu_v2_first.json").read_bytes())
    model, modality = load_eval_model(str(tmp_path / "logs/first"), torch.device("cpu"))
    dataset = load_dataset_config(ROOT / "configs/eval/nyu_v2.yaml", tmp_path / "data")
    expected = evaluate(model, modality, dataset, workers=0)
    assert found["protocol"] == expected["protocol"]
    assert found["protocol"]["samples"] == 9
    assert found["metrics"] == expected["metrics"]


# ---------------------------------------------------------------------------------------------- in this process


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"configs"}))
def test_every_command_has_help(name, capsys):
    with suppress(SystemExit):
        main([name, "--help"])
    assert f"languagebind {name}" in capsys.readouterr().out


def test_mistakes_at_the_command(monkeypatch):
    with pytest.raises(UserError, match="no command 'train': choose from eval, pairs, "):
        main(["train"])
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "languagebind.data.checking", raising=False)
    with pytest.raises(UserError, match=r"check-shards needs the package tyro: pip install 'languagebind\[eval\]'"):
        main(["check-shards", "data"])


def test_names_are_those_of_the_files():
    names = languagebind.configs.list()
    found = [path for kind in names.values() for path in kind.values()]
    assert sorted(found) == sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("configs/**/*.json")])
    assert names["dataset"]["nyu_v2"] == ROOT / "configs/eval/nyu_v2.yaml"
    assert {"depth", "demo/depth", "video_v1.5_huge"} <= names["recipe"].keys()
    assert {kind: len(files) for kind, files in names.items() if not files} == {}


def test_names_stand_for_files():
    by_name = parse_args(["--config", "video_v1.5_huge", "--model", "vit-b-32", "--val-config", "msrvtt", "esc50"])
    files = [f"--config={ROOT}/configs/video_v1.5_huge.yaml", f"--model={ROOT}/configs/model/vit-b-32.yaml"]
    assert by_name == parse_args([*files, "--val-config", "msrvtt", "esc50"])
    assert by_name.model.encoder.patch_size == 32
    folder, where = ROOT / "configs" / "eval", (Path("/data"), False)
    assert load_dataset_config("audioset", *where) == load_dataset_config(folder / "audioset.yaml", *where)
    pairs = folder / "pairs/nyu_v2_depth_rgb.yaml"
    assert load_pairs_config(pairs.stem, *where) == load_pairs_config(pairs, *where)
    assert configs.find("zero2_offload", "deepspeed") == ROOT / "configs/deepspeed/zero2_offload.json"


def test_a_file_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "esc50").mkdir()
    assert configs.find("esc50", "dataset") == ROOT / "configs/eval/esc50.yaml"
    (tmp_path / "clotho").write_text("task: retrieval\ndata: mine\n")
    assert load_dataset_config("clotho").data == "mine"
    assert load_dataset_config("esc50", tmp_path).templates == ("a sound of {c}.",)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ("nyu_v3", "dataset", "^no dataset 'nyu_v3'; pass a file or one of activ.*sound. Did you mean nyu_v2.$"),
        ("vitl14", "model", "one of vit-b-16, .*vit-l-14, .*, vit-tiny-demo. Did you mean vit-l-14.$"),
        ("demo/smell", "recipe", "^no recipe 'demo/smell'; .*, demo/video"),
        ("xyz", "comparison", "one of llvip_infrared_rgb, .*vggsound_video_to_audio$"),
        ("configs/esc50.yaml", "dataset", "^no dataset 'configs/esc50.yaml'; pass a file or one of .*, esc50, "),
        ("/none/x.json", "deepspeed", "^no deepspeed '/none/x.json'; pass a file or one of zero1, "),
    ],
)
def test_an_unknown_name_says_what_there_is(config, kind, message):
    with pytest.raises(UserError, match=message):
        configs.find(config, kind)


def test_the_configs_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["configs"])
    assert "comparison: llvip_infrared_rgb, " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"(?s)no datasets.*absent: activitynet .*/data/activitynet.*absent: vggsound"):
        main(["eval", "--model=open_clip:ViT-B-32/none", "--all", "--data-root=/data"])
    with pytest.raises(UserError, match=r"nyu_v2: .*\n.*\n.*\n.*\n  pass the folder of your data: --data-root DIR"):
        main(["eval", "--model=open_clip:ViT-B-32/none", "--config=nyu_v2"])
    result = {"dataset": "nyu_v2", "model": "depth", "pretrained": "mine", "task": "classification",
              "metrics": {"top1": 0.5}, "protocol": {}}  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(result))
    main(["report", "."])
    assert "ViT-Lens-G" in (tmp_path / "report.html").read_text(), "a published result of the config"
