"""The published classes: the original's numbers, its call signatures, and errors in place of silence."""

import json
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import ROOT
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import Compose
from transformers import AutoModel

import languagebind
from languagebind import DecodeError, LanguageBind, LanguageBindDepth, LanguageBindVideo, to_device, transform_dict
from languagebind.config import UserError
from languagebind.hub.config import CONFIGS
from languagebind.hub.files import read_weights
from languagebind.hub.processing import PROCESSORS, TOKENIZERS
from languagebind.hub.published import MODELS
from languagebind.transformer import Attention
from languagebind.weights import WeightsError

CASES = ["audio_ft", "audio_lora", "depth_lora", "image", "thermal_lora", "video_ft", "video_lora", "video_v15_ft"]
TEXTS = ["Training a parakeet to climb up a ladder.", "A lion climbing a tree to catch a monkey."]


def expected(golden: Path, case: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(golden / "golden" / case / "golden.npz").items()}


def model_of(case: str):
    return MODELS[case.partition("_")[0]]


def close(tensor, other, atol=1e-5):
    torch.testing.assert_close(tensor, other, atol=atol, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_published_checkpoints_give_the_originals_outputs(golden, case, attention):
    model, data = (
        model_of(case).from_pretrained(golden / "golden" / case, attn_implementation=attention),
        expected(golden, case),
    )
    with torch.inference_mode():
        found = model(data["input_ids"], data["pixel_values"], data["attention_mask"])
    close(found.image_embeds, data["image_embeds"])
    close(found.text_embeds, data["text_embeds"])
    close(found.logits_per_text, data["logits_per_text"])
    close(found.vision_model_output.pooler_output, data["pooled"])
    # Before the last norm the values reach 13: merging adapters rounds each weight, and 1e-5 is of that size.
    states = data["last_hidden_state"]
    close(found.vision_model_output.last_hidden_state, states, 1e-5 * states.abs().max().item())


@pytest.mark.parametrize("case", ["audio_lora", "depth_lora", "thermal_lora", "video_lora"])
def test_adapters_of_todays_peft_are_merged_too(golden, case, tmp_path):
    folder = golden / "golden" / case
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    adapted = {key.partition(".lora_")[0] for key in state if ".lora_" in key}
    renamed = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        renamed[f"{name}.base_layer.{kind}" if name in adapted else key] = value
    assert renamed.keys() != state.keys()
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    one, other = (model_of(case).from_pretrained(path).state_dict() for path in (folder, tmp_path))
    assert all(torch.equal(one[key], other[key]) for key in one)


def damage_missing(state):
    del state["vision_model.post_layernorm.bias"]


def damage_extra(state):
    state["vision_model.extra.weight"] = torch.zeros(1)


def damage_shape(state):
    state["visual_projection.weight"] = state["visual_projection.weight"][:-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"1 missing:\s+vision_model.post_layernorm.bias"),
        (damage_extra, r"1 unexpected:\s+vision_model.extra.weight"),
        (damage_shape, r"visual_projection.weight: \(15, 32\), expected \(16, 32\)"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_lists_the_keys(toys, tmp_path, damage, message):
    shutil.copy(toys / "depth" / "config.json", tmp_path)
    state = load_file(toys / "depth" / "model.safetensors")
    damage(state)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        LanguageBindDepth.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=message):
        LanguageBind({"depth": tmp_path})


def test_adapters_of_another_rank_or_without_adapters_are_refused(golden, tmp_path):
    folder = golden / "golden" / "depth_lora"
    config = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config["vision_config"]["lora_r"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"adapters of rank \[\d\]; its config says lora_r \d"):
        LanguageBindDepth.from_pretrained(tmp_path)
    torch.save({key: value for key, value in state.items() if ".lora_" not in key}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="was saved with LoRA, but has no adapters"):
        LanguageBindDepth.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_loads_with_the_same_bits(toys, tmp_path, name):
    model = MODELS[name].from_pretrained(toys / name)
    for options in ({}, {"max_shard_size": "100KB"}):
        folder = tmp_path / str(len(options))
        model.save_pretrained(folder, **options)
        again = MODELS[name].from_pretrained(folder)
        again.save_pretrained(folder, **options)  # over the files that its weights may be mapped from
        state, other = again.state_dict(), MODELS[name].from_pretrained(folder).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1


KILLED = """
import os, sys
import transformers.modeling_utils
from languagebind import LanguageBindDepth
model = LanguageBindDepth.from_pretrained(sys.argv[1])
transformers.modeling_utils.safe_save_file = lambda *a, **k: os._exit(9)
model.save_pretrained(sys.argv[1])
"""


def test_saving_takes_nothing_away_but_the_weights_that_it_replaces(toys, tmp_path):
    def kept():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    model = LanguageBindDepth.from_pretrained(toys / "depth")
    model.save_pretrained(tmp_path)
    for name in ("model_ema.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"someone else's")
    before = kept()
    model.save_pretrained(tmp_path, is_main_process=False)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert done.returncode == 9
    assert kept() == before
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert "model.safetensors" not in kept()
    LanguageBindDepth.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert kept() == before
    with pytest.raises(FileExistsError, match=r"config\.json"):
        model.save_pretrained(tmp_path / "config.json")


def test_a_variant_of_the_weights(toys, tmp_path):
    LanguageBindDepth.from_pretrained(toys / "depth", dtype="float16").save_pretrained(tmp_path, variant="fp16")
    found = LanguageBindDepth.from_pretrained(pretrained_model_name_or_path=tmp_path, variant="fp16")
    assert found.dtype == torch.float16
    with pytest.raises(UserError, match=r"has no weights file: expected one of model\.safetensors"):
        LanguageBindDepth.from_pretrained(tmp_path)


def resaved(toys, folder, change):
    """The depth toy with changed tensors."""
    shutil.copytree(toys / "depth", folder, dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


def test_weights_of_several_types_become_one(toys, tmp_path, files):
    name = "visual_projection.weight"
    mixed = resaved(toys, tmp_path / "mixed", lambda state: state.update({name: state[name].half()}))
    assert LanguageBindDepth.from_pretrained(mixed).dtype == torch.float32
    assert languagebind.load(mixed).encode(depth=files["depth"]).shape == (2, 16)
    whole = resaved(toys, tmp_path / "whole", lambda state: state.update({name: state[name].int()}))
    for load in (LanguageBindDepth.from_pretrained, languagebind.load):
        with pytest.raises(WeightsError, match=r"has integer weights: visual_projection.weight torch.int32"):
            load(whole)


def test_a_sharded_bin_loads(toys, tmp_path):
    state = load_file(toys / "depth" / "model.safetensors")
    parts = {"a.bin": dict(list(state.items())[::2]), "b.bin": dict(list(state.items())[1::2])}
    for file, part in parts.items():
        torch.save(part, tmp_path / file)
    weight_map = {key: file for file, part in parts.items() for key in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(toys / "depth" / "config.json", tmp_path)
    found = LanguageBindDepth.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in state.items())
    (tmp_path / "b.bin").unlink()
    with pytest.raises(UserError, match=r"lists b.bin, which does not exist"):
        LanguageBindDepth.from_pretrained(tmp_path)
    for text in ("[]", '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": null}}'):
        (tmp_path / "pytorch_model.bin.index.json").write_text(text)
        with pytest.raises(UserError, match=r"pytorch_model.bin.index.json is not a valid index"):
            LanguageBindDepth.from_pretrained(tmp_path)


def test_a_part_that_the_hub_does_not_give_is_no_fault_of_the_index(tmp_path, monkeypatch):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')

    def download(name, file, **options):
        if file == index.name:
            return index
        raise RemoteEntryNotFoundError(file, response=Mock()) if file == "model.safetensors" else OSError("it broke")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=r"^there is no folder a/b, and its download from the hub failed: it broke"):
        read_weights("a/b", 0, 1)


def test_pickled_code_is_never_run(toys, tmp_path):
    shutil.copy(toys / "depth" / "config.json", tmp_path)
    torch.save({"a": torch.zeros(1), "b": Namespace}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="something other than tensors"):
        LanguageBindDepth.from_pretrained(tmp_path)


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        LanguageBindDepth.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"LanguageBind/LanguageBind_Depth"):
        LanguageBindDepth.from_pretrained("lb203/LanguageBind_Depth", cache_dir=tmp_path, local_files_only=True)


def test_configs_that_do_not_fit(toys, tmp_path):
    with pytest.raises(UserError, match="is a LanguageBindDepth, not a LanguageBindThermal"):
        MODELS["thermal"].from_pretrained(toys / "depth")  # the same shapes, but read in another way
    config = json.loads((toys / "depth" / "config.json").read_text())
    for damaged, message in (
        ("{", "is not a valid JSON"),
        ([], "cannot use the config of"),
        (config | {"vision_config": {"num_frames": "a"}}, "num_frames"),
        (config | {"vision_config": "x"}, "vision_config"),
        (config | {"vision_config": config["vision_config"] | {"hidden_act": "tanh"}}, "hidden_act.*tanh"),
        (config | {"vision_config": config["vision_config"] | {"image_size": [56, 56, 56]}}, "the config of"),
        (config | {"vision_config": config["vision_config"] | {"tube_size": 2}}, "tube_size"),
        (
            config | {"vision_config": config["vision_config"] | {"num_frames": 0}},
            r"does not support inputs .* \(3, 0, 56, 56\)",
        ),
        (config | {"vision_config": config["vision_config"] | {"num_mel_bins": 28, "target_length": 56}}, "inputs"),
        (config | {"projection_dim": 0}, "projection_dim"),
    ):
        (tmp_path / "config.json").write_text(damaged if damaged == "{" else json.dumps(damaged))
        for load in (LanguageBindDepth.from_pretrained, languagebind.load):
            with pytest.raises(UserError, match=message):
                load(tmp_path)
    (tmp_path / "config.json").write_text((toys / "depth" / "config.json").read_text())
    with pytest.raises(UserError, match=r"has no weights file: expected one of model\.safetensors, "):
        LanguageBindDepth.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="is damaged or is not a weights file"):
        LanguageBindDepth.from_pretrained(tmp_path)


