"""The page's server: every function through Gradio's client, files of every modality, and its sentences on errors."""

import base64
import io
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers import CAPTIONS, give_own_text_tower, write_shards
from PIL import Image

import languagebind
from languagebind import index as indexing
from languagebind.app import functions, page
from languagebind.data.feature_store import write_text_features

NAMES = ("audio", "depth", "image", "infrared", "video")
TEXTS = ["a ball near the camera", "<b>a bell</b> ringing fast", "a room"]
LINES = "\n".join(TEXTS)


def folder(toys, name):
    return toys / ("thermal" if name == "infrared" else name)


@pytest.fixture(scope="module")
def encoders(toys):
    return languagebind.load({name: folder(toys, name) for name in NAMES})


@pytest.fixture(scope="module")
def media(files, tmp_path_factory):
    """Files of each modality; those of depth as 16-bit PNG, .npy and TIFF."""
    place = tmp_path_factory.mktemp("media")
    metres = np.random.default_rng(0).uniform(1, 9, (60, 80)).astype(np.float32)
    np.save(place / "metres.npy", metres)
    Image.fromarray(metres).save(place / "metres.tiff")
    depth = [*files["depth"], str(place / "metres.npy"), str(place / "metres.tiff")]
    return {name: files["thermal" if name == "infrared" else name] for name in NAMES} | {"depth": depth}


@pytest.fixture(scope="module")
def index(encoders, toys, media, tmp_path_factory):
    """An index of one long sound, and of the pictures and clips."""
    import soundfile

    place = tmp_path_factory.mktemp("index")
    soundfile.write(place / "long.wav", np.random.default_rng(1).normal(size=5 * 16000) / 10, 16000)
    for name in ("depth", "infrared", "video"):
        (place / name).mkdir()
        for file in map(Path, media[name]):
            (place / name / file.name).write_bytes(file.read_bytes())
    models = [str(folder(toys, name)) for name in NAMES]
    indexing.main([str(place), "--model", *models, "--output", str(place / "media.index"), "--window", "2"])
    return indexing.Index(place / "media.index", encoders)


