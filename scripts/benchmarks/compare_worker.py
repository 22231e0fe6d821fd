"""One side of the comparison, in a process and an interpreter of its own; prints one line of JSON.

    python compare_worker.py original|ours prepare|check|measure|profile FOLDER

The interpreter of the original's side has the package `languagebind` 0.1.0, so this file imports nothing of this
repository but for the side `ours`. FOLDER holds case.json (sizes), and what `prepare` writes. The original's:
checkpoint/ (as it saves itself), state.pt (its parameters by their published names) and batch.pt. Ours: trained.json.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from memory import PeakMemory
from torch import nn
from torch.nn import functional as F

CPU = torch.device("cpu")
ADAM = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


class Original:
    """The published package's classes, taking the steps that its README and training code take."""

    def __init__(self, case: dict, folder: Path):
        self.case, self.folder = case, folder
        begin = time.perf_counter()
        module = import_original(case["modality"])
        self.import_seconds = time.perf_counter() - begin
        name = case["modality"].title()
        self.model_class = getattr(module, f"LanguageBind{name}")
        self.config_class = getattr(module, f"LanguageBind{name}Config")

    def create(self) -> nn.Module:
        """Random weights; the adapters' second halves too, or half of the gradients would be zero."""
        case, text = self.case, self.case["text"]
        sizes = {"hidden_act": "gelu", "attention_dropout": 0.0}
        text_config = sizes | {"hidden_size": text["width"], "intermediate_size": 4 * text["width"]}
        text_config |= {"num_hidden_layers": text["depth"], "num_attention_heads": text["num_heads"]}
        vision_config = sizes | {"hidden_size": case["width"], "intermediate_size": case["mlp_dim"]}
        vision_config |= {"num_hidden_layers": case["depth"], "num_attention_heads": case["num_heads"]}
        vision_config |= {"patch_size": case["patch_size"], "lora_r": case["lora_rank"], "lora_alpha": 16}
        vision_config |= {"force_patch_dropout": case["patch_dropout"], "lora_dropout": 0.0, **case["original"]}
        config = self.config_class(
            text_config=text_config, vision_config=vision_config, projection_dim=case["embed_dim"]
        )
        torch.manual_seed(0)
        model = self.model_class(config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.02)
        return model

    def prepare(self) -> dict:
        """Write weights and a batch for both sides."""
        case, self.model = self.case, self.create()
        # As in the published files: the list that audio makes of it cannot be loaded.
        self.model.config.vision_config.image_size = case["original"]["image_size"]
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
        config = self.config_class.from_pretrained(self.folder / "checkpoint")
        # Without it, the attention of transformers 4.57 fails: the package's nested configs are not known to it.
        for part in (config, config.text_config, config.vision_config):
            part._attn_implementation = self.case["original_attention"]
        model = self.model_class.from_pretrained(self.folder / "checkpoint", config=config)
        if self.case["modality"] == "audio":
            # transformers 4.57 refuses pictures that are not square; the package's video module has the same
            # embeddings without that check.
            model.vision_model.embeddings.__class__ = import_original("video").CLIPVisionEmbeddings
        return model

    def trainer(self, patch_dropout: bool) -> nn.Module:
        self.model = self.load().train()
        trained = set(json.loads((self.folder / "trained.json").read_text()))
        for key, parameter in self.named_parameters():
            parameter.requires_grad_(key in trained)
        if not patch_dropout:
            self.model.vision_model.patch_dropout.prob = 0.0
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], **ADAM)
        return self.model

    def gradients(self) -> dict[str, torch.Tensor]:
        return {key: value.grad for key, value in self.named_parameters() if value.grad is not None}

    def named_parameters(self):
        return ((key.replace("base_model.model.", ""), value) for key, value in self.model.named_parameters())

    def step(self, batch: dict) -> float:
        tokens = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        loss = self.model(pixel_values=self.inputs(batch), **tokens, return_loss=True).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def embed(self, batch: dict) -> torch.Tensor:
        pooled = self.model.vision_model(pixel_values=self.inputs(batch))[1]
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def inputs(self, batch: dict) -> torch.Tensor:
        x = batch["inputs"]
        return x if x.shape[2] > 1 else x.squeeze(2)  # clips have five dimensions, all else four


class Ours:
    """This library: the model and the step of its training."""

    def __init__(self, case: dict, folder: Path):
        self.case, self.folder = case, folder
        begin = time.perf_counter()
        import languagebind

        self.model_class = getattr(languagebind, f"LanguageBind{case['modality'].title()}")
        self.import_seconds = time.perf_counter() - begin

    def prepare(self) -> dict:
        """Write the names of what trains: the original's package leaves that to its training code."""
        names = [name for name, value in our_model(self.case, False).named_parameters() if value.requires_grad]
        (self.folder / "trained.json").write_text(json.dumps(names))
        return {}

    def load(self) -> nn.Module:
        return self.model_class.from_pretrained(self.folder / "checkpoint")

    def trainer(self, patch_dropout: bool) -> nn.Module:
        from languagebind.distributed import Process
        from training.engines.base import Engine, EngineConfig
        from training.optim import OptimConfig
        from training.train import StepOptions

        case = self.case
        self.model = our_model(case, patch_dropout)
        state = torch.load(self.folder / "state.pt", mmap=True)
        for key, parameter in self.model.named_parameters():
            parameter.data.copy_(state[key])
        config = OptimConfig(lr=ADAM["lr"], eps=ADAM["eps"], wd=ADAM["weight_decay"], precision=case["precision"])
        self.options = StepOptions(lambda step: 1.0, case["precision"], 1, "clip", 1, 1, 1, 1.0)
        self.state = SimpleNamespace(
            engine=Engine(self.model.train(), config, Process(0, 1, CPU), EngineConfig()), ema=None, step=0
        )
        return self.model

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the first step, which has dropped them: AdamW's first average is a share of them."""
        state = self.state.engine.optimizer_state()
        return {key: value["exp_avg"] / (1 - ADAM["betas"][0]) for key, value in state.items()}

    def step(self, batch: dict) -> float:
        from training.train import train_step

        if self.case["cached_text"]:
            text = {"features": batch["text_features"]}
        else:  # as the tokenizer gives them: cut after the longest text
            ids = batch["input_ids"][:, : int(batch["attention_mask"].sum(dim=1).max())]
            text = {"input_ids": ids, "caption": torch.arange(len(ids))}
        given = SimpleNamespace(inputs=batch["inputs"], text=text, groups=None, keys=[])
        return train_step(self.state, [given], self.options, CPU).item()

    def embed(self, batch: dict) -> torch.Tensor:
        from languagebind.distributed import autocast

        with autocast(CPU, self.case["precision"]):
            return self.model.encode(batch["inputs"])


