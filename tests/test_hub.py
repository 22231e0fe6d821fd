"""Checkpoints of the Hugging Face hub: its cache with and without the network, and the original's state dicts."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

import languagebind
from languagebind import LanguageBind, LanguageBindDepth
from languagebind.config import UserError
from languagebind.hub.config import CONFIGS
from languagebind.hub.processing import PROCESSORS, TOKENIZERS
from languagebind.hub.published import MODELS

TOKENS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def fill(cache: Path, toy: Path, repo: str, commit: str = "1" * 40, branch: str = "main", tokens: bool = True) -> Path:
    """Write a toy into a cache of the hub as a published repository: pytorch_model.bin alone, with blobs and links."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    torch.save(load_file(toy / "model.safetensors"), cache / "weights.bin")
    files = {"pytorch_model.bin": cache / "weights.bin", "config.json": toy / "config.json"}
    for name, source in (files | {name: toy / name for name in TOKENS if tokens and (toy / name).exists()}).items():
        blob = folder / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        shutil.copy(source, blob)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(blob)
    (folder / "refs" / branch).write_text(commit)
    return snapshot


@pytest.fixture(scope="module")
def cache(toys, tmp_path_factory):
    """A cache with a repository of each modality; that of the infrared one has no tokenizer files."""
    folder = tmp_path_factory.mktemp("cache")
    for name in CONFIGS:
        fill(folder, toys / name, f"LanguageBind/LanguageBind_{name.title()}", tokens=name != "thermal")
    return folder


