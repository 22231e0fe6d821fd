"""One side of `benchmark.py compare`, in an interpreter of its own; prints one line of JSON.

    python compare_worker.py original|ours prepare|check|measure FOLDER

The original's interpreter has the package `languagebind` 0.1.0, so only `Ours` may import from this repository.
FOLDER holds case.json (sizes and recipe), trained.json (names of the weights that train) and what `prepare` writes:
checkpoint/ (as the original saves it), state.pt (its weights by their published names) and batch.pt.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peak_memory import PeakMemory
from torch import nn
from torch.nn import functional as F

CPU = torch.device("cpu")
ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


class Original:
    """The published package's classes, with the steps of its README and training code."""

    def __init__(self, case: dict, folder: Path):
        self.case, self.folder = case, folder
        module, name = import_original(case["modality"]), case["modality"].title()
        self.model_class = getattr(module, f"LanguageBind{name}")
        self.config_class = getattr(module, f"LanguageBind{name}Config")

    def prepare(self) -> dict:
        """Write random weights and a batch for both sides."""
        case = self.case
        torch.manual_seed(0)
        self.model = self.model_class(
            self.config_class(
                text_config=case["text_config"], vision_config=case["vision_config"], projection_dim=case["embed_dim"]
            )
        )
        for key, parameter in self.model.named_parameters():
            if "lora_B" in key:  # zero at first, which would make half of the gradients zero
                nn.init.normal_(parameter, std=0.02)
        # As in the published files: the list that the audio model makes of it cannot be loaded.
        self.model.config.vision_config.image_size = case["vision_config"]["image_size"]
        self.model.save_pretrained(self.folder / "checkpoint")
        torch.save({key: value.detach() for key, value in self.named_parameters()}, self.folder / "state.pt")
        ids = torch.zeros(case["batch_size"], 77, dtype=torch.long)
        for row in ids:
            length = int(torch.randint(8, 30, ()))
            row[:length] = torch.randint(1, 49000, (length,))
            row[0], row[length - 1] = 49406, 49407
        features = F.normalize(torch.randn(case["batch_size"], case["embed_dim"]), dim=-1)
        batch = {"inputs": torch.randn(case["batch_size"], *case["input_shape"]), "input_ids": ids}
        torch.save(batch | {"attention_mask": (ids > 0).long(), "text_features": features}, self.folder / "batch.pt")
        return {}

    def load(self) -> nn.Module:
        """Load the checkpoint, with what it takes to run the package under transformers 4.57."""
        config = self.config_class.from_pretrained(self.folder / "checkpoint")
        for part in (config, config.text_config, config.vision_config):
            part._attn_implementation = self.case["original_attention"]
        model = self.model_class.from_pretrained(self.folder / "checkpoint", config=config)
        if self.case["modality"] == "audio":
            # transformers 4.57 refuses pictures that are not square. The video module's embeddings do not check.
            model.vision_model.embeddings.__class__ = import_original("video").CLIPVisionEmbeddings
        return model

    def prepare_training(self, patch_dropout: bool) -> nn.Module:
        """Load the model and make its optimizer."""
        self.model = self.load().train()
        trained = set(json.loads((self.folder / "trained.json").read_text()))
        for key, parameter in self.named_parameters():
            parameter.requires_grad_(key in trained)
        if not patch_dropout:
            self.model.vision_model.patch_dropout.prob = 0.0
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], **ADAM)
        return self.model

    def named_parameters(self):
        """Yield the parameters by their published names."""
        return ((key.replace("base_model.model.", ""), value) for key, value in self.model.named_parameters())

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the last step."""
        return {key: value.grad for key, value in self.named_parameters() if value.grad is not None}

    def step(self, batch: dict) -> float:
        """Take a training step; return the loss."""
        tokens = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        loss = self.model(pixel_values=self.inputs(batch), **tokens, return_loss=True).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def embed(self, batch: dict) -> torch.Tensor:
        """Return the embeddings of a batch."""
        pooled = self.model.vision_model(pixel_values=self.inputs(batch))[1]
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def inputs(self, batch: dict) -> torch.Tensor:
        """Return the batch's inputs: five dimensions for clips, four for everything else."""
        return batch["inputs"] if self.case["modality"] == "video" else batch["inputs"].squeeze(2)


