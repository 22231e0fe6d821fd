"""The index of a folder and searching it, with real files, processes and small untrained encoders."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import clips
import faiss
import numpy as np
import pytest
import soundfile
from helpers import ROOT, depth_png, give_own_text_tower, start, wait_for
from PIL import Image

import languagebind
from languagebind import indexing
from languagebind.app import functions as do
from languagebind.config import UserError
from languagebind.index import Index, IndexOptions, main, make_index, modality_of
from languagebind.modalities import spans, video
from languagebind.modalities.audio import Audio
from languagebind.modalities.video import Video

ALL = ("audio", "depth", "image", "infrared", "video")


@pytest.fixture(scope="module")
def models(toys):
    return tuple(str(toys / name) for name in ("audio", "depth", "image", "thermal", "video"))


@pytest.fixture(scope="module")
def encoders(models):
    return languagebind.load(*models)


@pytest.fixture(scope="module")
def media(tmp_path_factory, files):
    """A folder with files of every modality, and its index's path."""
    folder = tmp_path_factory.mktemp("media")
    for name, paths in files.items():
        (folder / name).mkdir()
        for path in paths:
            shutil.copy(path, folder / name)
    (folder / "notes.txt").write_text("not media")
    (folder / "video" / "loud.mp4").write_bytes(clips.write(sound=True, count=75))
    (folder / "damaged.png").write_bytes(depth_png(1, np.random.default_rng(0))[:-30])
    return folder


@pytest.fixture(scope="module")
def index(media, models, encoders, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "media.index"
    report = make_index(IndexOptions(media, path, models, window=1))
    assert "video: 3 files, 5 windows" in report, report
    return Index(path, encoders)


@pytest.fixture
def depths(tmp_path):
    """Depth maps: a folder of 12."""
    folder, rng = tmp_path / "depths", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.png").write_bytes(depth_png(i % 4, rng))
    return folder


def rows(path, select):
    with closing(sqlite3.connect(Path(path) / "index.sqlite")) as db:
        return db.execute(select).fetchall()


def update(folder, models, **options):
    return make_index(IndexOptions(folder, folder.parent / "x.index", models, workers=2, **options))


def test_each_file_is_encoded_by_its_modality(index, media, encoders):
    found = {}
    for path, kind, failure in rows(index.path, "SELECT path, modality, failure FROM files"):
        found.setdefault(os.fsdecode(path), []).append((kind, failure))
    silent = [("video", None), ("audio", None)]
    assert found["video/0.mp4"] == found["video/1.mp4"] == found["video/loud.mp4"] == silent
    assert found["notes.txt"] == [(None, None)]
    assert found["thermal/thermal0.jpg"] == [("infrared", None)]
    assert found["depth/depth1.png"] == [("depth", None)]
    assert found["image/image0.jpg"] == [("image", None)]
    ((kind, failure),) = found["damaged.png"]
    assert kind == "depth"
    assert failure
    select = "SELECT features FROM windows JOIN files ON files.id = file WHERE modality = ? AND path = ?"
    for name, path in {"depth": "depth/depth1.png", "infrared": "thermal/thermal0.jpg"}.items():
        with closing(sqlite3.connect(index.path / "index.sqlite")) as db:
            ((feature,),) = db.execute(select, (name, path.encode())).fetchall()
        expected = encoders.encode(to="numpy", **{name: [media / path]})
        np.testing.assert_allclose(np.frombuffer(feature, np.float32), expected[0], atol=1e-5)


def test_scores_are_cosines(index, encoders):
    found = index.search("a bell", top=10**12)
    assert sorted(found) == index.modalities == list(ALL)
    for name, hits in found.items():
        select = f"SELECT features FROM windows JOIN files ON files.id = file WHERE modality = '{name}'"
        features = np.stack([np.frombuffer(row[0], np.float32) for row in rows(index.path, select)])
        text = encoders.encode(text=["a bell"], of=name, to="numpy")
        expected = sorted((features @ text.T).flatten(), reverse=True)
        np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-5)
        assert {hit.modality for hit in hits} == {name}