@pytest.fixture
def default_cache(cache, monkeypatch):
    """The same cache, as the one that HF_HUB_CACHE names."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def same_weights(model, toy):
    state = load_file(toy / "model.safetensors")
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cached_repository_loads_offline_through_every_class(toys, cache, name):
    short, options = f"LanguageBind_{name.title()}", {"cache_dir": cache, "local_files_only": True}
    repo, former = f"LanguageBind/{short}", f"lb203/{short}"
    assert same_weights(MODELS[name].from_pretrained(repo, **options), toys / name)
    config = CONFIGS[name].from_pretrained(former, **options)
    found = MODELS[name].from_pretrained(former, config=config, cache_dir=str(cache), revision="1" * 40)
    assert same_weights(found, toys / name)
    ids = TOKENIZERS[name].from_pretrained(toys / name)(["two dogs"])["input_ids"]
    assert TOKENIZERS[name].from_pretrained(former, **options)(["two dogs"])["input_ids"] == ids
    assert PROCESSORS[name].from_pretrained(repo, **options)(text=["two dogs"])["input_ids"][0][:4] == ids[0]
    kind, layer = getattr(languagebind, f"LanguageBind{name.title()}Tower"), Namespace(mm_vision_select_layer=-2)
    weight = kind(former, layer, **options).encoder.post_layernorm.weight
    assert torch.equal(weight, found.vision_model.post_layernorm.weight)
    weights = LanguageBind({name: repo}, **options).state_dict()
    assert torch.equal(weights[f"modality_encoder.{name}.post_layernorm.weight"], weight)
    model = languagebind.load(former, **options).encoders["infrared" if name == "thermal" else name][0]
    assert torch.equal(model.vision_model.post_layernorm.weight, weight)
    assert languagebind.get_tokenizer(repo, **options)(["two dogs"])[0, :2].tolist() == ids[0][:2]


def test_the_default_cache_serves_all_other_doors(toys, default_cache, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no ./cache_dir
    wrapper = LanguageBind({"depth": "LanguageBind_Depth", "image": "lb203/LanguageBind_Image"})
    local = LanguageBind({"depth": toys / "depth", "image": toys / "image"})
    assert all(torch.equal(value, local.state_dict()[key]) for key, value in wrapper.state_dict().items())
    expected = languagebind.load(toys / "depth").encode(depth=files["depth"])
    for name in ("LanguageBind_Depth", "LanguageBind/LanguageBind_Depth", "lb203/LanguageBind_Depth"):
        assert torch.equal(languagebind.load(name).encode(depth=files["depth"]), expected)
        assert languagebind.get_tokenizer(name)(["a"]).shape == (1, 77)
    model, transform = languagebind.create_model_from_pretrained("hf-hub:LanguageBind/LanguageBind_Depth")
    with torch.no_grad():
        assert torch.equal(model.encode(torch.stack([transform(x) for x in files["depth"]]), True), expected)
    repo = "LanguageBind/LanguageBind_Depth"
    assert same_weights(AutoModel.from_pretrained(repo), toys / "depth")
    assert isinstance(AutoConfig.from_pretrained(repo, local_files_only=True), CONFIGS["depth"])
    assert isinstance(AutoProcessor.from_pretrained(repo), PROCESSORS["depth"])
    assert AutoTokenizer.from_pretrained(repo)("two dogs")["input_ids"][0] == 49406
    languagebind.LanguageBindDepthTower(repo, Namespace(mm_vision_select_layer=-2))
    with pytest.raises(TypeError, match="unexpected option 'local_file_only'"):
        languagebind.load(repo, local_file_only=True)


def test_a_cache_under_the_former_name(toys, tmp_path):
    fill(tmp_path, toys / "depth", "lb203/LanguageBind_Depth")
    for name in ("lb203/LanguageBind_Depth", "LanguageBind/LanguageBind_Depth", "LanguageBind_Depth"):
        assert same_weights(LanguageBindDepth.from_pretrained(name, cache_dir=tmp_path), toys / "depth")
    # Only the tokenizer was read under the current name
    snapshot = fill(tmp_path, toys / "depth", "LanguageBind/LanguageBind_Depth", "2" * 40)
    for name in ("config.json", "pytorch_model.bin"):
        (snapshot / name).unlink()
    assert same_weights(
        LanguageBindDepth.from_pretrained("lb203/LanguageBind_Depth", cache_dir=tmp_path), toys / "depth"
    )
    languagebind.LanguageBindDepthProcessor.from_pretrained("LanguageBind_Depth", cache_dir=tmp_path)


def test_all_files_come_from_one_revision(toys, tmp_path):
    repo, options = "LanguageBind/LanguageBind_Depth", {"cache_dir": tmp_path, "local_files_only": True}
    old = fill(tmp_path, toys / "depth", repo, "1" * 40, "v1")
    other = LanguageBindDepth(LanguageBindDepth.from_pretrained(toys / "depth").config)
    other.save_pretrained(tmp_path / "other")
    new = fill(tmp_path, tmp_path / "other", repo, "2" * 40)
    for revision, folder in (("v1", toys / "depth"), ("1" * 40, toys / "depth"), (None, tmp_path / "other")):
        assert same_weights(LanguageBindDepth.from_pretrained(repo, revision=revision, **options), folder)
    (new / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=rf"{new.name} has no weights file: expected one of model\.safetensors"):
        LanguageBindDepth.from_pretrained(repo, **options)  # and not the old weights
    (new / "config.json").unlink()
    with pytest.raises(UserError, match=r"it is not in the cache: check the name, or load it once with access to"):
        LanguageBindDepth.from_pretrained(repo, **options)
    assert same_weights(LanguageBindDepth.from_pretrained(repo, revision=old.name, **options), toys / "depth")


def test_variants_shards_and_subfolders_in_the_cache(toys, tmp_path):
    snapshot = fill(tmp_path, toys / "depth", "org/name")
    state = torch.load(snapshot / "pytorch_model.bin", weights_only=True)
    keys, inner = sorted(state), snapshot / "inner"
    inner.mkdir()
    shutil.copy(toys / "depth" / "config.json", inner)
    torch.save({key: value.half() for key, value in state.items()}, inner / "pytorch_model.fp16.bin")
    parts = {"a.bin": keys[::2], "b.bin": keys[1::2]}
    for file, part in parts.items():
        torch.save({key: state[key] for key in part}, inner / file)
    weight_map = {key: file for file, part in parts.items() for key in part}
    (inner / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    options = {"cache_dir": tmp_path, "subfolder": "inner"}
    assert same_weights(LanguageBindDepth.from_pretrained("org/name", **options), toys / "depth")
    half = LanguageBindDepth.from_pretrained("org/name", variant="fp16", **options)
    assert torch.equal(half.logit_scale, state["logit_scale"].half())
    (inner / "b.bin").unlink()
    with pytest.raises(UserError, match=r"lists b\.bin, which does not exist"):
        LanguageBindDepth.from_pretrained("org/name", **options)


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}, {"revision": "other"}, {"force_download": True}])
def test_what_is_not_in_the_cache_is_an_error_that_says_what_to_do(cache, options):
    repo = "LanguageBind/LanguageBind_Depth" if options.keys() & {"revision", "force_download"} else "org/name"
    for kind in (LanguageBindDepth, TOKENIZERS["depth"], PROCESSORS["depth"], CONFIGS["depth"]):
        with pytest.raises(
            UserError, match=rf"no folder {repo}, and it is not in the cache: check the name, or load it once"
        ):
            kind.from_pretrained(repo, cache_dir=cache, **options)


NETWORK = """
import hashlib, json, logging, os, sys, threading, warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