def our_model(case: dict, patch_dropout: bool) -> nn.Module:
    """The model of a case, adapters in place."""
    from languagebind.model import DualEncoder
    from languagebind.text import ClipText, ClipTextConfig
    from languagebind.tuning import TuningConfig, apply_tuning
    from languagebind.vit import EncoderConfig

    sizes = {key: case[key] for key in ("patch_size", "width", "depth", "num_heads", "mlp_dim")}
    shape, text = tuple(case["input_shape"]), ClipTextConfig(**case["text"], mlp_dim=4 * case["text"]["width"])
    share = case["patch_dropout"] if patch_dropout else 0.0
    encoder = EncoderConfig(**sizes, temporal_attention=shape[1] > 1, patch_dropout=share)
    projection = nn.Linear(text.width, case["embed_dim"], bias=False)
    model = DualEncoder(shape, encoder, (ClipText(text), projection, case["embed_dim"]))
    apply_tuning(model, TuningConfig(tuning="lora", lora_rank=case["lora_rank"], lora_alpha=16))
    return model


def import_original(modality: str) -> ModuleType:
    """The modelling and configuration of one modality of the original.

    Its package's __init__ is not run: it imports pytorchvideo, which needs a torchvision of before 2024. The original's
    import time is therefore without its decoders.
    """
    if "languagebind" not in sys.modules:
        spec = importlib.util.find_spec("languagebind")
        if spec is None or spec.origin is None or not Path(spec.origin).with_name("_compat.py").is_file():
            sys.exit(
                "error: no languagebind 0.1.0 of PyPI here: scripts/setup_original.sh makes an environment with it"
            )
        package = sys.modules["languagebind"] = ModuleType("languagebind")
        package.__path__ = [str(Path(spec.origin).parent)]
    return importlib.import_module(f"languagebind.{modality}.modeling_{modality}")


def check(side: Original | Ours, batch: dict) -> dict:
    """Loss and gradients of the first step, without patch dropout; the gradients go to a file."""
    side.trainer(patch_dropout=False)
    loss = side.step(batch)
    torch.save(side.gradients(), side.folder / f"{type(side).__name__}.gradients.pt")
    return {"loss": loss}


def measure(side: Original | Ours, batch: dict) -> dict:
    """Time and memory of steps, loading, and encoding."""
    begin = time.perf_counter()
    side.load()
    load_seconds = time.perf_counter() - begin
    model, case = side.trainer(patch_dropout=True), side.case
    memory = PeakMemory(CPU)
    steps = [timed(lambda: side.step(batch)) for _ in range(case["warmup_steps"] + case["steps"])]
    peak = memory.peak()
    model.eval()
    with torch.inference_mode():
        embeds = [timed(lambda: side.embed(batch)) for _ in range(1 + case["steps"])]
    return {
        "step_seconds": statistics.median(wall for wall, _ in steps[case["warmup_steps"] :]),
        "step_cpu_seconds": statistics.median(cpu for _, cpu in steps[case["warmup_steps"] :]),
        "above_model_bytes": peak - memory.before,
        "model_bytes": memory.before,
        "import_seconds": side.import_seconds,
        "load_seconds": load_seconds,
        "embeddings_per_second": case["batch_size"] / statistics.median(wall for wall, _ in embeds[1:]),
        "embeddings_per_cpu_second": case["batch_size"] / statistics.median(cpu for _, cpu in embeds[1:]),
    }


def profile(side: Original | Ours, batch: dict) -> dict:
    """Where the time of a step goes."""
    side.trainer(patch_dropout=True)
    side.step(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        side.step(batch)
    return {"table": profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16)}


def timed(function) -> tuple[float, float]:
    """Seconds on the clock, and those that the processor spent on this process: other work does not lengthen these."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("original", "ours"))
    parser.add_argument("action", choices=("prepare", "check", "measure", "profile"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--cached-text", action="store_true")
    options = parser.parse_args()
    case = json.loads((options.folder / "case.json").read_text())
    case |= {"precision": options.precision, "cached_text": options.cached_text}
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    side = (Original if options.side == "original" else Ours)(case, options.folder)
    if options.action == "prepare":
        result = side.prepare()
    else:
        batch = torch.load(options.folder / "batch.pt")
        result = {"check": check, "measure": measure, "profile": profile}[options.action](side, batch)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
