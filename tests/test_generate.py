"""The generation of VIDAL's layout: steps on real videos, the same bytes by every runner, kills, counts."""

import json
import os
import random
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
from clips import numbers, write
from generating import RUNNERS, end_step, kill_step, report
from PIL import Image

from languagebind.config import UserError
from languagebind.data.vidal import read_annotation
from languagebind.generate.__main__ import main
from languagebind.generate.annotation import merge
from languagebind.parallel import run_in_order

SIZES = {"a": 60, "b": 7, "c": 25, "d": 16, "e": 33, "silent": 20}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of clips, one of them damaged, and a table of titles."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count in SIZES.items():
        place = folder / "sub" / f"{name}.mp4" if name == "b" else folder / f"{name}.mp4"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(write(count=count, sound=name != "silent"))
    (folder / "damaged.mp4").write_bytes((folder / "a.mp4").read_bytes()[:900])
    rows = [f"{path.relative_to(folder)},a clip of {path.stem} #shorts" for path in sorted(folder.rglob("*.mp4"))]
    (folder / "titles.csv").write_text("path,title\n" + "\n".join(rows) + "\n")
    return folder


def annotated(videos, root) -> list[str]:
    """Make the annotation of the videos; return the flags of a step."""
    root.mkdir(exist_ok=True)
    flags = [f"--annotation={root / 'vidal.json'}", f"--root={root}"]
    main(["annotate", f"--videos={videos}", f"--titles={videos / 'titles.csv'}", *flags])
    return flags


