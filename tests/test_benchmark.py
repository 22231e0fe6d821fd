"""The benchmarks at toy size: they run, figures that can be counted are right, and two need PyTorch alone."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call
from packaging.requirements import Requirement

from languagebind.config import UserError
from languagebind.vit import EncoderConfig
from scripts.benchmarks import gpu_benchmark
from scripts.benchmarks.loader_benchmark import memory_figures
from scripts.benchmarks.model_benchmark import recipe_flops
from scripts.benchmarks.rows import format_rows, spread
from scripts.benchmarks.trainers import RATIOS, watch

TINY = ["--model=vit-tiny-demo", "--input-shape=3,1,32,32", "--steps=2", "--warmup-steps=1", "--device=cpu",
        "--peak-tflops=0.5"]  # fmt: skip
# What PyTorch brings along; of other packages nothing may be imported.
WITH_TORCH = {"torch", "functorch", "torchgen", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2",
              "markupsafe", "filelock", "fsspec", "triton", "nvidia", "cuda"}  # fmt: skip


def benchmark(tmp_path: Path, *flags: str, fresh: bool = False) -> list[dict]:
    """Run a benchmark, `fresh` in a new interpreter; return its rows."""
    output = tmp_path / "figures.json"
    call("scripts/benchmark.py", flags[0], f"--output={output}", *flags[1:], fresh=fresh)
    content = json.loads(output.read_text())
    assert content["benchmark"] == flags[0]
    assert content["torch"] == torch.__version__
    assert content["threads"] >= 1
    return content["rows"]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Make every new interpreter find PyTorch and no other package."""
    folder, packages = tmp_path / "alone", Path(torch.__file__).parent.parent
    found = {path.name.partition(".")[0] for path in packages.iterdir() if path.suffix in ("", ".py", ".so")}
    refused = sorted(name for name in found - WITH_TORCH if name.isidentifier() and not name.startswith("_"))
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({refused}))\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    for package in ("numpy", "yaml", "tyro", "peft", "safetensors"):
        assert package in refused


SIZES = {"patch_size": 8, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 48}


def forward_by_hand(tokens: int) -> int:
    """SIZES over 32 x 32 pixels, of which `tokens` enter the blocks, and a projection to 10."""
    d, mlp = 16, 48

    def block(outputs: int) -> int:
        return 2 * tokens * 2 * d * d + 2 * outputs * (2 * d * d + 2 * d * mlp) + 4 * outputs * tokens * d

    # Of the last block's tokens, the class token alone is used.
    return block(tokens) + block(1) + 2 * 16 * (3 * 8 * 8) * d + 2 * d * 10


def test_flops_are_those_counted_by_hand():
    forward = forward_by_hand(tokens=1 + 4 * 4)
    for tuning, step in {"full": 3 * forward, "lora": 2 * forward}.items():
        found = recipe_flops((3, 1, 32, 32), EncoderConfig(**SIZES), tuning, embed_dim=10)
        assert found == {"forward": forward, "step": step}
    # The gradient of the projection's weight, and of its input for the norm before it.
    head = recipe_flops((3, 1, 32, 32), EncoderConfig(**SIZES), "head", embed_dim=10)
    assert head["step"] == forward + 2 * 2 * 16 * 10
    partial = recipe_flops((3, 1, 32, 32), EncoderConfig(**SIZES), "partial", embed_dim=10)
    assert forward < partial["step"] < 3 * forward


def test_flops_of_the_published_size_are_open_clips():
    found = recipe_flops((3, 1, 224, 224), EncoderConfig(grad_checkpointing=True), "full", embed_dim=768)
    last = 2 * 256 * (2 * 1024**2 + 2 * 1024 * 4096) + 4 * 256 * 257 * 1024  # what the last block need not do
    # ViT-L/14's in open_clip's docs/model_profile.csv
    assert (found["forward"] + last) / 1e9 == pytest.approx(162.0, rel=0.01)
    assert found["step"] == 3 * found["forward"]


