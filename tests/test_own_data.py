"""The page on one's own data: its commands run as they stand, and training starts from published weights."""

import csv
import json
import re
import shlex

import numpy as np
import open_clip
import pytest
import soundfile
import torch
import yaml
from helpers import ROOT
from lookalikes import film
from PIL import Image
from test_docs import joined

import languagebind
from languagebind import configs
from languagebind.__main__ import main as command
from languagebind.config import UserError
from languagebind.data.making import main as make_shards
from languagebind.model import InitConfig, ModelConfig, build_model
from languagebind.text import TextConfig
from languagebind.vit import EncoderConfig
from training.main import main as train
from training.params import parse_args

PAGE = (ROOT / "docs" / "your_own_data.md").read_text()
SCENES = {"Küche": 70, "Flur": 5, "Bad": 35}  # degrees
SIZES = ["--width=32", "--depth=2", "--num-heads=2", "--mlp-dim=64", "--image-size=56"]


@pytest.fixture
def tower(tmp_path):
    """The sizes of the toys' text tower, by a name that open_clip knows."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, "mlp_ratio": 2.0}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    (tmp_path / "ViT-Toy.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "ViT-Toy.json")
    return "ViT-Toy"


@pytest.fixture
def recordings(tmp_path):
    """A table with semicolons, and a thermal TIFF and a colour JPEG for each of its 60 rows."""
    rng, rows = np.random.default_rng(0), [("thermal", "colour", "sentence", "scene", "site")]
    (tmp_path / "t").mkdir()
    (tmp_path / "c").mkdir()
    for i in range(60):
        scene = list(SCENES)[i % 3]
        names = f"t/{i + 1:04}.tiff", f"c/{i + 1:04}.jpg"
        Image.fromarray(rng.normal(SCENES[scene], 2, (48, 64)).astype(np.float32)).save(tmp_path / names[0])
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(tmp_path / names[1])
        rows.append((*names, f"{SCENES[scene]} degrees, picture {i}", scene, f"house {i // 5}"))
    with (tmp_path / "recordings.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    return tmp_path


def test_the_commands_of_the_page_run(recordings, toys, tower, monkeypatch):
    monkeypatch.chdir(recordings)
    val, sentences = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    for name, text in (("val", val), ("test", val.replace("/val", "/test")), ("sentences", sentences)):
        (recordings / f"{name}.yaml").write_text(text)
    toy = {
        "LanguageBind/LanguageBind_Thermal": str(toys / "thermal"),
        "--samples-per-shard 100": "--samples-per-shard 20",
    }
    small = [*SIZES, "--patch-size=14", f"--text-tower={tower}", "--batch-size=8", "--epochs=1", "--workers=1"]
    random = ["--encoder-pretrained=none", "--text-pretrained=published/thermal"]
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
        for line in re.findall(r"^(?:languagebind|python) (?:'[^']*'|[^'\n])*$", joined(block), re.MULTILINE)
    ]
    assert len(lines) == 10
    for line in lines:
        for there, here in toy.items():
            line = line.replace(there, here)
        words = shlex.split(line)[1:]
        if words[0] == "-c":
            exec(words[1], {})
        elif words[0] == "-m":
            train([*words[2:], *small, *([] if "published/thermal" in words else random)])
        else:
            more = [f"--text-tower={tower}"] if words[0] == "embed-text" else []
            assert not command([*words, *more])
    results = {path.stem: json.loads(path.read_bytes()) for path in (recordings / "results").glob("*.json")}
    assert sorted(results) == ["sentences_mine-best", "sentences_thermal", "test_mine-best", "test_thermal"]
    assert results["test_mine-best"]["protocol"]["chance"]["top1"] == pytest.approx(1 / 3)
    assert (recordings / "results" / "report.html").is_file()
    log = (recordings / "logs" / "mine" / "out.log").read_text()
    assert "text features: read from beside the shards" in log
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(example, "docs/your_own_data.md", "exec"), names)
    trained = languagebind.load(recordings / "logs/mine/checkpoints/best.pt")
    start = languagebind.load(toys / "thermal")
    texts, picture = ["a kettle", "a cold hall"], [recordings / "t" / "0001.tiff"]
    assert torch.equal(trained.encode(text=texts), start.encode(text=texts)), "the published text tower"
    assert torch.allclose(names["pictures"][:1], trained.encode(infrared=picture), atol=1e-6)
    mine, halfway = (names["Model"].from_pretrained(f"exports/{name}") for name in ("mine", "halfway"))
    weights = [model.visual_projection.weight for model in (names["start"], mine, halfway)]
    torch.testing.assert_close(weights[2], (weights[0] + weights[1]) / 2)
    assert not torch.allclose(names["pictures"][:1], start.encode(infrared=picture), atol=1e-6)


@pytest.mark.parametrize("kind", ["audio", "video", "depth"])
def test_other_kinds_of_files_train_from_published_weights(kind, toys, tower, tmp_path):
    rows = ["datei;beschreibung;szene"]
    (tmp_path / "files").mkdir()
    for i in range(12):
        ending = {"audio": ("wav", "mp3", "flac")[i % 3], "video": "mp4", "depth": "png"}[kind]
        path = tmp_path / "files" / f"Aufnahme {i}.{ending}"
        if kind == "audio":
            soundfile.write(path, np.sin(np.arange(22050) * (0.05 + 0.01 * i)) / 3, 22050)
        elif kind == "video":
            film(path)
        else:
            Image.fromarray(np.full((30, 40), 900 + 300 * i, np.uint16)).save(path)
        rows.append(f"{path.name};ein Geräusch, Nummer {i};Straße {i % 2}")
    (tmp_path / "liste.csv").write_text("\n".join(rows), encoding="utf-8")
    shards, folder = tmp_path / "shards", toys / kind
    columns = ["--columns", "path=datei", "caption=beschreibung", "label=szene"]
    where = [f"--manifest={tmp_path / 'liste.csv'}", f"--root={tmp_path / 'files'}", f"--output={shards}"]
    make_shards(["csv", *where, f"--modality={kind}", *columns, "--samples-per-shard=6"])
    sizes = [*SIZES[:-1], "--num-mel-bins=28", "--target-length=98"] if kind == "audio" else SIZES
    train([f"--config={kind}", "--config=adapt", *sizes, "--patch-size=14", f"--text-tower={tower}", "--workers=1",
           f"--encoder-pretrained={folder}", f"--text-pretrained={folder}", f"--train-data={shards}", "--lr=0",
           "--batch-size=6", "--epochs=1", f"--logs={tmp_path}", "--name=a"])  # fmt: skip
    adapted, start = languagebind.load(tmp_path / "a"), languagebind.load(folder)
    given = {kind: [tmp_path / "files" / rows[1].partition(";")[0]], "text": ["zwei Hunde"]}
    a, b = adapted.encode(**given), start.encode(**given)  # a learning rate of 0 leaves the published model
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in given)


def test_the_text_tower_of_a_folder_is_that_of_transformers(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    side = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "hidden_act": "gelu"}  # fmt: skip
    text = side | {"vocab_size": 49408, "eos_token_id": 49407}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=side | {"image_size": 28, "patch_size": 14},
                                projection_dim=16)).eval()  # fmt: skip
    clip.save_pretrained(tmp_path / "clip")
    sizes = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": sizes}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    folder, encoder = str(tmp_path / "clip"), EncoderConfig(14, 32, 2, 2, 128)
    tower = TextConfig(f"local-dir:{tmp_path}", folder)
    init = InitConfig(encoder_pretrained=folder, init_temperature=0)
    model = build_model(ModelConfig(encoder, tower, init=init), (3, 1, 28, 28)).eval()
    ids, pictures = model.tokenize(["a cat", "two dogs in the snow"])["input_ids"], torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        theirs = clip(input_ids=ids, pixel_values=pictures)
        ours = model.encode_text({"input_ids": ids}), model.encode(pictures[:, :, None])
    torch.testing.assert_close(ours[0], theirs.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], theirs.image_embeds, atol=1e-5, rtol=0)
    assert model.logit_scale == clip.logit_scale
    (tmp_path / "nothing").mkdir()
    tower = TextConfig(f"local-dir:{tmp_path}", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"cannot read .*nothing/model.safetensors"):
        build_model(ModelConfig(encoder, tower), (3, 1, 28, 28))


@pytest.mark.parametrize("name", ["audio", "depth", "infrared", "video", "demo/depth"])
def test_the_recipe_for_few_samples_goes_on_top_of_every_other(name):
    plain, adapted = parse_args([f"--config={name}"]), parse_args([f"--config={name}", "--config=adapt"])
    assert adapted.inputs == plain.inputs
    assert adapted.model.text == plain.model.text
    values = yaml.safe_load(configs.find("adapt", "recipe").read_text())
    assert adapted.optim.epochs == values["optim"]["epochs"]
    assert (adapted.model.tuning.tuning, adapted.model.init.init_temperature) == ("lora", 0)
    assert adapted.model.encoder.patch_dropout == 0