def test_a_file_finds_itself_and_both_are_weighted(index, media, encoders):
    path = str(media / "depth" / "depth1.png")
    hit = index.search(file=path, modalities=["depth"], top=1)["depth"][0]
    assert hit.path == path
    assert hit.score == pytest.approx(1, abs=1e-5)
    assert (hit.start, hit.end) == (None, None)
    both = index.search("a bell", path, weight=0.25, modalities=["image"])["image"]
    query = 0.25 * encoders.encode(text=["a bell"]) + 0.75 * encoders.encode(depth=[path])
    expected = encoders.similarity(query, encoders.encode(image=[hit.path for hit in both]))[0]
    np.testing.assert_allclose([hit.score for hit in both], expected, atol=1e-5)
    assert len(index.search(file=path)) == len(ALL)


@pytest.mark.parametrize("query", [{}, {"text": " "}, {"text": "x", "modalities": ["imu"]}, {"text": "x", "weight": 2},
                                   {"file": "x.txt"}, {"text": "x", "top": 0}])  # fmt: skip
def test_wrong_queries_are_refused(index, query):
    with pytest.raises(UserError):
        index.search(**query)


def test_a_sound_is_found_at_its_time(tmp_path, toys):
    folder, rng, rate = tmp_path / "sounds", np.random.default_rng(0), 16000
    folder.mkdir()
    times = np.arange(10 * rate) / rate
    parts = [np.sin(2 * np.pi * 440 * times), rng.normal(size=10 * rate), np.sin(2 * np.pi * 3000 * times[: 8 * rate])]
    soundfile.write(folder / "long.flac", np.concatenate(parts) / 8, rate)
    soundfile.write(tmp_path / "noise.wav", parts[1] / 8, rate)
    update(folder, (str(toys / "audio"),))
    hits = Index(tmp_path / "x.index").search(file=tmp_path / "noise.wav")["audio"]
    assert [(hit.start, hit.end) for hit in hits[:1]] == [(10, 20)]
    assert sorted((hit.start, hit.end) for hit in hits) == [(0, 10), (10, 20), (20, 28)]
    assert hits[0].score > 0.9999 > 0.99 > hits[1].score


@pytest.mark.parametrize("backend", ["auto", "pyav"])
@pytest.mark.parametrize("at_once", [1, 2**28])
def test_windows_of_a_video_show_the_frames_of_their_times(tmp_path, monkeypatch, backend, at_once):
    monkeypatch.setattr(video, "WINDOW_BYTES", at_once)
    path = tmp_path / "clip.mkv"
    path.write_bytes(clips.write("matroska", count=85))  # 25 frames a second
    found = [*Video(video_backend=backend).windows(path, 1)]
    assert [span for *span, _ in found] == [[0, 1], [1, 2], [2, pytest.approx(3.4)]]
    ends = [(0, 24), (25, 49), (50, 84)]
    expected = [np.linspace(*end, 8, dtype=int).tolist() for end in ends]
    assert [clips.numbers(raw) for *_, raw in found] == expected
    ((start, end, raw),) = Video(video_backend=backend).windows(path, 10)
    assert (start, end, clips.numbers(raw)) == (None, None, np.linspace(0, 84, 8, dtype=int).tolist())


def test_windows_of_a_video_with_varying_rate(tmp_path):
    """Frames 0 to 9 in the first second, 10 to 19 in the third; none in the second, which shows the next one."""
    path = tmp_path / "clip.mp4"
    times = [*range(0, 1000, 100), *range(2000, 3000, 100)]
    path.write_bytes(clips.write(count=20, times=times))
    found = [clips.numbers(raw) for *_, raw in Video().windows(path, 1)]
    assert found == [[0, 1, 2, 3, 5, 6, 7, 9], [10] * 8, [10, 11, 12, 13, 15, 16, 17, 19]]


def test_spans():
    assert spans(14.9, 10) == spans(3, 10) == spans(100, 0) == [(None, None)]
    assert spans(15, 10) == [(0, 10), (10, 15)]
    assert spans(24.9, 10) == [(0, 10), (10, 24.9)]
    waveform = np.zeros(16000 * 25, np.float32)
    cut = [*Audio().windows((waveform, 16000), 10)]
    assert [(*span, raw[0].shape[1]) for *span, raw in cut] == [(0, 10, 160000), (10, 20, 160000), (20, 25, 80000)]


