"""Every dataset of configs/eval gives on two ranks what it gives on one, under both protocols."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_datasets import CONFIGS, MODALITIES, InstantModel, prepare, with_counts
from lookalikes import FOLDERS, LOOKALIKES

from languagebind.eval import load_dataset_config
from languagebind.eval.evaluate import evaluate

Case = tuple[str, str, str]  # modality, config, data root


def results(cases: list[Case]) -> list[dict]:
    """Under our protocol, and where there is one under the paper's."""
    found = []
    for kind, config, data_root in cases:
        ours = load_dataset_config(Path(config), Path(data_root))
        for dataset in [ours] if ours.paper is None else [ours, replace(ours, protocol="paper")]:
            dual = dataset.task == "retrieval" and dataset.protocol == "ours"
            found.append(
                evaluate(InstantModel(), MODALITIES[kind], dataset, workers=0, batch_size=3, dual_softmax=dual)
            )
    return found


def on_a_rank(rank: int, folder: str, cases: list[Case]) -> None:
    address = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.set_num_threads(1)
    Path(folder, f"{rank}.json").write_text(json.dumps(results(cases)))
    torch.distributed.destroy_process_group()


@pytest.fixture
def cases(tmp_path) -> list[Case]:
    """The data of every look-alike; one prompt a class, as 80 of 1000 classes take half a minute."""
    configs = shutil.copytree(CONFIGS, tmp_path / "configs")
    (configs / "templates" / "openai.txt").write_text("a photo of a {c}.\n")
    found = []
    for name, (kind, write) in LOOKALIKES.items():
        config = with_counts(configs / f"{name}.yaml", write(tmp_path / name))
        prepare(config, tmp_path / name, tmp_path / "data" / name)
        found.append((kind, str(config), str(tmp_path / "data" / name)))
    for name, (kind, write) in FOLDERS.items():
        write(tmp_path / "folders" / name)
        found.append((kind, str(configs / f"{name}.yaml"), str(tmp_path / "folders" / name)))
    return found


def test_every_dataset_gives_on_two_ranks_what_it_gives_on_one(cases, tmp_path):
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path), cases), nprocs=2)
    first, second = ((tmp_path / f"{rank}.json").read_text() for rank in range(2))
    assert first == second
    expected = json.loads(json.dumps(results(cases)))
    for one, two in zip(expected, json.loads(first), strict=True):
        assert two == one, (one["dataset"], one["protocol"]["protocol"])
    assert {result["dataset"] for result in expected} == {path.stem for path in CONFIGS.glob("*.yaml")}