def test_frames_and_patch_dropout_change_the_flops():
    half = recipe_flops((3, 1, 32, 32), EncoderConfig(**SIZES, patch_dropout=0.5), "lora", 10)["forward"]
    assert half == forward_by_hand(tokens=1 + 8)
    clip = recipe_flops((3, 4, 32, 32), EncoderConfig(**SIZES), "lora", 10)["forward"]
    assert clip == 4 * forward_by_hand(tokens=17) - 3 * 2 * 16 * 10  # one projection for all frames


def test_model(tmp_path, alone):
    rows = benchmark(tmp_path, "model", *TINY, "--tuning=full", "--batch-size", "1", "4", "--num-frames=2", fresh=True)
    assert [(row["batch_size"], row["num_frames"]) for row in rows] == [(1, 2), (4, 2)]
    for row in rows:
        assert row["samples_per_second"] == pytest.approx(row["batch_size"] / row["step_ms"] * 1e3)
        assert row["mfu_percent"] == pytest.approx(row["samples_per_second"] * row["sample_gflop"] / 500 * 100)
        assert row["above_start_mib"] == pytest.approx(row["peak_mib"] - row["start_mib"])


def test_model_with_adapters_says_that_it_needs_peft(tmp_path, alone):
    output = call("scripts/benchmark.py", "model", *TINY, "--tuning=lora", status=2, fresh=True)
    assert output.splitlines()[-1].startswith("error: LoRA tuning needs peft: pip install peft")


@pytest.mark.slow
def test_model_with_a_text_tower_and_adapters(tmp_path):
    (live,) = benchmark(tmp_path, "model", *TINY, "--precision=fp32", "--text=live", "--text-width=32")
    (cached,) = benchmark(tmp_path, "model", *TINY, "--precision=fp32")
    assert live["sample_gflop"] > cached["sample_gflop"] == 2 * cached["forward_gflop"]


def test_a_mistake_is_one_line(tmp_path):
    assert "no model 'nothing'" in call("scripts/benchmark.py", "model", "--model=nothing", status=2)
    output = call("scripts/benchmark.py", "loss", "--local-batch=3", "--global-batch=8", status=2)
    assert output.splitlines() == ["error: --global-batch 8 is not a multiple of --local-batch 3"]


def test_loss(tmp_path, alone):
    sizes = ["--local-batch=64", "--global-batch=1024", "--embed-dim=8", "--device=cpu", "--steps=2"]
    whole, chunks = benchmark(tmp_path, "loss", *sizes, "--chunk-size", "0", "16", fresh=True)
    assert whole["ranks"] == chunks["ranks"] == 16
    assert whole["loss"] == pytest.approx(chunks["loss"])
    assert whole["step_ms"] > 0


@pytest.mark.slow
def test_loader(tmp_path, depth_shards):
    training = ["--modality=depth", "--image-size=32", f"--train-data={depth_shards}", "--caption-source=raw",
                "--batch-size=8", "--text-pretrained=none"]  # fmt: skip
    rows = benchmark(
        tmp_path, "loader", "--samples=32", "--workers", "0", "1", "--step-seconds=0.02", "--", *training
    )  # fmt: skip
    assert [row["workers"] for row in rows] == [0, 1]
    for row in rows:
        assert row["samples"] == 32
        assert 0 < row["data_wait_percent"] < 100
        assert row["samples_per_second"] < 8 / 0.02
        assert 1 < row["all_pss_mib"] <= row["peak_pss_mib"]


def test_growth_is_that_of_the_second_half():
    def reading(size: int) -> dict[str, int]:
        return {"all_pss_mib": size - 10, "anonymous_mib": size}

    found = memory_figures([reading(20), reading(20), reading(40), reading(30), reading(30)])
    assert found["growth_mib"] == 10
    assert (found["all_pss_mib"], found["peak_pss_mib"]) == (20, 30)