@pytest.mark.parametrize(("path", "names", "expected"), [
    ("a.WAV", ALL, "audio"), ("a.mp4", ALL, "video"), ("a.mp4", ["audio", "image"], "audio"),
    ("a.mp4", ["image"], None), ("x/a_infrared.png", ALL, "infrared"),
    ("a.txt", ALL, None), ("a.jpg", ALL, "image"), ("a.jpg", ["infrared"], "infrared"), ("a.jpg", ["depth"], None),
    ("thermal/a.jpg", ALL, "infrared"), ("x_thermal_folder/0.jpg", ALL, "infrared"),
    ("depth/a.png", ALL, "depth"), ("depth/image.jpg", ALL, "image"), ("infrared/depth.png", ALL, "depth"),
    ("thermal/more/a.jpg", ALL, "infrared"), ("thermal/even/more/a.jpg", ALL, "image"), ("a.npy", ALL, "depth"),
    ("deep.png", ALL, "depth"), ("deep.png", ["image", "infrared"], "infrared"), ("grey.png", ALL, "image"),
    ("grey.png", ["depth", "infrared"], "infrared"), ("grey.png", ["depth"], "depth"), ("colour.png", ALL, "image"),
    ("a.tiff", ALL, "depth"), ("clip/0.jpg", ["video", "image"], "image"), ("clip/0.jpg", ["video"], None),
])  # fmt: skip
def test_which_modality_reads_a_file(tmp_path, monkeypatch, path, names, expected):
    monkeypatch.chdir(tmp_path)
    for name, dtype, shape in (
        ("deep", np.uint16, (4, 4)),
        ("grey", np.uint8, (4, 4)),
        ("colour", np.uint8, (4, 4, 3)),
    ):
        Image.fromarray(np.ones(shape, dtype)).save(f"{name}.png")
    assert modality_of(path, names) == expected


def test_changes_and_damage(depths, toys, encoders):
    model = (str(toys / "depth"),)
    (depths / "11.png").write_bytes(b"")
    report = update(depths, model)
    assert "12 files new or changed, 0 removed or changed" in report
    assert "depth: 11 files, 11 windows" in report
    assert "1 not indexed, such as 11.png: the file is empty" in report
    first = dict(rows(depths.parent / "x.index", "SELECT path, id FROM files"))
    opened = Index(depths.parent / "x.index")

    (depths / "11.png").write_bytes(depth_png(1, np.random.default_rng(1)))
    (depths / "00.png").write_bytes(depth_png(2, np.random.default_rng(2)))
    (depths / "01.png").unlink()
    (depths / "more").mkdir()
    shutil.copy(depths / "02.png", depths / "more" / "new\udce9.png")  # not UTF-8
    report = update(depths, ())
    assert "3 files new or changed, 3 removed or changed" in report
    assert "depth: 12 files, 12 windows" in report
    assert "not indexed" not in report
    second = dict(rows(depths.parent / "x.index", "SELECT path, id FROM files"))
    assert {path for path in first if second.get(path) == first[path]} == {
        f"{i:02d}.png".encode() for i in range(2, 11)
    }
    found = Index(depths.parent / "x.index").search(file=depths / "02.png", top=100)["depth"]
    assert {hit.path for hit in opened.search(file=depths / "02.png", top=2)["depth"]} == {
        hit.path for hit in found[:2]
    }
    assert {hit.path for hit in found[:2]} == {str(depths / "02.png"), str(depths / "more" / "new\udce9.png")}
    assert len(found) == 12

    (depths.parent / "x.index" / "depth.faiss").unlink()
    assert "0 files new or changed" in update(depths, ())
    again = Index(depths.parent / "x.index")
    assert again.search(file=depths / "02.png", top=100)["depth"] == found
    assert [do.shown_hit(again, hit)["file"] for hit in found if "new" in hit.path] == ["more/new\\udce9.png"]

    (depths.parent / "x.index" / "depth.faiss").write_bytes(b"IxM2")
    with pytest.raises(UserError, match=r"vectors of .* are missing or damaged: delete"):
        Index(depths.parent / "x.index")

    for path in depths.glob("*.png"):
        path.unlink()
    assert "depth: 1 files" in update(depths, ())
    shutil.rmtree(depths / "more")
    with pytest.raises(UserError, match="has no files"):
        update(depths, ())


@pytest.mark.parametrize("place", ["..", "."])
def test_without_changes_no_model_is_loaded(depths, toys, place):
    model, output = shutil.copytree(toys / "depth", depths.parent / "model"), depths / place / "x.index"
    assert "12 files new or changed" in make_index(IndexOptions(depths, output, (str(model),)))
    model.rename(depths.parent / "moved")
    assert "0 files new or changed" in make_index(IndexOptions(depths, output, (str(model),)))
    with pytest.raises(UserError):
        Index(output)