def test_the_flow_of_the_originals_inference(toys, files):
    """The original's README, line for line but for the paths."""
    device = torch.device("cpu")
    clip_type = {name: str(toys / name) for name in ("video", "audio", "thermal", "image", "depth")}
    model = LanguageBind(clip_type=clip_type, cache_dir="./cache_dir")
    model = model.to(device)
    model.eval()
    pretrained_ckpt = str(toys / "image")
    tokenizer = languagebind.LanguageBindImageTokenizer.from_pretrained(
        pretrained_ckpt, cache_dir="./cache_dir/tokenizer_cache_dir"
    )
    modality_transform = {c: transform_dict[c](model.modality_config[c]) for c in clip_type}
    inputs = {c: to_device(modality_transform[c](files[c]), device) for c in clip_type}
    inputs["language"] = to_device(
        tokenizer(TEXTS, max_length=77, padding="max_length", truncation=True, return_tensors="pt"), device
    )
    with torch.no_grad():
        embeddings = model(inputs)
    for name in clip_type:
        scale = model.modality_scale[name].exp()
        close(embeddings[name].norm(dim=-1), scale.expand(2), 1e-4)
        probabilities = torch.softmax(embeddings[name] @ embeddings["language"].T, dim=-1)
        assert probabilities.shape == (2, 2)
        single = MODELS[name].from_pretrained(toys / name)
        process = PROCESSORS[name](single.config, tokenizer)
        data = process(files[name], TEXTS, return_tensors="pt")
        with torch.no_grad():
            out = single(**data)
        assert data.keys() == {"input_ids", "attention_mask", "pixel_values"}
        close(out.image_embeds * scale, embeddings[name], 1e-4)
        close(out.text_embeds, embeddings["language"])
    model.use_temp = False
    with torch.no_grad():
        close(model(inputs)["audio"].norm(dim=-1), torch.ones(2))