def files(root) -> dict[str, bytes]:
    """All results below a root."""
    found = (path for path in root.glob("clips*/**/*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def whole(root) -> dict[str, bytes]:
    """The results without those that a killed process was writing."""
    return {name: data for name, data in files(root).items() if ".tmp" not in name}


def count(root) -> int:
    """The number of files below a root, while they come and go."""
    return sum(len(names) for *_, names in os.walk(root))


@pytest.fixture(scope="module")
def made(videos, tmp_path_factory):
    """The frames, clips and sounds of the videos, by one process."""
    root = tmp_path_factory.mktemp("made")
    flags = annotated(videos, root)
    for step in ("frames", "sound"):
        main([step, *flags, "--workers=0", "--max-bad-share=0.5"])
    return root


def test_frames_are_the_originals(made):
    for name, count in SIZES.items():
        key = "sub-b" if name == "b" else name
        folder = made / f"clips_resize256_skip15/{key}_resize256_folder"
        pictures = [np.array(Image.open(folder / f"{k}.jpg")) for k in range(8)]
        found = numbers(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
        assert found == [k * (count // 8) for k in range(8)]
        probe = ["ffprobe", "-v", "error", "-count_frames", "-show_entries", "stream=nb_read_frames,height,codec_name",
                 "-of", "json", str(made / f"clips_resize256_skip15/{key}.mp4")]  # fmt: skip
        streams = json.loads(subprocess.run(probe, capture_output=True, check=True).stdout)["streams"]
        assert (streams[0]["codec_name"], streams[0]["height"]) == ("h264", 64)
        assert int(streams[0]["nb_read_frames"]) == count
    assert report(made, "frames") | {"failures": 0} == {
        "entries": 7, "left out": 0, "there before": 0, "made": 6, "failed": 1, "failures": 0, "notes": {}
    }  # fmt: skip
    assert report(made, "frames")["failures"]["unreadable video"]["examples"][0]["id"] == "damaged"


def test_sounds_are_counted(made):
    found = report(made, "sound")
    counts = {note: each["count"] for note, each in found["notes"].items()}
    assert (found["made"], found["failed"], counts) == (6, 1, {"no sound track": 1, "silent": 5})
    assert len(list(made.glob("clips_audio/*.wav"))) == 5
    probe = ["ffprobe", "-v", "error", "-show_entries", "stream=sample_rate,codec_name", "-of", "json",
             str(made / "clips_audio/a.wav")]  # fmt: skip
    (stream,) = json.loads(subprocess.run(probe, capture_output=True, check=True).stdout)["streams"]
    assert (stream["codec_name"], stream["sample_rate"]) == ("pcm_s16le", "16000")


def test_the_annotation_keeps_its_entries_and_takes_new_ones(videos, tmp_path, capsys):
    flags = annotated(videos, tmp_path)
    before = dict(read_annotation(tmp_path / "vidal.json"))
    assert list(before) == ["a", "c", "d", "damaged", "e", "silent", "sub-b"]
    assert before["sub-b"]["raw"] == "a clip of b #shorts"
    assert (tmp_path / before["sub-b"]["source"]).resolve() == videos / "sub/b.mp4"
    capsys.readouterr()
    main(["annotate", f"--videos={videos}", *flags])
    assert capsys.readouterr().out == "7 entries, 0 of them new\n"
    assert dict(read_annotation(tmp_path / "vidal.json")) == before
    main(["annotate", f"--videos={videos / 'sub'}", *flags])
    assert capsys.readouterr().out == "7 entries, 0 of them new\n", "the video of sub-b would also be b"
    with pytest.raises(UserError, match=r"--videos .*nowhere is not a folder"):
        main(["annotate", f"--videos={tmp_path / 'nowhere'}", *flags])
    (tmp_path / "more.csv").write_text("path,title\nnowhere.mp4,gone\n")
    with pytest.raises(UserError, match=r"more.csv:2: there is no video .*nowhere.mp4"):
        main(["annotate", f"--videos={videos}", f"--titles={tmp_path / 'more.csv'}", *flags])
    assert dict(read_annotation(tmp_path / "vidal.json")) == before


@pytest.mark.parametrize("runner", ["processes", "ranks", pytest.param("ray", marks=pytest.mark.slow)])
def test_every_runner_makes_the_same_bytes_and_only_what_is_missing(runner, videos, made, tmp_path):
    batch = {"processes": 2, "ranks": 3, "ray": 1}[runner]
    words = ["frames", *annotated(videos, tmp_path), "--max-bad-share=0.5", f"--batch-size={batch}"]
    output = end_step(runner, *words)
    assert "frames: 7 entries, 0 left out, 0 there before, 6 made, 1 failed" in output
    expected = {name: data for name, data in files(made).items() if "_audio" not in name}
    assert files(tmp_path) == expected
    (tmp_path / "clips_resize256_skip15/a.mp4").unlink()
    kept = tmp_path / "clips_resize256_skip15/c.mp4"
    time_before = kept.stat().st_mtime_ns
    output = end_step(runner, *words)
    assert "frames: 7 entries, 0 left out, 5 there before, 1 made, 1 failed" in output
    assert files(tmp_path) == expected
    assert kept.stat().st_mtime_ns == time_before


def test_a_step_with_other_options_is_refused(made):
    flags = [f"--annotation={made / 'vidal.json'}", f"--root={made}", "--workers=0"]
    with pytest.raises(UserError, match="frames was made with frames original, not even: keep it, or remove"):
        main(["frames", *flags, "--frames=even"])


def test_journals_are_merged_in_the_order_of_the_annotation(tmp_path):
    path = tmp_path / "vidal.json"
    path.write_text(json.dumps({str(k): {"folder": "f", "raw": f"title {k}"} for k in range(6)}))

    def journal(name, ids, end="\n"):
        rows = [json.dumps({"id": str(k), "texts": {"mplug": f"{name} {k}"}}) for k in ids]
        (tmp_path / name).write_text("\n".join(rows) + end)
        return tmp_path / name

    merge(path, [journal("1.0.jsonl", [0, 2, 4]), journal("1.1.jsonl", [1, 3], end='\n{"id": "5", "te')])
    found = dict(read_annotation(path))
    assert [fields.get("mplug") for fields in found.values()] == [
        "1.0.jsonl 0", "1.1.jsonl 1", "1.0.jsonl 2", "1.1.jsonl 3", "1.0.jsonl 4", None
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.jsonl"))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"2\.0\.jsonl has texts for 1 that the annotation lacks or has in another"):
        merge(path, [journal("2.0.jsonl", [3, 1])])
    assert path.read_bytes() == before
    assert (tmp_path / "2.0.jsonl").exists()


def test_a_root_may_be_new_and_behind_a_link(videos, tmp_path):
    (tmp_path / "deep/down").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/down")
    root = tmp_path / "link/new"
    flags = [f"--annotation={root / 'vidal.json'}", f"--root={root}"]
    main(["annotate", f"--videos={videos / 'sub'}", *flags])
    main(["sound", *flags, "--workers=0"])
    assert (root / "clips_audio/b.wav").exists()
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / f"{'x' * 201}.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"xxx\.mp4 is longer than 200 bytes: rename the file"):
        main(["annotate", f"--videos={tmp_path / 'long'}", *flags])


def test_texts_of_a_killed_run_for_entries_that_are_gone_stop_the_next(videos, tmp_path):
    flags = annotated(videos, tmp_path)
    journal = tmp_path / "generate/sound/1.0.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text('{"id": "gone", "texts": {"mplug": "A ball."}}\n')
    with pytest.raises(UserError, match=r"has texts for gone .*: put the entry back, or delete the journal"):
        main(["sound", *flags, "--workers=0"])
    assert journal.exists()
    assert not (tmp_path / "clips_audio").exists(), "no work was done"


def kill_itself(task):
    os.kill(os.getpid(), 9)


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(UserError, match="a worker was killed or could not start"):
        list(run_in_order(partial(partial, kill_itself), range(5), workers=1))


def test_too_many_failures_stop_a_step(tmp_path):
    (tmp_path / "videos").mkdir()
    for number in range(120):
        (tmp_path / f"videos/{number:03d}.mp4").write_bytes(b"not a video")
    flags = [f"--annotation={tmp_path / 'vidal.json'}", f"--root={tmp_path}"]
    main(["annotate", f"--videos={tmp_path / 'videos'}", *flags])
    with pytest.raises(UserError, match=r"112 of 112 entries failed, more than --max-bad-share 10%: see"):
        main(["sound", *flags, "--workers=0"])
    found = report(tmp_path, "sound")
    assert (found["entries"], found["failed"], found["there before or not reached"]) == (120, 112, 8)


@pytest.mark.slow
@pytest.mark.parametrize("runner", RUNNERS)
def test_nothing_is_half_written_after_kills_at_random(runner, videos, made, tmp_path):
    words = ["frames", *annotated(videos, tmp_path), "--max-bad-share=0.5", "--batch-size=1"]
    expected, rng = {name: data for name, data in files(made).items() if "_audio" not in name}, random.Random(runner)
    running = 0
    for _ in range(10):
        until = count(tmp_path) + rng.randrange(1, 6)
        running += kill_step(runner, *words, when=lambda until=until: count(tmp_path) >= until)
        assert whole(tmp_path).items() <= expected.items()
    assert running >= 5, "the kills came while there was work left"
    end_step(runner, *words)
    assert whole(tmp_path) == expected
    found = report(tmp_path, "frames")
    assert (found["entries"], found["there before"] + found["made"], found["failed"]) == (7, 6, 1)