def test_other_models_and_options_are_refused(depths, toys):
    model, output = (str(toys / "depth"),), depths.parent / "x.index"
    with pytest.raises(UserError, match="name them with --model"):
        update(depths, ())
    update(depths, model)
    with pytest.raises(UserError, match="is the folder of the media"):
        make_index(IndexOptions(depths, depths / "x" / "..", model))
    with pytest.raises(UserError, match=r"was made with window 10.0, not 5"):
        update(depths, model, window=5)
    with pytest.raises(UserError, match=r"was made with limits \{\}, not \{'max_seconds': 5\}"):
        update(depths, model, max_seconds=5)
    with pytest.raises(UserError, match="was made with folder"):
        make_index(IndexOptions(depths.parent, output, model))
    with pytest.raises(UserError, match=r"was made with modalities \['depth'\], not \['image'\]"):
        update(depths, (str(toys / "image"),))
    other = languagebind.load(toys / "depth")
    next(other.model("depth").vision_model.parameters()).data[0] += 1
    with pytest.raises(UserError, match="was made with weights of depth"):
        Index(output, other)
    more = Index(output, languagebind.load(toys / "depth", toys / "image"))
    assert more.modalities == ["depth"]
    with pytest.raises(UserError, match="was made with modalities"):
        Index(output, languagebind.load(toys / "image"))


def test_limits_are_those_of_the_index(tmp_path, toys, files):
    folder = tmp_path / "media"
    folder.mkdir()
    shutil.copy(files["audio"][0], folder / "x.wav")
    shutil.copy(files["image"][0], folder / "x.jpg")
    models = tuple(str(toys / name) for name in ("audio", "image"))
    report = update(folder, models, max_seconds=1)
    assert re.search("1 not indexed, such as x.wav: .* exceed --max-seconds 1", report)
    assert Index(tmp_path / "x.index").encoders.encoders["audio"][1].max_seconds == 1


def test_a_folder_that_cannot_be_listed_is_named(depths, toys, monkeypatch):
    (depths / "lost+found").mkdir()
    shutil.copy(depths / "00.png", depths / "lost+found")
    assert "depth: 13 files, 13 windows" in update(depths, (str(toys / "depth"),))
    scandir = os.scandir

    def refuse(folder):  # root may list every folder, so that no mode of a file would do
        if Path(folder).name == "lost+found":
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    report = update(depths, (str(toys / "depth"),))
    assert "0 removed or changed" in report
    assert "depth: 13 files, 13 windows" in report  # what is there keeps its features
    assert f"1 folders cannot be listed, such as {depths / 'lost+found'}" in report