def test_language_is_that_of_the_last_checkpoint_as_in_the_original(golden, caplog):
    cases = {"image": "image", "audio": "audio_ft", "thermal": "thermal_lora"}
    data = {name: expected(golden, case) for name, case in cases.items()}
    for order in (("image", "audio", "thermal"), ("thermal", "image", "audio")):
        caplog.clear()
        model = LanguageBind({name: golden / "golden" / cases[name] for name in order})
        inputs = {name: {"pixel_values": data[name]["pixel_values"]} for name in order}
        language = data[order[-1]]
        inputs["language"] = {key: language[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            found = model(inputs)
        close(found["language"], language["text_embeds"])
        for name in order:
            close(found[name], data[name]["image_embeds"] * model.modality_scale[name].exp(), 1e-4)
        (record,) = caplog.records
        names = " or ".join(name for name in order[:-1])
        assert f"language is encoded with that of {order[-1]}; to compare texts with {names}" in record.message
        assert {key.split(".")[1] for key in model.state_dict()} == {*order, "language"}


def test_towers_of_different_sizes_are_refused(toys, golden):
    with pytest.raises(UserError, match="the text towers of depth and audio differ in size"):
        LanguageBind({"depth": toys / "depth", "audio": golden / "golden" / "audio_ft"})
    with pytest.raises(UserError, match="unknown modality 'smell'"):
        LanguageBind({"smell": toys / "depth"})


def test_states_attention_and_tuples(toys):
    model = LanguageBindVideo.from_pretrained(toys / "video", attn_implementation="eager")
    clips, ids = torch.randn(2, 3, 8, 56, 56), torch.randint(1, 49000, (2, 9))
    out = model.vision_model(clips, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in out.hidden_states] == [(16, 17, 32)] * 3
    assert [weights.shape for weights in out.attentions] == [(16, 2, 17, 17)] * 2
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    close(out.attentions[0].sum(-1), torch.ones(16, 2, 17))
    plain = model.vision_model(clips, return_dict=False)
    assert torch.equal(plain[1], out.pooler_output)
    assert len(plain) == 2
    loss, per_image, per_text, text, image, text_out, vision_out = model(
        ids, clips, return_loss=True, return_dict=False
    )
    assert torch.equal(per_image, per_text.T)
    labels = torch.arange(2)
    both = torch.nn.functional.cross_entropy(per_text, labels) + torch.nn.functional.cross_entropy(per_image, labels)
    close(loss, both / 2)
    assert torch.equal(text_out[1], model.text_model(ids)[1])
    assert torch.equal(vision_out[1], plain[1])
    close(text, torch.nn.functional.normalize(model.get_text_features(ids), dim=-1))
    close(image, torch.nn.functional.normalize(model.get_image_features(clips), dim=-1))
    pairs = clips.unflatten(0, (1, 2)).permute(0, 1, 3, 2, 4, 5).unsqueeze(3)  # (B, pairs, T, S, C, H, W)
    close(model.vision_model(pairs).pooler_output, out.pooler_output)


def test_devices_and_kinds_of_numbers(toys):
    model = LanguageBindDepth.from_pretrained(toys / "depth", device_map={"": "cpu"}, dtype="float16")
    assert (model.dtype, model.device.type) == (torch.float16, "cpu")
    for options, dtype in (({"dtype": "auto"}, torch.float32), ({"torch_dtype": "bf16"}, torch.bfloat16)):
        assert LanguageBindDepth.from_pretrained(toys / "depth", **options).dtype == dtype
    with pytest.raises(UserError, match="dtype 'foo' is not a floating-point type; use float32"):
        LanguageBindDepth.from_pretrained(toys / "depth", dtype="foo")
    assert model.vision_model(torch.randn(1, 3, 56, 56)).pooler_output.dtype == torch.float16


def test_gradients_reach_the_input(toys):
    model = LanguageBindDepth.from_pretrained(toys / "depth")
    x = torch.randn(1, 3, 56, 56, requires_grad=True)
    model.get_image_features(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_way_of_attention_follows_the_config(toys):
    def eager(model):
        return {module.eager for module in model.modules() if isinstance(module, Attention)}

    model = LanguageBindDepth.from_pretrained(toys / "depth")
    assert eager(model) == {False}
    model.set_attn_implementation("eager")
    assert eager(model) == {True}
    assert eager(AutoModel.from_config(model.config, attn_implementation="eager")) == {True}
    assert eager(AutoModel.from_config(model.config, attn_implementation="sdpa")) == {False}


def test_options_of_transformers(toys):
    model, info = LanguageBindDepth.from_pretrained(toys / "depth", config=toys / "depth", output_loading_info=True)
    assert isinstance(model, LanguageBindDepth)
    assert not info["missing_keys"]
    with pytest.raises(TypeError, match="state_dict"):
        LanguageBindDepth.from_pretrained(toys / "depth", state_dict={})
    with pytest.raises(UserError, match="pass both input_ids and pixel_values"):
        model(pixel_values=torch.zeros(1, 3, 56, 56))
    with pytest.raises(UserError, match="200 tokens, more than the tower's limit of 77"):
        model.get_text_features(torch.ones(1, 200, dtype=torch.long))


def test_a_sample_has_the_same_features_in_any_batch(toys):
    model, x = LanguageBindVideo.from_pretrained(toys / "video"), torch.randn(5, 3, 8, 56, 56)
    with torch.inference_mode():
        whole = model.get_image_features(x)
        close(whole, torch.cat([model.get_image_features(one[None]) for one in x]))
        half = LanguageBindVideo.from_pretrained(toys / "video", dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16
        several, single = half.get_image_features(x), torch.cat([half.get_image_features(one[None]) for one in x])
    unit = torch.nn.functional.normalize
    close(unit(several.float(), dim=-1), unit(single.float(), dim=-1), 2e-2)
    close(unit(several.float(), dim=-1), unit(whole, dim=-1), 2e-2)


def test_another_number_of_frames_is_taken_only_when_asked_for(toys):
    model = LanguageBindVideo.from_pretrained(toys / "video")
    with pytest.raises(ValueError, match=r"takes .* = \(B, 3, 8, 56, 56\), got \(1, 3, 4, 56, 56\)"):
        model.get_image_features(torch.randn(1, 3, 4, 56, 56))
    fewer = LanguageBindVideo.from_pretrained(toys / "video", num_frames=4)
    assert fewer.get_image_features(torch.randn(1, 3, 4, 56, 56)).shape == (1, 16)
    name = "vision_model.encoder.layers.0.temporal_embedding"
    before, after = model.state_dict()[name], fewer.state_dict()[name]
    close(after[:, [0, -1]], before[:, [0, -1]])
    clips = torch.randn(1, 3, 4, 56, 56)
    encoders = languagebind.load(toys / "video", num_frames=4)
    with torch.inference_mode():
        close(encoders.encoders["video"][0].project(clips), fewer.get_image_features(clips))
    for wrong in (0, -1, 1, 1.5):
        with pytest.raises(UserError, match="num_frames should be a number of at least 2"):
            languagebind.load(toys / "video", num_frames=wrong)
    for wrong in (2.5, "8"):
        with pytest.raises(TypeError):
            languagebind.load(toys / "video", num_frames=wrong)
    with pytest.raises(UserError, match="no attention over frames"):
        LanguageBindDepth.from_pretrained(toys / "depth", num_frames=4)


@pytest.mark.parametrize("name", CONFIGS)
def test_processors_take_files_and_what_is_in_memory(toys, files, name):
    processor = PROCESSORS[name].from_pretrained(toys / name)
    assert isinstance(processor.transform, Compose)
    both = processor(files[name], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(files[name][0])["pixel_values"][0], both[0])
    assert torch.equal(processor([Path(files[name][1]).read_bytes()])["pixel_values"][0], both[1])
    if name in ("image", "thermal"):
        found = processor.transform(Image.open(files[name][0]))
    elif name == "depth":  # OpenCV's floats, in millimetres
        millimetres = np.asarray(Image.open(files[name][0])).astype(np.float32)
        found = processor.transform(millimetres)
        assert torch.equal(found, processor.transform(Image.fromarray(millimetres)))
    elif name == "audio":
        import soundfile

        sound = torch.from_numpy(soundfile.read(files[name][0], dtype="float32")[0])[None]
        found = processor.transform((sound, 16000))
        close(processor((sound, 16000.0))["pixel_values"][0], found, 1e-6)
    else:
        clip = processor.modality.decode(files[name][0])  # (T, C, H, W)
        found = processor.transform(clip.transpose(0, 1).float())
    close(found, both[0], 1e-6)
    copied = pickle.loads(pickle.dumps(processor))  # noqa: S301 - our own
    assert torch.equal(copied(files[name], return_tensors="pt")["pixel_values"], both)
    for arguments, message in (
        ((None, []), "no texts"),
        ((None, "a", 200), "context_length 200 exceeds the text tower's limit of 77 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            processor(*arguments)
    with pytest.raises(DecodeError, match="cannot be downloaded"):
        processor(["HTTP://127.0.0.1:1/a.png"])
    with pytest.raises(ValueError, match="pass texts, images, or both"):
        processor()
    assert processor.decode(processor(text="a dog")["input_ids"], skip_special_tokens=True).strip() == "a dog"


def test_tokens_are_those_of_clip(toys, tmp_path):
    import open_clip

    shutil.copy(toys / "image" / "config.json", tmp_path)  # no tokenizer files: the bundled vocabulary
    tokenizers = [TOKENIZERS["image"].from_pretrained(folder) for folder in (toys / "image", tmp_path)]
    reference = open_clip.get_tokenizer("ViT-L-14")
    for text in [*TEXTS, "Two  DOGS, 2 cats & a ﬁsh… naïve!", "it's don't", "long " * 100, "", "😱 日本語"]:
        ids = [t([text], max_length=77, padding="max_length", truncation=True)["input_ids"][0] for t in tokenizers]
        assert ids[0] == ids[1]
        length = int(reference([text])[0].argmax()) + 1
        assert ids[0][:length] == reference([text])[0, :length].tolist()
        assert set(ids[0][length:]) <= {49407}


def test_tokenizers_mend_texts_in_every_place_and_are_shared_by_threads(toys, tmp_path):
    tokenizer = TOKENIZERS["image"].from_pretrained(pretrained_model_name_or_path=toys / "image")
    broken, right = "it\u00e2\u20ac\u2122s", "it's"
    assert tokenizer.encode(broken) == tokenizer.encode(right) == tokenizer(right)["input_ids"]
    assert tokenizer("x", broken)["input_ids"] == tokenizer("x", right)["input_ids"]
    with pytest.raises(TypeError, match="a text or a list of texts, not 3"):
        tokenizer(3)

    def length(i):
        options = {"padding": "max_length", "truncation": True, "max_length": 10 + i % 5}
        return len(tokenizer(["a " * 50], **options)["input_ids"][0]) == 10 + i % 5

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(length, range(300)))
    shutil.copytree(toys / "image", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer files of"):
        TOKENIZERS["image"].from_pretrained(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_towers_give_the_tokens_of_a_layer(toys, name):
    kind = getattr(languagebind, f"LanguageBind{name.title()}Tower")
    args = Namespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    tower = kind(str(toys / name), args, delay_load=True)
    assert not tower.is_loaded
    assert (tower.hidden_size, tower.num_patches) == (32, 14 if name == "audio" else 16)
    assert isinstance(tower.image_processor, PROCESSORS[name])
    with pytest.raises(UserError, match="is not loaded yet: call load_model"):
        tower.dtype  # noqa: B018
    with pytest.raises(UserError, match="has hidden states 0 to 2"):
        kind(toys / name, Namespace(mm_vision_select_layer=3))
    tower.load_model()
    x = torch.randn(2, *tower.config.input_shape)
    x = x if name == "video" else x[:, :, 0]
    tokens = tower(x)
    assert tokens.shape == ((2, 8, 17, 32) if name == "video" else (2, tower.num_patches, 32))
    close(torch.cat(tower(list(x))), tokens)
    assert not tokens.requires_grad
    states = MODELS[name].from_pretrained(toys / name).vision_model(x, output_hidden_states=True).hidden_states
    assert torch.equal(
        tokens.flatten(0, -3) if name == "video" else tokens, states[-2] if name == "video" else states[-2][:, 1:]
    )
    assert tower.dummy_feature.shape == (1, 32)


def test_auto_classes_know_the_models_whichever_is_imported_first(toys):
    code = (
        "from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer\n"
        f"folder = {str(toys / 'thermal')!r}\n"
        "found = [kind.from_pretrained(folder) for kind in (AutoConfig, AutoModel, AutoProcessor, AutoTokenizer)]\n"
        "print(*(type(x).__name__ for x in found))\n"
    )
    for first in ("import languagebind, transformers", "import transformers, languagebind",
                  "from transformers import AutoModel; import languagebind"):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", f"{first}\n{code}"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        names = done.stdout.split()
        assert names[:3] == [f"LanguageBindThermal{kind}" for kind in ("Config", "", "Processor")], names
        assert "Tokenizer" in names[3]


def test_importing_costs_nothing_and_decoders_wait():
    code = (
        "import time, sys, torch\nbegin = time.perf_counter()\nimport languagebind\n"
        "print(time.perf_counter() - begin, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, transformers = done.stdout.split()
    assert float(seconds) < 0.2
    assert transformers == "False"


def test_old_configs_say_everything_twice():
    config = CONFIGS["video"](
        vision_config={"hidden_size": 64, "num_frames": 4},
        vision_config_dict={"hidden_size": 32, "num_attention_heads": 2},
    )
    assert (config.vision_config.hidden_size, config.vision_config.num_frames) == (32, 1)
    assert CONFIGS["audio"](vision_config={"image_size": [112, 1036]}).vision_config.input_shape == (3, 1, 112, 1036)


MEASURE = """
import sys, time
import torch
import languagebind
import languagebind.hub.published
import transformers.modeling_utils

def memory(name):  # ru_maxrss would be that of the parent, whose memory a new process has for a moment
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

before, begin = memory("VmRSS"), time.process_time()
model = languagebind.LanguageBindImage.from_pretrained(sys.argv[1])
seconds = time.process_time() - begin
assert sum(float(x.sum()) for x in model.parameters()) == 0  # weights that stayed on the disk are read now
assert model.num_parameters() == 427_616_513
print(seconds, memory("VmHWM") - before)
"""


def test_a_checkpoint_of_full_size_loads_in_little_memory_and_time(tmp_path):
    tower = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    encoder = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
               "patch_size": 14, "lora_r": 0}  # fmt: skip
    config = CONFIGS["image"](text_config=tower, vision_config=encoder, projection_dim=768)
    with torch.device("meta"):
        state = MODELS["image"](config).state_dict()
    config.save_pretrained(tmp_path)
    save_file({key: torch.zeros(value.shape) for key, value in state.items()}, tmp_path / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seconds, peak = map(float, done.stdout.split())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert seconds < 5
    assert peak < 1.3 * size, f"{peak / size:.2f} times the file"