@pytest.mark.slow
def test_decode(tmp_path, files):
    rows = benchmark(tmp_path, "decode", "--rounds=1", "--num-frames=2", "--files", *files["video"])
    by_decoder = {row["decoder"]: row for row in rows}
    assert {"pyav", "opencv", "packed"} <= by_decoder.keys()
    for decoder in ("pyav", "opencv", "packed"):
        assert by_decoder[decoder]["sample_ms"] > 0
        assert by_decoder[decoder]["input_shape"] == "3x2x224x224"
    assert all("sample_ms" in row or row["error"] for row in rows)


def test_decode_of_what_has_one_decoder(tmp_path, files):
    (row,) = benchmark(tmp_path, "decode", "--modality=depth", "--rounds=1", "--files", *files["depth"])
    assert row["samples"] == len(files["depth"])
    assert row["sample_ms"] > 0


def test_compare(tmp_path):
    python = os.environ.get("ORIGINAL_PYTHON", ROOT / ".venv-original" / "bin" / "python")
    if not Path(python).is_file():
        pytest.skip("no environment with the original's package: scripts/setup_original.sh makes one")
    rows = benchmark(
        tmp_path, "compare", f"--original-python={python}", "--width=32", "--depth=1", "--num-heads=2",
        "--image-size=28", "--num-frames=2", "--text-width=32", "--text-depth=1", "--embed-dim=16", "--batch-size=2",
        "--rounds=1", "--steps=1",
    )  # fmt: skip
    assert [row["variant"] for row in rows] == ["original", "ours", "ours, amp_bf16, cached text"]
    assert rows[0]["step_ratio"] == 1
    for row in rows:
        assert row["about"]["gradient_difference"] < 1e-3
        assert row["step_ratio"] > 0


def test_compare_says_how_to_get_the_original(tmp_path):
    output = call("scripts/benchmark.py", "compare", "--original-python=/nothing", status=2)
    assert "scripts/setup_original.sh" in output


def test_a_relative_path_to_an_interpreter_is_from_here(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho it runs >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    relative = os.path.relpath(tmp_path / "python", ROOT)
    output = call("scripts/benchmark.py", "compare", f"--original-python={relative}", status=2)
    assert output.endswith("error: original, check:\nit runs\n")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_compare_with_open_clip(tmp_path, precision):
    python = Path(os.environ.get("OPEN_CLIP_PYTHON", ROOT / ".venv-open-clip" / "bin" / "python"))
    if not python.is_file():
        pytest.skip("no environment with OpenCLIP's trainer: scripts/setup_open_clip.sh makes one")
    rows = benchmark(
        tmp_path, "compare", "--with=open_clip", f"--open-clip-python={python}", f"--precision={precision}",
        "--rounds=1", "--samples=16", "--batch-size=4", "--workers=1",
    )  # fmt: skip
    assert [row["trainer"] for row in rows] == ["OpenCLIP", "ours", "ours, cached text"]
    assert {rows[0][f"{name}_ratio"] for name in RATIOS} == {1}
    for row in rows:
        assert row["samples_per_second"] > 0
        assert 500 < row["step_pss_mib"] <= row["peak_pss_mib"]


def test_compare_with_open_clip_needs_its_trainer_and_equal_steps(tmp_path):
    command = ("scripts/benchmark.py", "compare", "--with=open_clip")
    assert "scripts/setup_open_clip.sh" in call(*command, "--open-clip-python=/nothing", status=2)
    output = call(*command, f"--open-clip-python={sys.executable}", "--samples=100", status=2)
    assert "--samples 100 should be a multiple of 128" in output


TRAINER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "held = b'x' * 80_000_000; input()"], stdin=subprocess.PIPE)
for step in range(4):
    time.sleep(0.5)
    print(f"2026 | INFO | Train Epoch: 0 [8/32 (25%)] Data (t): 0.125 Batch (t): 0.500, 16.0/s, 16.0/s/gpu LR: 0.1",
          flush=True)