class Ours:
    """This library: the model and the step of its training."""

    def __init__(self, case: dict, folder: Path):
        self.case, self.folder = case, folder

    def load(self) -> nn.Module:
        """Load the checkpoint."""
        import languagebind

        return getattr(languagebind, f"LanguageBind{self.case['modality'].title()}").from_pretrained(
            self.folder / "checkpoint"
        )

    def prepare_training(self, patch_dropout: bool) -> nn.Module:
        """Load the model under the engine of one process."""
        from languagebind.distributed import Process
        from scripts.benchmarks.compare_benchmark import build_model
        from training.checkpoint import TrainState
        from training.engines.base import Engine, EngineConfig
        from training.optim import OptimConfig

        self.model = build_model(self.case, patch_dropout)
        state = torch.load(self.folder / "state.pt", mmap=True)
        for key, parameter in self.model.named_parameters():
            parameter.data.copy_(state[key])
        self.optim = OptimConfig(
            lr=ADAM["lr"], eps=ADAM["eps"], wd=ADAM["weight_decay"], precision=self.case["precision"]
        )
        engine = Engine(self.model.train(), self.optim, Process(0, 1, CPU), EngineConfig())
        self.state = TrainState(engine)
        return self.model

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the first step, which are dropped: AdamW's first average is a share of them."""
        state = self.state.engine.optimizer_state()
        return {key: value["exp_avg"] / (1 - ADAM["betas"][0]) for key, value in state.items()}

    def step(self, batch: dict) -> float:
        """Take a training step; return the loss."""
        from training.stream import Batch

        from training.train import train_step

        if self.case["cached_text"]:
            text = {"features": batch["text_features"]}
        else:  # our tokenizer cuts after the longest text
            ids = batch["input_ids"][:, : int(batch["attention_mask"].sum(dim=1).max())]
            text = {"input_ids": ids, "caption": torch.arange(len(ids))}
        given = Batch(batch["inputs"], text, None, [], [], worker=0, epoch=0, drawn=0)
        return train_step(self.state, [given], self.optim).item()

    def embed(self, batch: dict) -> torch.Tensor:
        """Return the embeddings of a batch."""
        from languagebind.distributed import autocast

        with autocast(CPU, self.case["precision"]):
            return self.model.encode(batch["inputs"])


def import_original(modality: str) -> ModuleType:
    """Import a modality of the original without its package's __init__, which needs a torchvision from before 2024."""
    if "languagebind" not in sys.modules:
        spec = importlib.util.find_spec("languagebind")
        if spec is None or spec.origin is None or not Path(spec.origin).with_name("_compat.py").is_file():
            sys.exit("this interpreter does not have languagebind 0.1.0: use scripts/setup_original.sh")
        package = sys.modules["languagebind"] = ModuleType("languagebind")
        package.__path__ = [str(Path(spec.origin).parent)]
    return importlib.import_module(f"languagebind.{modality}.modeling_{modality}")


def check(side: Original | Ours, batch: dict) -> dict:
    """Take a first step without patch dropout; write its gradients and return its loss."""
    side.prepare_training(patch_dropout=False)
    loss = side.step(batch)
    torch.save(side.gradients(), side.folder / f"{type(side).__name__.lower()}.gradients.pt")
    return {"loss": loss}


def measure(side: Original | Ours, batch: dict) -> dict:
    """Return the time of loading, the time and memory of steps, and the speed of encoding."""
    load_seconds, _ = timed(side.load)
    model, case = side.prepare_training(patch_dropout=True), side.case
    memory = PeakMemory(CPU)
    steps = [timed(lambda: side.step(batch)) for _ in range(case["warmup_steps"] + case["steps"])]
    wall, cpu = zip(*steps[case["warmup_steps"] :], strict=True)
    peak = memory.peak()
    model.eval()
    with torch.inference_mode():
        embeds = [timed(lambda: side.embed(batch))[1] for _ in range(1 + case["steps"])]
    return {
        "step_seconds": statistics.median(wall),
        "step_cpu_seconds": statistics.median(cpu),
        "above_model_bytes": peak - memory.before,
        "load_seconds": load_seconds,
        "embeddings_per_cpu_second": case["batch_size"] / statistics.median(embeds[1:]),
    }


def timed(function) -> tuple[float, float]:
    """Return the wall and processor seconds of a call; other work on the machine hardly lengthens the second."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("original", "ours"))
    parser.add_argument("action", choices=("prepare", "check", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--cached-text", action="store_true")
    options = parser.parse_args()
    case = json.loads((options.folder / "case.json").read_text())
    case |= {"precision": options.precision, "cached_text": options.cached_text}
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    if options.action == "prepare":
        found = Original(case, options.folder).prepare()
    else:
        side = (Original if options.side == "original" else Ours)(case, options.folder)
        found = {"check": check, "measure": measure}[options.action](side, torch.load(options.folder / "batch.pt"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
