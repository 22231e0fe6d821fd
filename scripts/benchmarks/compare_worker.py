"""Run one side of `benchmark.py compare` in its own process, and print one line of JSON.

    python compare_worker.py check|measure CASE

CASE is JSON with sizes and recipe. In the interpreter of the original LanguageBind code, the package `languagebind` is
the original's, so only `Ours` may import from this repository. The original runs `check` first and saves its weights.
"""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rows import measure_steps
from torch import Tensor, nn
from torch.nn import functional as F

CPU = torch.device("cpu")
ADAM: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}  # our defaults
WEIGHTS = Path("weights.pt")
# Parts of the names of the parameters that LoRA tuning trains.
TRAINED = (".lora_", "temporal_embedding", "temporal_layer_norm", "class_embedding", "post_layernorm",
           "visual_projection", "logit_scale")  # fmt: skip


class Original:
    """The published package's model with random weights, and the step of its training code."""

    def __init__(self, case: dict[str, Any]):
        module, name = import_original(case["case"]), f"LanguageBind{case['case'].title()}"
        self.audio = case["case"] == "audio"
        size = {"image_size": case["image_size"], "num_frames": case["num_frames"], "add_time_attn": True}
        if self.audio:
            size = {"num_mel_bins": 112, "target_length": 1036, "image_size": 224}
        tuning = {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "force_patch_dropout": case["patch_dropout"]}
        vision = original_config(case, patch_size=case["patch_size"], **size, **tuning)
        configs = {"vision_config": vision, "text_config": original_config(case, "text_")}
        config = getattr(module, f"{name}Config")(**configs, projection_dim=case["embed_dim"])
        for part in (config, config.text_config, config.vision_config):
            part._attn_implementation = case["original_attention"]
        torch.manual_seed(0)
        self.model = getattr(module, name)(config).train()
        if self.audio:
            # transformers 4.57 refuses pictures that are not square. The video module's embeddings do not check.
            self.model.vision_model.embeddings.__class__ = import_original("video").CLIPVisionEmbeddings
        self.parameters = {key.replace("base_model.model.", ""): value for key, value in self.model.named_parameters()}
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(any(name in key for name in TRAINED))
            if ".lora_B." in key:  # initially zero, which would make half of the gradients zero
                nn.init.normal_(parameter, std=0.02)
        if not WEIGHTS.exists():
            torch.save({key: value.detach() for key, value in self.parameters.items()}, WEIGHTS)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], **ADAM)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the last step, keyed by published name."""
        return {key: value.grad for key, value in self.parameters.items() if value.grad is not None}

    def step(self, batch: dict[str, Tensor]) -> float:
        """Take a training step and return the loss. Audio inputs have no frame axis here."""
        inputs = batch["inputs"].squeeze(2) if self.audio else batch["inputs"]
        tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
        loss = self.model(pixel_values=inputs, **tokens, return_loss=True).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Ours:
    """This library's model with the original's weights, and the step of its training."""

    def __init__(self, case: dict[str, Any]):
        from languagebind.text import ClipTextConfig
        from languagebind.vit import EncoderConfig
        from scripts.benchmarks import model_benchmark

        self.cached_text, self.take_step = case["cached_text"], model_benchmark.take_step
        sizes = {key: case[key] for key in ("patch_size", "width", "depth", "num_heads", "patch_dropout")}
        encoder = EncoderConfig(**sizes, mlp_dim=4 * case["width"], temporal_attention=case["case"] == "video")
        text = {key.removeprefix("text_"): case[key] for key in ("text_width", "text_depth", "text_num_heads")}
        tower = ClipTextConfig(**text, mlp_dim=4 * case["text_width"])
        recipe = {"tuning": "lora", "engine": "ddp", "torchcompile": "no", "device": "cpu"}
        options = Namespace(**case, **recipe, encoder=encoder, tower=tower)
        self.state = model_benchmark.build_state(options, case["input_shape"], case["embed_dim"])
        weights = torch.load(WEIGHTS, mmap=True)
        for key, parameter in self.state.engine.model.named_parameters():
            parameter.data.copy_(weights[key])

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the first step. They are gone, but AdamW's first average is proportional to them."""
        state = self.state.engine.optimizer_state()
        return {key: value["exp_avg"] / (1 - ADAM["betas"][0]) for key, value in state.items()}

    def step(self, batch: dict[str, Tensor]) -> float:
        """Take a training step and return the loss."""
        if self.cached_text:
            return self.take_step(self.state, batch["inputs"], {"features": batch["text_features"]})
        ids = batch["input_ids"][:, : int(batch["attention_mask"].sum(dim=1).max())]  # as our tokenizer pads
        return self.take_step(self.state, batch["inputs"], {"input_ids": ids, "caption": torch.arange(len(ids))})


def import_original(modality: str) -> ModuleType:
    """Import a modality's module of the original without the package's __init__, which needs an old torchvision."""
    if "languagebind" not in sys.modules:
        package = sys.modules["languagebind"] = ModuleType("languagebind")
        package.__path__ = [f"{folder}/languagebind" for folder in sys.path]
    return importlib.import_module(f"languagebind.{modality}.modeling_{modality}")


def original_config(case: dict[str, Any], prefix: str = "", **more: object) -> dict[str, Any]:
    """Return the config of a transformer in the original's terms."""
    sizes = {"hidden_size": case[f"{prefix}width"], "intermediate_size": 4 * case[f"{prefix}width"], **more}
    sizes |= {"num_hidden_layers": case[f"{prefix}depth"], "num_attention_heads": case[f"{prefix}num_heads"]}
    return sizes | {"hidden_act": "gelu", "attention_dropout": 0.0}


def random_batch(case: dict[str, Any]) -> dict[str, Tensor]:
    """Return the random batch of both sides: inputs, captions padded to 77 tokens, and features of captions."""
    torch.manual_seed(1)
    size, positions = case["batch_size"], torch.arange(77)
    lengths = torch.randint(8, 30, (size, 1))
    ids = torch.randint(1, 49000, (size, 77)).masked_fill(positions == 0, 49406)
    ids = ids.masked_fill(positions == lengths - 1, 49407).masked_fill(positions >= lengths, 0)
    inputs, features = torch.randn(size, *case["input_shape"]), torch.randn(size, case["embed_dim"])
    text = {"input_ids": ids, "attention_mask": (ids > 0).long(), "text_features": F.normalize(features, dim=-1)}
    return {"inputs": inputs, **text}


def main() -> None:
    action, case = sys.argv[1], json.loads(sys.argv[2])
    side, batch = (Original if case["side"] == "original" else Ours)(case), random_batch(case)
    if action == "check":
        print(json.dumps({"loss": side.step(batch)}))
        torch.save(side.gradients(), f"{case['side']}.gradients.pt")
    else:
        print(json.dumps(measure_steps(lambda: side.step(batch), CPU, case["steps"], case["warmup_steps"])))


if __name__ == "__main__":
    main()
