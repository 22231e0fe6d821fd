"""Depth and infrared made from frames: values, refusals, the same bytes whatever the batches, records, packing."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from importlib.metadata import version

import cv2
import depth_models
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForDepthEstimation, pipeline

from languagebind.config import UserError
from languagebind.data.making import main as make_shards
from languagebind.generate.__main__ import main
from languagebind.generate.depth import Depth, DepthOptions
from languagebind.generate.infrared import Infrared, InfraredOptions
from languagebind.generate.steps import Entry, Unmade
from languagebind.modalities.depth import Depth as DepthModality

SIZES = {"wide": (96, 64), "tall": (64, 112), "small": (80, 48)}  # width and height


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny depth models, by their kind."""
    root = tmp_path_factory.mktemp("models")
    for name, write in depth_models.MODELS.items():
        (root / name).mkdir()
        write(root / name)
    return root


class Net(nn.Module):
    """A quarter of the size; one channel from -1 to 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 4, stride=4)

    def forward(self, x):
        return torch.tanh(8 * self.down(torch.relu(self.conv(x))))


def exported(path, fixed=False):
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(Net(), (torch.rand(2, 3, 32, 48),), dynamic_shapes=None if fixed else [free])
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("net") / "net.pt2")


@pytest.fixture
def root(tmp_path):
    """Frames in VIDAL's layout, and their annotation."""
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        folder = tmp_path / f"clips_resize256_skip15/{name}_resize256_folder"
        folder.mkdir(parents=True)
        for k in range(8):
            picture = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
            picture.resize(size, Image.Resampling.BICUBIC).save(folder / f"{k}.jpg", quality=95)
    entries = {name: {"folder": "clips", "raw": f"a {name} clip"} for name in SIZES}
    (tmp_path / "vidal.json").write_text(json.dumps(entries))
    return tmp_path


def flags(root, *more):
    return [f"--annotation={root / 'vidal.json'}", f"--root={root}", "--workers=0", *map(str, more)]


def pictures(root, name):
    """The eight frames of an entry, as Pillow reads them."""
    return [Image.open(root / f"clips_resize256_skip15/{name}_resize256_folder/{k}.jpg") for k in range(8)]


def results(root, kind):
    """The contents of all results."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob(f"clips/*_{kind}_folder/*")}


def remove(root):
    """Remove the results and the records of both steps."""
    for folder in (root / "generate", root / "clips"):
        shutil.rmtree(folder, ignore_errors=True)


def read(root, name, kind, suffix):
    return [np.asarray(Image.open(root / f"clips/{name}_{kind}_folder/{k}.{suffix}")) for k in range(8)]


def told(root, step, what="failures"):
    """The only reason of failures, or note, in a step's report, its number, and its first example."""
    ((reason, found),) = json.loads((root / "generate" / step / "report.json").read_bytes())[what].items()
    return reason, found["count"], found["examples"][0]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_clips_of_odd_sizes_get_even_ones(tmp_path):
    for name, size in {"odd": "63x101", "wide": "500x270"}.items():
        source = [
            "ffmpeg",
            "-v",
            "error",
            "-f",
            "lavfi",
            "-i",
            f"testsrc=size={size}:duration=1",
            tmp_path / f"{name}.mp4",
        ]
        subprocess.run(source, check=True)
    main(["annotate", f"--videos={tmp_path}", *flags(tmp_path)[:2]])
    main(["frames", *flags(tmp_path)])
    for name, (clip, frame) in {"odd": ((64, 102), (63, 101)), "wide": ((474, 256), (474, 256))}.items():
        video = cv2.VideoCapture(str(tmp_path / f"clips_resize256_skip15/{name}.mp4"))
        assert (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)) == clip
        assert pictures(tmp_path, name)[0].size == frame


