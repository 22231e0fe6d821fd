"""--precision auto: what is measured decides, rank 0 for all ranks, and once for a run."""

import pytest
import torch
import yaml
from helpers import call_ranks, checkpoint, train_flags

from languagebind.distributed import Process
from training import precision
from training.engines import make_engine
from training.engines.base import EngineConfig
from training.main import main
from training.optim import OptimConfig
from training.precision import faster_precision, product_time

CPU = torch.device("cpu")
RANKS = """
import os, sys
from pathlib import Path
from languagebind.distributed import close_process, init_process
from training import precision
from training.params import parse_args

bf16 = 1 if os.environ["RANK"] == "0" else 3  # rank 1 would choose float32
precision.product_time = lambda width, mlp_dim, name: bf16 if name == "amp_bf16" else 2
process = init_process("cpu")
config = parse_args(["--modality=depth", "--train-data=none", "--text-pretrained=none", "--encoder-pretrained=none"])
Path(sys.argv[1], str(process.rank)).write_text(
    precision.settle_precision(config, process, None).optim.precision)
close_process()
"""


@pytest.fixture
def times(monkeypatch):
    """Milliseconds of a product by precision, in place of those of this machine."""
    found = {"fp32": 10.0}
    monkeypatch.setattr(precision, "product_time", lambda width, mlp_dim, name: found[name] / 1e3)
    return found


@pytest.mark.parametrize(("bf16", "chosen"), [(3.0, "amp_bf16"), (9.0, "fp32"), (14.0, "fp32")])
def test_bfloat16_must_be_clearly_faster(times, bf16, chosen):
    times["amp_bf16"] = bf16
    found, why = faster_precision(CPU, 1024, 4096)
    assert found == chosen
    assert why == f"because a product of the model's size takes {bf16:.2g} ms in bfloat16, 10 ms in float32"


@pytest.mark.parametrize(("able", "chosen"), [(True, "amp_bf16"), (False, "fp32")])
def test_a_gpu_needs_bfloat16_of_its_own(monkeypatch, able, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able or including_emulation)
    assert faster_precision(torch.device("cuda"), 1024, 4096)[0] == chosen


def test_a_product_is_measured_in_its_precision(monkeypatch):
    dtypes, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(precision.F, "linear", lambda *x: dtypes.append(linear(*x).dtype) or linear(*x))
    assert product_time(64, 128, "fp32") > 0
    assert product_time(64, 128, "amp_bf16") > 0
    assert dtypes == [torch.float32, torch.bfloat16]


def test_a_run_records_its_precision_and_keeps_it(depth_shards, tmp_path, times):
    times["amp_bf16"] = 1.0
    flags = train_flags(depth_shards, tmp_path, "--precision=auto", "--workers=0", "--train-num-samples=16")
    main([*flags, "--name=run", "--epochs=1"])
    log = (tmp_path / "run/out.log").read_text()
    assert log.count("precision amp_bf16, because a product of the model's size takes 1 ms ") == 1
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["optim"]["precision"] == "amp_bf16"
    assert checkpoint(tmp_path, "run", 2)["config"]["optim"]["precision"] == "amp_bf16"

    times["amp_bf16"] = 100.0  # as on another machine
    main([*flags, "--name=run", "--epochs=2", "--resume=latest"])
    assert "precision amp_bf16, as in the run that it resumes" in (tmp_path / "run/out.log").read_text()
    assert checkpoint(tmp_path, "run", 4)["config"]["optim"]["precision"] == "amp_bf16"


def test_all_ranks_follow_the_first(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    call_ranks(2, str(tmp_path / "ranks.py"), str(tmp_path))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["amp_bf16", "amp_bf16"]


def test_an_engine_wants_a_choice():
    with pytest.raises(ValueError, match="settle_precision chooses one"):
        make_engine(torch.nn.Identity(), OptimConfig(), Process(0, 1, CPU), EngineConfig())