@pytest.fixture(scope="module")
def server(encoders, index):
    built = page.build(functions.Models(encoders), index=index)
    _, url, _ = built.launch(prevent_thread_lock=True, quiet=True, **page.STYLE)
    yield Client(url, verbose=False)
    built.close()


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_every_function_has_a_name_and_an_explanation(server):
    found = server.view_api(return_format="dict", print_info=False)
    names = {*(f"/similarity_{name}" for name in NAMES), "/matrix", "/search", "/segment"}
    assert found["named_endpoints"].keys() == names
    assert not found["unnamed_endpoints"]
    assert all(len(each["description"]) > 60 for each in found["named_endpoints"].values())
    words = [each["parameter_name"] for each in found["named_endpoints"]["/matrix"]["parameters"]]
    assert words == ["texts", *NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_similarity(server, encoders, media, name):
    for file in media[name]:
        found = server.predict(handle_file(file), LINES, api_name=f"/similarity_{name}")
        x, texts = encoders.encode(**{name: [file]}), encoders.encode(text=TEXTS, of=name)
        assert found["texts"] == TEXTS
        np.testing.assert_allclose(found["cosines"], (x @ texts.T)[0], atol=2e-6)
        logits = encoders.model(name).logit_scale.exp() * (x @ texts.T)[0]
        np.testing.assert_allclose(found["probabilities"], logits.softmax(0), atol=2e-6)
        assert picture(found["picture"]).size[0] > 50
        assert "not at hand" in found["note"]


def test_the_matrix_compares_files_of_all_modalities_and_texts(server, encoders, media):
    two = {name: media[name][:2] for name in ("audio", "depth", "video")}
    files = {name: [handle_file(file) for file in own] for name, own in two.items()}
    drawn, sheet, _ = server.predict(texts=LINES, **files, api_name="/matrix")
    table = pd.read_csv(sheet, index_col=0)
    x = torch.cat([*(encoders.encode(**{name: own}) for name, own in two.items()), encoders.encode(text=TEXTS)])
    np.testing.assert_allclose(table.to_numpy(), x @ x.T, atol=2e-6)
    assert [*table] == [*(f"{k}: {Path(file).name}" for k, own in two.items() for file in own)] + [
        f"text: {text}" for text in TEXTS
    ]
    assert Image.open(drawn["path"] if isinstance(drawn, dict) else drawn).size == (1000, 1000)


def test_the_matrix_has_no_cosines_between_different_text_towers(toys, media, tmp_path):
    other = give_own_text_tower(toys / "audio", tmp_path / "audio")
    encoders = languagebind.load({"audio": other, "depth": toys / "depth", "video": toys / "video"})
    files = [(name, media[name][0]) for name in ("audio", "depth", "video")]
    _, sheet, whole = functions.matrix(encoders, files, TEXTS)
    table = pd.read_csv(io.StringIO(sheet), index_col=0).to_numpy()
    assert not whole
    assert np.isnan(table[0, 1:3]).all()
    assert np.isnan(table).sum() == 4
    own = encoders.encode(audio=[files[0][1]]) @ encoders.encode(text=TEXTS, of="audio").T
    np.testing.assert_allclose(table[0, 3:], own[0], atol=2e-6)


def test_segmentation(server, encoders, media):
    file = media["depth"][0]
    found = server.predict(handle_file(file), "depth", LINES, api_name="/segment")
    classes = encoders.segment(TEXTS, depth=[file])[0].numpy()
    np.testing.assert_array_equal(np.array(picture(found["classes"])), classes)
    np.testing.assert_allclose(found["shares"], [(classes == k).mean() for k in range(3)], atol=1e-6)
    assert picture(found["picture"]).size == (80, 60)
    assert len(set(found["colours"])) == 3


def test_segmentation_has_a_limit(encoders, media, monkeypatch):
    monkeypatch.setattr(functions, "MOST_SCORES", 3 * 80 * 60 - 1)
    with pytest.raises(languagebind.config.UserError, match="3 texts are too many for 80 x 60 pixels"):
        functions.segment(encoders, "depth", media["depth"][0], TEXTS)


def test_arithmetic(server, encoders, media):
    file = media["image"][0]
    found = server.predict(handle_file(file), LINES, "at night", "by day", api_name="/similarity_image")
    plus, minus, *texts = encoders.encode(text=["at night", "by day", *TEXTS])
    total = encoders.encode(image=[file])[0] + plus - minus
    np.testing.assert_allclose(found["cosines"], torch.stack(texts) @ total / total.norm(), atol=2e-6)


def test_search_by_text_by_file_and_by_both(server, encoders, index, media):
    by_text = server.predict("a bell", None, api_name="/search")
    assert by_text.keys() == {"audio", "depth", "infrared", "video"}
    windows = [(hit["start"], hit["end"]) for hit in by_text["audio"]]
    assert sorted(windows) == [(0, 2), (2, 4), (4, 5)]
    file = media["video"][0]
    by_file = server.predict("", handle_file(file), "video", api_name="/search")
    assert by_file["video"][0]["file"] == f"video/{Path(file).name}"
    assert by_file["video"][0]["score"] == pytest.approx(1, abs=1e-5)
    both = server.predict("a bell", handle_file(file), page.GUESS, 0.25, 1, api_name="/search")
    wanted = index.search("a bell", file, "video", 0.25, top=1)
    assert {name: [hit["score"] for hit in own] for name, own in both.items()} == {
        name: [hit.score for hit in own] for name, own in wanted.items()
    }
    assert all(picture(hit["picture"]).size[0] > 10 for own in by_text.values() for hit in own)


@pytest.fixture
def damaged(tmp_path):
    (tmp_path / "a <b>.png").write_bytes(b"\x89PNG\r\n\x1a\n, but no picture")
    return handle_file(str(tmp_path / "a <b>.png"))


def test_errors_are_sentences(server, media, damaged):
    def told(name, *inputs, **more):
        with pytest.raises(AppError) as error:
            server.predict(*inputs, api_name=name, **more)
        assert "/tmp" not in str(error.value)
        assert "Traceback" not in str(error.value)
        return str(error.value)

    depth = handle_file(media["depth"][0])
    assert told("/similarity_depth", damaged, LINES).startswith("a b.png: not a picture")
    assert "not a picture" in told("/similarity_image", damaged, LINES)
    assert "write texts" in told("/segment", depth, "depth", " \n")
    assert "10000 characters" in told("/similarity_depth", depth, "a" * 10_001)
    assert server.predict(depth, " \n", api_name="/similarity_depth").keys() == {"picture", "meaning"}
    assert "at most 100" in told("/similarity_depth", depth, "a\n" * 101)
    assert "two things" in told("/matrix", "one text")
    assert "choose a file" in told("/segment", None, "depth", LINES)
    assert "not in the list" in told("/segment", depth, "audio", LINES)
    assert "no model reads" in told("/search", "", handle_file(__file__))
    assert "search for" in told("/search", None, None, top=None)


def test_an_exception_that_nobody_expects_is_logged(server, media, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("a secret")

    monkeypatch.setattr(functions, "rate", fail)
    with pytest.raises(AppError, match="the log says why"), caplog.at_level(logging.ERROR):
        server.predict(handle_file(media["depth"][0]), LINES, api_name="/similarity_depth")
    assert "a secret" in caplog.text
    assert "Traceback" in caplog.text


def test_texts_unlike_all_training_captions_are_pointed_out(encoders, tmp_path, monkeypatch):
    shards, run = write_shards(tmp_path / "world-1-96-0-depth" / "shards", [40]), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"modality: depth\ndata:\n  train_data: {shards}\n  caption_source: raw\n")
    write_text_features(
        str(shards / "00000.tar"), "raw", encoders.model("depth").text_fingerprint(), lambda x: encoders.encode(text=x)
    )
    monkeypatch.setattr(functions, "load", lambda *sources: encoders)
    models = functions.load_models([str(run), "LanguageBind/LanguageBind_Image"])
    assert models.captions.keys() == {*models.of_world} == {"depth"}
    assert models.captions["depth"].shape == (len(CAPTIONS), 16)
    x = encoders.encode(text=CAPTIONS[:1])[0]
    assert functions.rate(models, "depth", x, CAPTIONS)["note"] == ""
    assert "not at hand" in functions.rate(models, "image", x, CAPTIONS)["note"]

    known = torch.eye(16)[:8] + 0.2  # captions that are alike, and not along the last dimensions
    models = functions.Models(encoders, {"depth": torch.nn.functional.normalize(known, dim=-1)})
    alien = functions.note(models, "depth", torch.eye(16)[[0, 15]], ["known", "alien"])
    assert alien.startswith("1 of 2 texts resemble no caption")
    assert "alien" in alien