commits, asked = ["1" * 40, "2" * 40], []

class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        asked.append(parts[-1])
        if parts[0] == "api":
            return self.answer(200, json.dumps({"id": "org/name", "sha": commits[0], "siblings": []}).encode())
        *_, revision, file = parts
        commit = commits[0] if revision == "main" else revision
        path = Path(sys.argv[1], commit, file)
        body = path.read_bytes() if path.is_file() else b""
        self.answer(200 if body else 404, body, {"X-Repo-Commit": commit, "ETag": hashlib.sha256(body).hexdigest()}
                    if body else {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound"})
        if file == "config.json" and self.command == "GET":
            commits.reverse()  # the branch moves on in the middle of a load

    do_HEAD = do_GET

    def answer(self, status, body, headers={}):
        self.send_response(status)
        for item in {"Content-Length": len(body), **headers}.items():
            self.send_header(*map(str, item))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
import languagebind

def load(**options):
    asked.clear()
    with warnings.catch_warnings(record=True) as said:
        model = languagebind.LanguageBindDepth.from_pretrained("org/name", **options)
    print(float(model.logit_scale.detach()), len(asked), *(w.message for w in said if "hub" in str(w.message)), sep="|")

load()
commits.reverse()
load()
load(local_files_only=True)
server.shutdown()
server.server_close()
load()
load(revision="1" * 40)
print(languagebind.load("org/name").modalities)
try:
    load(revision="other")
except languagebind.UserError as error:
    print(error)
"""


def test_one_revision_is_downloaded_and_read_from_the_cache_if_the_network_is_down(toys, tmp_path):
    for commit, scale in (("1" * 40, 1.0), ("2" * 40, 2.0)):
        model = LanguageBindDepth.from_pretrained(toys / "depth")
        model.logit_scale.data.fill_(scale)
        folder = tmp_path / "hub" / commit
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    command = [sys.executable, "-c", NETWORK, str(tmp_path / "hub")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    first, second, local, down, pinned, modalities, other = done.stdout.splitlines()
    assert first.startswith("1.0|")
    assert second.startswith("1.0|")
    assert local == "1.0|0"
    for line in (down, pinned):
        assert line.startswith("1.0|0|cannot reach the hub")
        assert line.endswith("1" * 40)
        assert line.count("cannot reach") == 1
    assert modalities == "['depth']"
    assert other.startswith("there is no folder org/name, and its download from the hub failed: ")


# Adapters of the original's LoRA checkpoints, under the names of PEFT before 0.7 and of later versions
LAYER = "vision_model.encoder.base_model.model.layers.0.self_attn.q_proj."


def originals(toy: Path, modern: bool = False) -> dict[str, torch.Tensor]:
    """Return the depth toy as the original code saves it: with position ids, and with adapters of rank 2."""
    state = {key: value.clone() for key, value in load_file(toy / "model.safetensors").items()}
    inner = "vision_model.encoder."
    state = {key.replace(inner, f"{inner}base_model.model."): value for key, value in state.items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for key in [key for key in state if key.startswith("vision_model.encoder") and key.endswith("_proj.weight")]:
        name = key.removesuffix("weight")
        state[f"{name}lora_A.default.weight"] = torch.randn(2, 32)
        state[f"{name}lora_B.default.weight"] = torch.randn(32, 2)
        for kind in ("weight", "bias") if modern else ():
            state[f"{name}base_layer.{kind}"] = state.pop(name + kind)
    return state


@pytest.fixture
def adapted(toys, tmp_path):
    """The depth toy with a config as of the published LoRA checkpoints, and the original's state dict in its file."""
    config = json.loads((toys / "depth" / "config.json").read_text())
    config["vision_config"] |= {"lora_r": 2, "lora_alpha": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(originals(toys / "depth"), tmp_path / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_state_dicts_of_the_original_load_into_a_class_strictly(adapted, toys, modern, prefix):
    model, state = LanguageBindDepth.from_pretrained(adapted), originals(toys / "depth", modern)
    given = {prefix + key: value for key, value in state.items()}
    assert not any(model.load_state_dict(given))
    assert given.keys() == {prefix + key for key in state}  # the caller's dictionary stays as it was
    base = state[LAYER + ("base_layer.weight" if modern else "weight")]
    merged = base + 16 / 2 * state[LAYER + "lora_B.default.weight"] @ state[LAYER + "lora_A.default.weight"]
    weights = model.state_dict()
    torch.testing.assert_close(weights["vision_model.encoder.layers.0.self_attn.q_proj.weight"], merged)
    assert torch.equal(weights["visual_projection.weight"], state["visual_projection.weight"])
    model.save_pretrained(adapted / "again")
    again = LanguageBindDepth.from_pretrained(adapted / "again", config=model.config)
    assert not any(again.load_state_dict(originals(toys / "depth")))


def test_state_dicts_of_the_original_load_into_the_wrapper_and_within_other_modules(adapted, toys):
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = LanguageBind({"depth": adapted})
            self.head = torch.nn.Linear(16, 2)

    state, wrapped = originals(toys / "depth"), {}
    for ours, theirs in (("vision_model", "encoder.depth"), ("text_model", "encoder.language"),
                         ("visual_projection", "proj.depth"), ("text_projection", "proj.language")):  # fmt: skip
        wrapped |= {key.replace(ours, f"modality_{theirs}"): x for key, x in state.items() if key.startswith(ours)}
    reference = LanguageBindDepth.from_pretrained(adapted)
    reference.load_state_dict(state)
    pictures, ids = torch.randn(2, 3, 56, 56), torch.randint(1, 49407, (2, 77))
    bare, outer = LanguageBind({"depth": adapted}, use_temp=False), torch.nn.DataParallel(Classifier())
    assert not any(bare.load_state_dict({f"module.{key}": value for key, value in wrapped.items()}))
    found = outer.load_state_dict({f"module.model.{key}": x for key, x in wrapped.items()} | {"y": ids}, strict=False)
    assert found.missing_keys == ["module.head.weight", "module.head.bias"]
    assert found.unexpected_keys == ["y"]
    outer.module.model.use_temp = False
    for model in (bare, outer.module.model):
        with torch.no_grad():
            output = model({"depth": {"pixel_values": pictures}, "language": {"input_ids": ids}})
            expected = reference(ids, pictures)
        assert torch.equal(output["depth"], expected.image_embeds)
        assert torch.equal(output["language"], expected.text_embeds)


def test_adapters_that_the_config_does_not_describe_are_refused_by_name(adapted, toys):
    state, plain = originals(toys / "depth"), LanguageBindDepth.from_pretrained(toys / "depth")
    other = LanguageBindDepth.from_pretrained(adapted)
    half = {key: value for key, value in state.items() if key != LAYER + "lora_B.default.weight"}
    none = {key: value for key, value in state.items() if ".lora_" not in key}
    thin = {key: value[:1] if ".lora_A." in key else value for key, value in state.items()}
    for model, given, message in (
        (plain, state, r"with vision_model.*lora_\w.default.weight: it was saved with LoRA, .* config says lora_r 0"),
        (other, half, r"with vision_model.*the LoRA adapter .*layers.0.self_attn.q_proj is incomplete"),
        (other, none, r"with vision_model.*base_model.* was saved with LoRA, but has no adapters"),
        (other, thin, r"adapters of rank \[1\]; its config says lora_r 2"),
    ):
        before = {key: value.clone() for key, value in model.vision_model.state_dict().items()}
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=message):
                model.load_state_dict(given, strict=strict)
        assert all(torch.equal(value, before[key]) for key, value in model.vision_model.state_dict().items())


@pytest.mark.filterwarnings("ignore:the state dict lacks")
def test_what_a_state_dict_lacks_is_returned(adapted, toys):
    model, state = LanguageBindDepth.from_pretrained(adapted), originals(toys / "depth")
    del state["visual_projection.weight"], state[LAYER + "bias"]
    with pytest.warns(UserWarning, match=r"the state dict lacks 2 weights.*q_proj.bias, visual_projection.weight"):
        found = model.load_state_dict(state | {"loss.weight": torch.zeros(1)}, strict=False)
    assert sorted(found.missing_keys) == [
        "vision_model.encoder.layers.0.self_attn.q_proj.bias", "visual_projection.weight",
    ]  # fmt: skip
    assert found.unexpected_keys == ["loss.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*visual_projection.weight"):
        model.load_state_dict(state)
    found = model.load_state_dict({f"wrong.{key}": value for key, value in state.items()}, strict=False)
    assert len(found.missing_keys) == len(model.state_dict())
    assert len(found.unexpected_keys) == len(state) - 2  # position ids have no place in any module


def test_adapters_of_the_module_itself_are_loaded_as_they_are(toys):
    from peft import LoraConfig, get_peft_model

    def build():
        model = LanguageBindDepth.from_pretrained(toys / "depth")
        options = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
        model.vision_model.encoder = get_peft_model(model.vision_model.encoder, options)  # as the original code does
        return model

    torch.manual_seed(0)
    trained = build()
    position_ids = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    restored = build()
    assert not any(restored.load_state_dict(trained.state_dict() | position_ids))
    assert all(torch.equal(value, restored.state_dict()[key]) for key, value in trained.state_dict().items())


@pytest.mark.parametrize("case", ["audio_lora", "depth_lora", "thermal_lora", "video_lora"])
def test_state_dicts_written_by_the_original_give_its_outputs(golden, case):
    folder, model = golden / "golden" / case, MODELS[case.partition("_")[0]].from_pretrained(golden / "golden" / case)
    for parameter in model.parameters():
        parameter.data.zero_()
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert not any(model.load_state_dict({f"module.{key}": value for key, value in state.items()}))
    data = np.load(folder / "golden.npz")
    with torch.inference_mode():
        found = model(torch.from_numpy(data["input_ids"]), torch.from_numpy(data["pixel_values"]))
    np.testing.assert_allclose(found.image_embeds, data["image_embeds"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.text_embeds, data["text_embeds"], atol=1e-5, rtol=0)