@pytest.mark.parametrize("kind", depth_models.MODELS)
def test_depth_is_that_of_transformers_pipeline(kind, models, root):
    main(["depth", *flags(root, f"--model={models / kind}", "--size=picture")])
    estimate = pipeline("depth-estimation", model=str(models / kind), device="cpu")
    for name, (width, height) in SIZES.items():
        for found, picture in zip(read(root, name, "depth_f8glpn", "png"), pictures(root, name), strict=True):
            metres = estimate(picture)["predicted_depth"].numpy()
            assert found.dtype == np.uint16
            assert found.shape == (height, width)
            assert np.ptp(metres) > 0.001
            wanted = np.where(metres > 0, metres, 0) * 1000
            assert np.abs(found - wanted).max() <= 0.5 + 0.1  # rounded; the pipeline has batches of one


@pytest.mark.parametrize("kind", ["glpn", "depth_anything"])
def test_depth_has_the_size_and_limit_of_the_originals(kind, models, root):
    main(["depth", *flags(root, f"--model={models / kind}")])
    model = AutoModelForDepthEstimation.from_pretrained(models / kind)
    processor = AutoImageProcessor.from_pretrained(models / kind)
    for name, size in {"wide": (384, 256), "tall": (256, 448), "small": (426, 256)}.items():
        for found, picture in zip(read(root, name, "depth_f8glpn", "png"), pictures(root, name), strict=True):
            with torch.no_grad():
                raw = model(**processor(picture, return_tensors="pt")).predicted_depth[0].numpy()
            wanted = cv2.resize(raw, size, interpolation=cv2.INTER_CUBIC).clip(0, 10) * 1000
            assert np.abs(found - wanted).max() <= 0.5 + 0.1
    if kind == "depth_anything":
        assert found.max() == 10_000


def test_unknown_depth_is_0_and_far_depth_is_clipped(models, root):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 0.0004, 1.2346, 9.9, 12.0, 65.6, 1e6])
    frames = torch.zeros(8, 3, 64, 96, dtype=torch.uint8)
    for size, far in (("original", [10_000] * 3), ("picture", [12_000, 65_535, 65_535])):
        step = Depth(root, DepthOptions(str(models / "glpn"), size=size))
        step.estimate = lambda frames, size: values.expand(8, 1, -1)
        found, _ = step.pictures(Entry("wide", {}), frames)
        assert found[0, 0].tolist() == [[0, 0, 0, 0, 0, 0, 1235, 9900, *far]]
    step.estimate = lambda frames, size: torch.tensor([1.0] * 7 + [torch.nan]).view(8, 1, 1).expand(8, 1, 4)
    with pytest.raises(Unmade, match="no depth"):
        step.pictures(Entry("wide", {}), frames)


def test_models_without_metres_are_refused_before_any_work(root, tmp_path):
    depth_models.config_only(tmp_path / "relative", model_type="depth_anything", depth_estimation_type="relative")
    depth_models.config_only(tmp_path / "dpt", model_type="dpt")
    (tmp_path / "empty").mkdir()
    metres = (
        r"\) is not known to give metres: relative depth has no unit; use a metric depth_anything, glpn, zoedepth, "
    )
    for name, reason in {
        "relative": r"relative \(depth_anything" + metres,
        "dpt": r"dpt \(dpt" + metres,
        "empty": "empty has no config.json: name a model of transformers",
        "nowhere": "there is no folder .*nowhere",
    }.items():
        with pytest.raises(UserError, match=reason):
            main(["depth", *flags(root, f"--model={tmp_path / name}")])
    assert not (root / "generate").exists()


