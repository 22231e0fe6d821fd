"""mteb's LanguageBind wrappers, as mteb ships them, on our classes: only the model ids are local folders."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from languagebind import load

wrappers = pytest.importorskip(
    "mteb.models.model_implementations.language_bind_models",
    reason="mteb has an environment of its own: bash scripts/test_peers.sh",
)
TEXTS = ["a dog runs", "two cats sleep on a red sofa"]


class Rows(Dataset):
    """As much of a Hugging Face dataset as the wrappers look at. Items are made anew: mteb's collators change them."""

    def __init__(self, column, make, items):
        self.features, self.column, self.make, self.items = {column: None}, column, make, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {self.column: self.make(self.items[index])}


def loader(column, make, items):
    def collate(rows):
        return {key: [row[key] for row in rows] for key in rows[0]}

    return DataLoader(Rows(column, make, items), batch_size=2, collate_fn=collate)


@pytest.fixture(scope="module")
def inputs(files):
    from torchcodec.decoders import VideoDecoder

    def sound(path):
        array, rate = soundfile.read(path, dtype="float32")
        return {"array": array, "sampling_rate": rate}

    return {
        "text": loader("text", str, TEXTS),
        "image": loader("image", Image.open, files["image"]),
        "audio": loader("audio", sound, files["audio"]),
        "video": loader("video", VideoDecoder, files["video"]),
    }


def same(found, expected):
    """bfloat16 there, float32 here."""
    found = torch.from_numpy(np.asarray(found))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected.cpu(), atol=3e-2, rtol=0)
    assert torch.nn.functional.cosine_similarity(found, expected.cpu()).min() > 0.999


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("LanguageBindVideoWrapper", "video"),
        ("LanguageBindAudioWrapper", "audio"),
        ("LanguageBindImageWrapper", "image"),
    ],
)
def test_wrappers(toys, files, inputs, kind, name):
    model, own = getattr(wrappers, kind)(str(toys / name), device="cpu"), load(toys / name)
    options = {"task_metadata": SimpleNamespace(modalities=[name, "text"]), "hf_split": "test", "hf_subset": "default"}
    same(model.encode(inputs["text"], **options), own.encode(text=TEXTS))
    found = model.encode(inputs[name], **options)
    if name == "video":  # mteb rounds the places of the frames, the original cuts them off
        assert found.shape == (2, 16)
    else:
        same(found, own.encode(**{name: files[name]}))


def test_the_omni_wrapper(toys, inputs, monkeypatch):
    for meta, name in (
        (wrappers.language_bind_video_ft, "video"),
        (wrappers.language_bind_audio_ft, "audio"),
        (wrappers.language_bind_image, "image"),
    ):
        monkeypatch.setitem(meta.__dict__, "name", str(toys / name))
    model = wrappers.LanguageBindOmniWrapper(device="cpu")
    for name in ("video", "audio", "image", "text"):
        options = {"task_metadata": SimpleNamespace(modalities=[name]), "hf_split": "test", "hf_subset": "default"}
        features = model.encode(inputs[name], **options)
        assert features.shape == (2, 16)
        assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-2)


@pytest.fixture
def scenes(tmp_path):
    """Depth maps of two classes, 16-bit millimetres, beyond what 8 bits hold."""
    rng = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "scenes" / ("far_away", "near")[i % 3 == 0] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        depth = rng.integers(300, 9000, (60, 80)).astype(np.uint16)
        Image.fromarray(depth).save(path)
    (tmp_path / "scenes.yaml").write_text(
        "task: classification\nmodality: depth\ndata: scenes\nsplit: val\ntemplates: a depth photo of a {c}.\n"
    )
    return tmp_path / "scenes.yaml"


def test_depth_is_a_task_with_our_figures(toys, scenes):
    import mteb

    from languagebind.eval import load_dataset_config
    from languagebind.eval.evaluate import evaluate
    from languagebind.eval.mteb_tasks import MtebEncoder, mteb_task

    task = mteb_task(scenes, template="a depth photo of a {c}.")
    assert task.metadata.name == "ScenesZeroShot"
    encoders = load(toys / "depth")
    own = evaluate(*encoders.encoders["depth"], load_dataset_config(scenes), workers=0)
    result = mteb.evaluate(MtebEncoder(encoders), task, cache=None, co2_tracker=False)
    (scores,) = result.task_results[0].scores["val"]
    assert scores["accuracy"] == pytest.approx(own["metrics"]["top1"])
    # The maps themselves reach the encoder, not eight bits of them.
    files = sorted((scenes.parent / "scenes").rglob("*.png"))
    task.load_data()  # mteb unloads it
    batches = [{"image": [task.dataset["val"][i]["image"] for i in range(len(files))]}]
    found = MtebEncoder(encoders).encode(batches)
    np.testing.assert_allclose(found, encoders.encode(depth=files, to="numpy"), atol=1e-5)


def test_mistakes_in_a_task(toys, scenes):
    from languagebind.config import UserError
    from languagebind.eval.mteb_tasks import MtebEncoder, mteb_task

    with pytest.raises(UserError, match=r"\{c\} in the template 'a room'"):
        mteb_task(scenes, template="a room")
    scenes.write_text("task: retrieval\nmodality: depth\ndata: scenes\n")
    with pytest.raises(UserError, match="needs a classification"):
        mteb_task(scenes)
    with pytest.raises(ValueError, match="too many values to unpack"):
        MtebEncoder(load(toys / "depth", toys / "audio"))
