"""CLIP_benchmark itself, as its package installs, with checkpoints of ours."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from eval_files import save, write_shard
from helpers import ROOT

from languagebind.config import UserError
from languagebind.eval.__main__ import main
from languagebind.eval.clip_benchmark import load_model
from languagebind.modalities.depth import Depth
from languagebind.modalities.image import Image
from languagebind.modalities.video import Video


def clip_benchmark(checkpoint, dataset, root, task, output):
    """The metrics that CLIP_benchmark finds."""
    command = [sys.executable, "-m", "languagebind.eval.clip_benchmark", "eval", "--model_type", "languagebind",
               "--model", "ours", "--pretrained", str(checkpoint), "--dataset", f"wds/{dataset}", "--dataset_root",
               str(root), "--task", task, "--no_amp", "--num_workers", "1", "--output", str(output)]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())["metrics"]


def ours(checkpoint, folder, output):
    main(["--checkpoint", str(checkpoint), "--data", str(folder), "--output", str(output), "--workers", "0",
          "--device", "cpu", "--clip-benchmark-keys"])  # fmt: skip
    return json.loads(next(output.glob("*.json")).read_text())["metrics"]


@pytest.fixture
def checkpoint(clip_folder, tmp_path):
    return save(tmp_path, Image(image_size=32), clip_folder, 0)


def test_retrieval_is_that_of_clip_benchmark(world, checkpoint, tmp_path):
    members = [
        (path.stem, {"png": path.read_bytes(), "txt": f"{path.parent.name} {path.stem}\nthe {path.stem}th".encode()})
        for path in sorted((world / "folders").rglob("*.png"))
    ]
    write_shard(tmp_path / "texts/test/0.tar", members)
    (tmp_path / "texts/test/nshards.txt").write_text("1")
    (tmp_path / "texts/dataset_type.txt").write_text("retrieval")
    theirs = clip_benchmark(checkpoint, "texts", tmp_path / "texts", "zeroshot_retrieval", tmp_path / "b.json")
    found = ours(checkpoint, tmp_path / "texts", tmp_path / "b")
    assert set(theirs) == {"image_retrieval_recall@5", "text_retrieval_recall@5"}
    assert theirs == pytest.approx({key: found[key] for key in theirs})


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="CLIP_benchmark's accuracy fails with NumPy 2.4: bash scripts/test_peers.sh",
)
def test_classification_is_that_of_clip_benchmark(world, checkpoint, tmp_path):
    folder = world / "wds" / "colours"
    theirs = clip_benchmark(checkpoint, "colours", folder, "zeroshot_classification", tmp_path / "a.json")
    found = ours(checkpoint, folder, tmp_path / "a")
    for metric in ("acc1", "mean_per_class_recall"):
        assert theirs[metric] == pytest.approx(found[metric])


@pytest.mark.parametrize("modality", [Depth(image_size=32), Video(image_size=32, num_frames=2)])
def test_encoders_of_what_clip_benchmark_has_not_are_refused(modality, clip_folder, tmp_path):
    checkpoint = save(tmp_path, modality, clip_folder, 0)
    with pytest.raises(UserError, match="does not read the RGB pictures of CLIP_benchmark"):
        load_model("ours", str(checkpoint))