def test_weights_that_are_not_in_the_files_are_never_random(models, root, tmp_path):
    (tmp_path / "model").mkdir()
    depth_models.glpn(tmp_path / "model")
    state = load_file(tmp_path / "model/model.safetensors")
    del state["head.head.2.weight"]
    save_file(state, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model lacks 1 of the model's weights, such as head\.head\.2\.weight"):
        main(["depth", *flags(root, f"--model={tmp_path / 'model'}")])
    assert not results(root, "depth_f8glpn")


def test_frames_that_are_missing_or_damaged_are_counted(models, root):
    folder = root / "clips_resize256_skip15/wide_resize256_folder"

    def reason():
        main(["depth", *flags(root, f"--model={models / 'glpn'}")])
        reason, number, example = told(root, "depth")
        assert (number, example["id"]) == (1, "wide")
        return f"{reason}: {example['detail']}"

    whole = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(whole[:-400])
    assert f"unreadable frames: wide: {folder / '3.jpg'}: image file is truncated" in reason()
    Image.new("RGB", (64, 64)).save(folder / "3.jpg")
    assert "unreadable frames: wide: " in reason()
    assert "the frames differ in size" in reason()
    shutil.rmtree(folder)
    assert reason() == f"no frames: {folder} does not exist: run generate frames first"
    assert len(results(root, "depth_f8glpn")) == 16


@pytest.mark.parametrize("step", ["depth", "infrared"])
def test_batches_and_threads_do_not_change_the_bytes(step, models, net, root):
    model, kind = {"depth": (models / "glpn", "depth_f8glpn"), "infrared": (net, "thermal")}[step]
    found = []
    for size in (16, 2, 1):
        main([step, *flags(root, f"--model={model}", f"--batch-size={size}")])
        found.append(results(root, kind))
        remove(root)
    assert len(found[0]) == 24
    assert found[0] == found[1] == found[2]


def test_records_name_the_weights_and_their_licence(models, net, root, tmp_path):
    main(["depth", *flags(root, f"--model={models / 'glpn'}")])
    weights = models / "glpn/model.safetensors"
    assert json.loads((root / "generate/depth/record.json").read_bytes()) == {
        "model": str(models / "glpn"), "revision": None, "licence": "apache-2.0", "size": "original", "half": True,
        "weights_sha256": {"model.safetensors": sha256(weights)},
        "torch": torch.__version__, "transformers": version("transformers"),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"depth was made with model \S*glpn, not \S*depth_anything: keep it"):
        main(["depth", *flags(root, f"--model={models / 'depth_anything'}")])
    main(["infrared", *flags(root, f"--model={net}", "--size=48")])
    assert json.loads((root / "generate/infrared/record.json").read_bytes()) == {
        "model": str(net), "size": 48, "multiple": 16, "weights_sha256": sha256(net), "torch": torch.__version__
    }  # fmt: skip
    with pytest.raises(UserError, match="infrared was made with size 48, not None: keep it"):
        main(["infrared", *flags(root, f"--model={net}")])


def test_a_model_of_the_hub_is_recorded_with_its_commit(root, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / f"hub/models--someone--tiny/snapshots/{commit}"
    folder.mkdir(parents=True)
    depth_models.glpn(folder)
    (tmp_path / "hub/models--someone--tiny/refs").mkdir()
    (tmp_path / "hub/models--someone--tiny/refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    record = Depth(root, DepthOptions("someone/tiny")).record()
    assert (record["model"], record["revision"], record["licence"]) == ("someone/tiny", commit, "apache-2.0")
    with pytest.raises(UserError, match="there is no folder someone/other, and it is not in the cache"):
        Depth(root, DepthOptions("someone/other"))


def test_infrared_is_the_output_of_the_model(net, root):
    main(["infrared", *flags(root, f"--model={net}")])
    for name, (width, height) in SIZES.items():
        x = np.stack([np.asarray(picture) for picture in pictures(root, name)]) / 255
        with torch.no_grad():
            made = Net()(torch.from_numpy(x).permute(0, 3, 1, 2).float())[:, 0].numpy()
        made = (made - made.min()) / (made.max() - made.min())  # of the clip
        for found, frame in zip(read(root, name, "thermal", "jpg"), made, strict=True):
            small = Image.fromarray((frame * 255).round().astype(np.uint8))
            wanted = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), float)
            assert np.abs(found - wanted).max() < 12  # JPEG
            assert np.abs(found - wanted).mean() < 2


def test_infrared_keeps_the_aspect_at_another_size(root):
    sizes = []

    class Seen(nn.Module):
        def forward(self, x):
            sizes.append(tuple(x.shape))
            return x[:, [2, 0, 1]]

    step = Infrared(root, InfraredOptions("", size=96, multiple=32))
    step.__dict__["_loaded"] = Seen(), torch.device("cpu")
    for name, entry in json.loads((root / "vidal.json").read_text()).items():
        (made,) = step([Entry(name, entry)])
        ((folder, contents),) = made.files.items()
        assert folder == root / f"clips/{name}_thermal_folder"
        for k, picture in enumerate(pictures(root, name)):
            found = Image.open(io.BytesIO(contents[f"{k}.jpg"]))
            assert (found.mode, found.size) == ("RGB", SIZES[name])
            assert np.abs(np.asarray(found)[..., 1].astype(int) - np.asarray(picture)[..., 0]).mean() < 12
    assert sizes == [(8, 3, 96, 128), (8, 3, 160, 96), (8, 3, 96, 160)]


NETS = """
import torch

class Map(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function

def grey(x):
    return 0.2 + 0.5 * (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)

Grey = lambda: Map(grey)
Inverted = lambda: Map(lambda x: 1 - grey(x).expand(-1, 3, -1, -1))
Other = lambda: Map(lambda x: (x[:, :1] - x[:, 2:]).abs())
Noise = lambda: Map(torch.rand_like)
Flat = lambda: Map(lambda x: x * 0 + 0.5)
Broken = lambda: Map(lambda x: (x > 0.5).float().log())
Small = lambda: Map(lambda x: x[:, 0])
plain = lambda: grey
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets_of_a_test.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    return "nets_of_a_test"


def test_results_that_are_grey_are_noted_with_examples(nets, root, capsys):
    for name, note in (("Grey", "just the grey of the frames"), ("Inverted", "just the inverted grey of the frames")):
        main(["infrared", *flags(root, f"--model={nets}:{name}")])
        assert told(root, "infrared", "notes") == (note, 3, {"id": "wide"})
        assert f"  {note}: 3, such as wide" in capsys.readouterr().out
        remove(root)
    main(["infrared", *flags(root, f"--model={nets}:Other")])
    assert "grey" not in capsys.readouterr().out


def test_random_models_give_each_clip_its_own_numbers(nets, root):
    more = f"--model={nets}:Noise"
    main(["infrared", *flags(root, more, "--batch-size=1")])
    expected = results(root, "thermal")
    assert len(set(expected.values())) == 24
    shutil.rmtree(root / "clips/tall_thermal_folder")
    main(["infrared", *flags(root, more)])
    assert results(root, "thermal") == expected


def test_infrared_models_that_do_not_fit(nets, root, tmp_path):
    fixed = exported(tmp_path / "fixed.pt2", fixed=True)
    (tmp_path / "text.pt2").write_text("no archive")
    module = "should be a .pt2 file, or a MODULE:FUNCTION that returns a torch module"
    for model, reason in {
        fixed: r"fixed.pt2 fails for pictures \(8, 3, 64, 96\): Guard failed.*export it with dynamic batch",
        tmp_path / "text.pt2": "cannot read .*text.pt2 as a file of torch.export",
        tmp_path / "none.pt2": "cannot read .*none.pt2 as a file of torch.export: .*No such file",
        f"{nets}:Small": r"Small turns \(8, 3, 64, 96\) into \(8, 64, 96\); it should turn pictures",
        f"{nets}:missing": f"missing {module}",
        f"{nets}:plain": f"plain {module}",
        "net.onnx": f"net.onnx {module}",
        "nowhere.net:Net": "nowhere.net cannot be imported",
        "srgb-tir:weights.pt": "srgb-tir:weights.pt: No module named 'networks'; put the clone on PYTHONPATH",
    }.items():
        with pytest.raises(UserError, match=reason):
            main(["infrared", *flags(root, f"--model={model}")])
        assert not results(root, "thermal")
        remove(root)
    for name in ("Flat", "Broken"):
        with pytest.raises(UserError, match="all entries failed, for the reasons above"):
            main(["infrared", *flags(root, f"--model={nets}:{name}")])
        assert told(root, "infrared")[:2] == ("no picture", 3)  # Broken, too: what failed does not bind the next run


CLONES = {
    "networks.py": """
from torch import nn

class AdaINGen(nn.Module):  # encode and decode are those of MUNIT's generator
    def __init__(self, channels, sizes):
        super().__init__()
        self.content, self.picture = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.style = nn.Linear(sizes["style_dim"], 4)

    def encode(self, x):
        return self.content(x), None

    def decode(self, content, style):
        return self.picture(content * self.style(style[:, :, 0, 0])[:, :, None, None])
""",
    "configs/tir2rgb_folder.yaml": "gen: {style_dim: 8}\ninput_dim_a: 3\ninput_dim_b: 3\n",
    "thermalgen_demo.py": """
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

class ThermalGenSIT(nn.Module, PyTorchModelHubMixin):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.classes = scale, nn.Embedding(1001, 1)

    def forward(self, x, classes):
        return self.scale * x[:, :1] * self.classes(classes)[:, :, None, None]
""",
}


def test_adapters_call_the_users_clones(root, tmp_path, monkeypatch):
    """With the interfaces of the clones: the code of sRGB-TIR and ThermalGen is not ours to copy."""
    for name, text in CLONES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import networks
    import thermalgen_demo

    generators = [networks.AdaINGen(3, {"style_dim": 8}) for _ in "ab"]
    torch.save({key: net.state_dict() for key, net in zip("ab", generators, strict=True)}, tmp_path / "weights.pt")
    thermalgen_demo.ThermalGenSIT(scale=0.5).save_pretrained(tmp_path / "thermalgen")
    frames = torch.randint(256, (8, 3, 64, 96), dtype=torch.uint8)
    values = frames / 127.5 - 1

    def made(model):
        return Infrared(root, InfraredOptions(model)).translate(frames, seed=1)

    torch.manual_seed(1)
    style = torch.randn(1, 8, 1, 1).repeat(8, 1, 1, 1)
    with torch.no_grad():
        wanted = generators[0].decode(generators[1].encode(values)[0], style)
    torch.testing.assert_close(made(f"srgb-tir:{tmp_path / 'weights.pt'}"), wanted, rtol=1e-4, atol=1e-5)
    weight = load_file(tmp_path / "thermalgen/model.safetensors")["classes.weight"][1000]
    wanted = (0.5 * values[:, :1] * weight).clamp(-1, 1)
    torch.testing.assert_close(made(f"thermalgen:{tmp_path / 'thermalgen'}"), wanted, rtol=1e-4, atol=1e-5)


def test_results_are_packed_and_read_in_metres(models, net, root, tmp_path):
    main(["depth", *flags(root, f"--model={models / 'glpn'}")])
    main(["infrared", *flags(root, f"--model={net}")])
    make_shards(["vidal", f"--annotation={root / 'vidal.json'}", f"--root={root}", "--modality", "depth", "infrared",
                 f"--output={tmp_path / 'shards'}"])  # fmt: skip
    (shard,) = (tmp_path / "shards").glob("*.tar")
    with tarfile.open(shard) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    for name in SIZES:
        for k, millimetres in enumerate(read(root, name, "depth_f8glpn", "png")):
            metres = DepthModality().decode(members[f"{name}.{k}.depth.png"])
            np.testing.assert_allclose(metres.numpy(), millimetres / 1000, rtol=1e-6)
            assert 1 < metres.median() < 9
            assert (
                members[f"{name}.{k}.infrared.jpg"] == results(root, "thermal")[f"clips/{name}_thermal_folder/{k}.jpg"]
            )