def test_a_pipe_is_not_waited_for_and_lost_facts_are_noticed(depths, toys):
    os.mkfifo(depths / "pipe.png")
    models = str(toys / "depth"), str(toys / "thermal")
    assert "1 not indexed, such as pipe.png: the path is not a file" in update(depths, models)
    (depths.parent / "x.index" / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json is missing: delete"):
        update(depths, models)


def test_two_processes_take_turns(depths, toys):
    output = depths.parent / "x.index"
    output.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, output / ".lock"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:  # fmt: skip
        other.stdout.readline()
        with pytest.raises(UserError, match="another process writes"):
            update(depths, (str(toys / "depth"),))
        other.communicate(b"\n")
    assert "12 files" in update(depths, (str(toys / "depth"),))


def test_a_killed_run_continues(depths, toys):
    data = [depth_png(i, np.random.default_rng(i)) for i in range(4)]
    for i in range(12, 600):
        (depths / f"{i}.png").write_bytes(data[i % 4])
    output, done = depths.parent / "x.index", "SELECT id, path FROM files WHERE done"
    process = start("tests/slow_index.py", str(depths), f"--output={output}", f"--model={toys / 'depth'}",
                    "--workers=1", "--device=cpu")  # fmt: skip
    wait_for(lambda: (output / "index.json").exists() and bool(rows(output, done)))
    process.kill()
    process.communicate()
    before = rows(output, done)
    assert 0 < len(before) < 600
    with pytest.raises(UserError, match="not a complete index"):
        Index(output)
    assert "0 files new or changed" in update(depths, ())
    assert set(before) <= set(rows(output, done))
    assert rows(output, "SELECT count(*), count(DISTINCT file) FROM windows") == [(600, 600)]
    found = Index(output).search(file=depths / "11.png", top=3000)["depth"]
    assert len({hit.path for hit in found}) == 600


def test_a_file_has_more_windows_than_a_batch(depths, toys):
    folder = depths.parent / "sounds"
    folder.mkdir()
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", np.random.default_rng(i).normal(size=8 * 16000) / 10, 16000)
    report = update(folder, (str(toys / "audio"),), window=1, batch_size=3)
    assert "audio: 3 files, 24 windows" in report
    found = Index(depths.parent / "x.index").search("noise", top=100)["audio"]
    expected = [(str(folder / f"{i}.wav"), k, k + 1) for i in range(3) for k in range(8)]
    assert sorted((hit.path, hit.start, hit.end) for hit in found) == expected


def test_text_towers_that_differ(tmp_path, toys, files):
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("image", "audio"):
        shutil.copy(files[name][0], folder)
    models = (str(toys / "image"), str(give_own_text_tower(toys / "audio", tmp_path / "audio")))
    update(folder, models)
    index = Index(tmp_path / "x.index")
    found = index.search("a bell")
    for name in ("image", "audio"):
        own = index.encoders.encode(text=["a bell"], of=name) @ index.encoders.encode(**{name: [files[name][0]]}).T
        assert found[name][0].score == pytest.approx(own.item(), abs=1e-5)
    assert [*index.search(file=files["image"][0])] == ["image"]
    with pytest.raises(UserError, match="image and audio have different text towers"):
        index.search(file=files["image"][0], modalities=["audio"])


@pytest.mark.parametrize("count", [1000, 20000])
def test_faiss_finds_what_numpy_finds(monkeypatch, count):
    """Many vectors are in lists, of which a part is searched: some hits are missed."""
    monkeypatch.setattr(indexing, "FLAT", 5000)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 32))
    x = (centres[rng.integers(200, size=count)] + rng.normal(size=(count, 32)) / 2).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    index, ids = indexing.new_vectors(count, 32), np.arange(count) * 3 + 7
    assert index.is_trained == (count < 5000)
    index.train(x)
    index.add_with_ids(x, ids)
    queries = x[::97] + rng.normal(size=x[::97].shape).astype(np.float32) / 20
    scores, found = index.search(queries, 10)
    expected = ids[np.argsort(-(queries @ x.T), axis=1)[:, :10]]
    share = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found.tolist(), expected.tolist(), strict=True)])
    assert share == 1 if count < 5000 else share > 0.9
    np.testing.assert_allclose(scores[:, 0], np.einsum("nd,nd->n", queries, x[(found[:, 0] - 7) // 3]), atol=1e-5)


def test_an_index_of_many_is_written_in_lists(depths, toys, monkeypatch):
    monkeypatch.setattr(indexing, "FLAT", 10)
    monkeypatch.setattr(indexing, "PAGE", 5)
    for i in range(12, 700):
        shutil.copy(depths / f"{i % 12:02d}.png", depths / f"{i}.png")
    update(depths, (str(toys / "depth"),))
    vectors = faiss.read_index(str(depths.parent / "x.index" / "depth.faiss"))
    assert (vectors.nlist, vectors.nprobe, vectors.ntotal) == (105, 6, 700)
    hit = Index(depths.parent / "x.index").search(file=depths / "05.png", top=1)["depth"][0]
    assert hit.score == pytest.approx(1, abs=1e-5)


def test_the_examples_of_the_search_page_run(tmp_path, toys, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").symlink_to(toys)
    Path("samples").mkdir()
    shutil.copy(files["image"][0], "samples/a.jpg")
    shutil.copy(files["depth"][0], "samples/a.depth.png")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "search.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(example, "docs/search.md", "exec"), names)
    assert [hit.path for hit in names["like"]["image"]] == [str(tmp_path / "samples" / "a.jpg")]


def test_the_command(index, media, capsys, models):
    main(["search", str(index.path), "a", "bell", "--modality", "video", "--modality", "image", "--top=2"])
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == ["video:", "image:"]
    path = str(media / "depth" / "depth0.png")
    main(["search", str(index.path), f"--file={path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("depth:") + 1] == f"  1.000  {path}"
    times = {line.partition("loud.mp4")[2] for line in lines[lines.index("video:") :] if "loud.mp4" in line}
    assert times == {"  0.0 to 1.0 s", "  1.0 to 2.0 s", "  2.0 to 3.0 s"}
    main([str(media), f"--output={index.path}", "--model", *models, "--window=1"])
    assert "0 files new or changed" in capsys.readouterr().out
    with pytest.raises(UserError, match="not a complete index"):
        main(["search", str(media), "x"])