sys.exit(int(sys.argv[1]))
"""


def test_a_trainer_is_watched_from_outside(tmp_path):
    options = Namespace(samples=32, batch_size=8, warmup_steps=1)
    row = watch(tmp_path, "it", [sys.executable, "-c", TRAINER, "0"], options)
    assert row["samples_per_second"] == pytest.approx(16, rel=0.3)
    assert row["data_wait_percent"] == pytest.approx(25)
    assert 0.5 <= row["first_step_seconds"] < 5
    assert 80 < row["step_pss_mib"] <= row["peak_pss_mib"]
    assert 0 <= row["sample_cpu_ms"] < 50
    with pytest.raises(UserError, match="it: 4 steps, status 3"):
        watch(tmp_path, "it", [sys.executable, "-c", TRAINER, "3"], options)


def test_table_aligns():
    lines = format_rows([{"name": "a", "step_ms": 12.5, "peak_mib": 3.0}, {"name": "bb", "error": "none"}]).split("\n")
    assert lines[0].split() == ["name", "step", "ms", "peak", "mib", "error"]
    assert lines[1].split() == ["a", "12.5", "3", "-"]
    assert spread([1.0]) == 0
    assert spread([1.0, 2.0, 3.0]) == 50


def gpu(output, status=0, parts=None):
    """Run all parts at toy size in a new interpreter: its rows fork from a server, and the tests' own has another."""
    lines = ["from scripts.benchmark import main", "from scripts.benchmarks import gpu_benchmark as gpu"]
    if parts:
        lines += [f"gpu.PARTS = {parts}", "gpu.TOY['fbank'] = '--device tpu'"]
    printed = call("-c", "\n".join([*lines, f"main(['gpu', '--toy', '--output={output}'])"]), status=status)
    return printed, json.loads(output.read_text())["rows"]


def test_gpu_at_toy_size(tmp_path):
    printed, rows = gpu(tmp_path / "figures.json")
    assert list(dict.fromkeys(row["part"] for row in rows)) == [name for name, *_ in gpu_benchmark.PARTS]
    assert all(row["step_ms"] > 0 for row in rows)
    assert [row["engine"] for row in rows if row["part"] == "fsdp"] == ["fsdp"]
    assert [row["inputs"] for row in rows if row["part"] == "copying"] == ["ahead", "host"]
    for row in rows[:3]:
        assert 0 < sum(kernel["share_percent"] for kernel in row["kernels"]) <= 100
    assert "aten::mm" in printed
    assert "part full, batch_size 2" in printed  # when it is measured, before the tables


def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path):
    parts = ("late", 0, "fbank"), ("lost", 60, "fbank"), ("loss", 60, "loss")
    printed, (late, lost, loss) = gpu(tmp_path / "figures.json", 1, parts)
    assert "not all could be measured: late, lost" in printed
    assert "not done after 0 seconds" in late["error"]
    assert "--device tpu cannot" in lost["error"]
    assert loss["ranks"] == 4


@pytest.mark.slow
def test_gpu_needs_five_packages(tmp_path):
    queue, needed, folder = ["torch", "torchvision", "transformers", "timm", "peft"], set(), tmp_path / "packages"
    folder.mkdir()
    while queue:
        needed.add(name := queue.pop())
        with suppress(metadata.PackageNotFoundError):  # of other systems
            for first in {file.parts[0] for file in metadata.files(name) or []} - {".."}:
                if not (folder / first).exists():
                    (folder / first).symlink_to(Path(torch.__file__).parent.parent / first)
            wanted = map(Requirement, metadata.requires(name) or [])
            queue += {x.name for x in wanted if not x.marker or x.marker.evaluate({"extra": ""})} - needed
    assert not {"open_clip", "webdataset", "tyro", "av", "torchaudio"} & {path.name for path in folder.iterdir()}
    environment = {**os.environ, "PYTHON": sys._base_executable, "PYTHONPATH": str(folder)}
    command = ["bash", "scripts/benchmark_gpu.sh", str(tmp_path / "found"), "--toy"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(json.loads((tmp_path / "found/figures.json").read_text())["rows"]) >= len(gpu_benchmark.PARTS)
    assert (tmp_path / "found/report.txt").read_text() == done.stdout
