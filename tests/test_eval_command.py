"""The command line of evaluation: names, options in place of the configs', failures, and what is never overwritten."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import Colours, classification, colours_of, flags
from eval_files import save
from helpers import call
from PIL import Image as Picture

from languagebind.config import UserError
from languagebind.eval.__main__ import main
from languagebind.eval.evaluate import evaluate
from languagebind.eval.models import load_eval_model
from languagebind.modalities.depth import Depth
from languagebind.modalities.image import Image
from languagebind.modalities.video import Video

COLOURS = "colours:Colours"
HERE = __name__


class Far(Colours):
    """Reads depth."""

    modality = Depth(image_size=8)


class Films:
    """Reads videos of as many frames as it is asked for."""

    modality = Video(image_size=16, num_frames=8, video_backend="pyav")
    fingerprint = "films"

    def encode_text(self, texts):
        return colours_of(texts)

    def encode(self, batch):
        assert batch.shape[2] in (2, 8)
        return batch.mean(dim=(2, 3, 4))


def read(folder, name):
    return json.loads((folder / name).read_text())


def config(world, name="here"):
    return str(world / "configs" / f"{name}.yaml")


def test_models_may_be_named(world, tmp_path):
    argv = flags(world, tmp_path, "--config", config(world), "--model")
    main([*argv, f"one={COLOURS}", f"two={COLOURS}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here_one.json", "here_two.json"]
    assert read(tmp_path, "here_two.json")["pretrained"] == "two"
    with pytest.raises(UserError, match=r"two results would be .*here_one.json: .*--model NAME=\.\.\."):
        main([*argv, f"one={COLOURS}", "one=other"])
    with pytest.raises(UserError, match=r"two results would be .*here_colours-Colours.json"):
        main([*argv, COLOURS, "--model", COLOURS])  # of a flag that is there twice, both count


def test_the_samples_are_listed_once(world, tmp_path, caplog):
    """A warning of the listing, which comes before the model is loaded, is not repeated by the evaluation."""
    (tmp_path / "here.yaml").write_text("task: classification\ndata: folders\nexpect: {samples: 7}\n")
    main(flags(world, tmp_path, "--config", str(tmp_path / "here.yaml"), "--model", COLOURS))
    assert caplog.text.count("samples, but the dataset has 7") == 1


def test_prompts_of_the_command_line(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("a {c}\nsome {c}\n")
    argv = flags(world, tmp_path / "out", "--config", config(world), config(world, "texts"), "--model", COLOURS)
    main([*argv, "--templates", str(tmp_path / "prompts.txt")])
    found = read(tmp_path / "out", "here_colours-Colours.json")
    assert found["protocol"]["templates"] == ["a {c}", "some {c}"]
    assert "templates" not in read(tmp_path / "out", "texts_colours-Colours.json")["protocol"]
    for value, message in ((str(tmp_path / "none.txt"), "templates: no such file"), ("", "templates")):
        with pytest.raises(UserError, match=message):
            main([*argv, "--overwrite", "--templates", value])


@pytest.fixture
def films(tmp_path):
    """Two red and two blue videos, and a config of them."""
    import av

    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        for k in range(2):
            (tmp_path / "films" / name).mkdir(parents=True, exist_ok=True)
            with av.open(str(tmp_path / "films" / name / f"{k}.mp4"), "w") as container:
                stream = container.add_stream("libx264", rate=10)
                stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
                for _ in range(12):
                    frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), colour, np.uint8))
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
    (tmp_path / "films.yaml").write_text("task: classification\nmodality: video\ndata: films\n")
    return tmp_path / "films.yaml"


def test_frames_clips_and_crops_of_the_command_line(films, world, tmp_path):
    argv = ["--config", str(films), "--model", f"{HERE}:Films", "--output", str(tmp_path / "out"), "--workers", "0"]
    main([*argv, "--num-frames", "2", "--clips", "3", "--crops", "2"])
    found = read(tmp_path / "out", f"films_{HERE}-Films.json")
    protocol = found["protocol"]
    assert [protocol[key] for key in ("frames", "clips", "crops", "views")] == [2, 3, 2, 6]
    assert found["metrics"]["top1"] == 1
    main([*argv, "--overwrite", "--num-frames", "2", "--clips", "3", "--crops", "2",
          "--export-features", str(tmp_path / "features")])  # fmt: skip
    with pytest.raises(UserError, match="crops should be at least 1"):
        main([*argv, "--overwrite", "--crops", "0"])
    here = flags(world, tmp_path / "out", "--config", config(world), "--model", COLOURS)
    with pytest.raises(UserError, match="reads image, which has no frames: leave out --num-frames"):
        main([*here, "--num-frames", "2"])
    with pytest.raises(UserError, match="here: the dataset's protocol is for videos, not for image"):
        main([*here, "--clips", "2"])


def test_a_dataset_that_fails_does_not_stop_the_others(world, tmp_path, caplog):
    (tmp_path / "bad.yaml").write_text(f"task: classification\ndata: {tmp_path}/bad\n")
    (tmp_path / "bad" / "red").mkdir(parents=True)
    (tmp_path / "bad" / "red" / "a.png").write_bytes(b"no picture")
    argv = flags(world, tmp_path / "out", f"--model={COLOURS}", "--config", str(tmp_path / "bad.yaml"))
    with pytest.raises(
        UserError, match=r"(?s)1 of 2 evaluations failed; the others were written:\n  bad: .*not a picture"
    ):
        main([*argv, config(world)])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["here_colours-Colours.json"]
    with pytest.raises(UserError, match=r"(?s)^bad: .*not a picture"):
        main(argv)


def test_each_model_scores_what_it_reads(world, tmp_path):
    (tmp_path / "far.yaml").write_text(f"task: classification\nmodality: depth\ndata: {world}/folders\n")
    argv = flags(world, tmp_path / "out", "--config", config(world), "--model", COLOURS)
    main([*argv, f"{HERE}:Far"])  # nothing is of depth, so there is nothing for it to do
    assert len(list((tmp_path / "out").iterdir())) == 1
    with pytest.raises(UserError, match="far is depth, but the model reads image"):
        main(flags(world, tmp_path / "b", f"--config={tmp_path}/far.yaml", f"--model={COLOURS}"))
    with pytest.raises(UserError, match="far is depth, but the models read image"):
        main(
            flags(
                world, tmp_path / "c", f"--config={tmp_path}/far.yaml", f"--model=a={COLOURS}", f"--model=b={COLOURS}"
            )
        )


def test_a_result_of_another_checkpoint_is_not_taken_for_one_of_this(world, clip_folder, tmp_path):
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    os.rename(save(tmp_path, Image(image_size=32), clip_folder, 0), run / "step_00000001.pt")
    argv = flags(world, tmp_path / "out", "--config", config(world), "--model", str(tmp_path / "run"))
    main(argv)
    first = read(tmp_path / "out", "here_run.json")
    assert first["checkpoint"] == str(run / "step_00000001.pt")
    main([*argv, "--skip-existing"])
    os.rename(save(tmp_path, Image(image_size=32), clip_folder, 1), run / "step_00000002.pt")
    with pytest.raises(UserError, match=r"here_run.json is for .*step_00000001.pt, not .*step_00000002.pt: --overwr"):
        main([*argv, "--skip-existing"])
    main([*argv, "--overwrite"])
    second = read(tmp_path / "out", "here_run.json")
    assert second["weights_sha256"] != first["weights_sha256"]
    (tmp_path / "out" / "here_run.json").write_text('{"dataset": "here"')
    with pytest.raises(UserError, match=r"here_run.json is not a valid result .Invalid JSON"):
        main([*argv, "--skip-existing"])


def test_two_results_of_one_name_and_files_that_are_there_are_refused(world, tmp_path):
    for name in ("d", "d_x"):
        (tmp_path / f"{name}.yaml").write_text(f"task: classification\ndata: {world}/folders\n")
    files = ["--config", str(tmp_path / "d.yaml"), str(tmp_path / "d_x.yaml")]
    with pytest.raises(UserError, match=r"two results would be .*d_x_m.json: name the models"):
        main(flags(world, tmp_path / "out", *files, "--model", f"x_m={COLOURS}", f"m={COLOURS}"))
    assert not (tmp_path / "out").exists()
    argv = flags(world, tmp_path / "out", *files[:2], "--model", f"m={COLOURS}", "--export-features", str(tmp_path))
    (tmp_path / "d_m.safetensors").write_text("mine")
    with pytest.raises(UserError, match=r"d_m.safetensors exists: --overwrite"):
        main(argv)
    assert (tmp_path / "d_m.safetensors").read_text() == "mine"


def test_a_result_made_with_other_options_is_not_skipped(films, tmp_path):
    argv = ["--config", str(films), "--model", f"{HERE}:Films", "--output", str(tmp_path / "out"), "--workers", "0"]
    main(argv)
    main([*argv, "--skip-existing"])
    for more, key in (
        (["--clips", "2"], "clips"), (["--num-frames", "2"], "num_frames"), (["--templates", "some {c}"], "templates"),
        (["--precision", "amp_bf16"], "precision"), (["--export-features", str(tmp_path)], "exported"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"films_{HERE}-Films.json was made with another {key}: --overwrite"):
            main([*argv, "--skip-existing", *more])


def test_what_a_result_depends_on_may_change_in_place(films, clip_folder, tmp_path):
    checkpoint = save(tmp_path, Image(image_size=32), clip_folder, 0)
    (tmp_path / "pictures" / "red").mkdir(parents=True)
    Picture.new("RGB", (8, 8)).save(tmp_path / "pictures" / "red" / "a.png")
    (tmp_path / "a.yaml").write_text("task: classification\ndata: pictures\nclass_names: [red, blue]\n")
    argv = ["--config", str(tmp_path / "a.yaml"), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"),
            "--workers", "0", "--skip-existing"]  # fmt: skip
    main(argv)
    main(argv)
    (tmp_path / "a.yaml").write_text("task: classification\ndata: pictures\nclass_names: [red, green]\n")
    with pytest.raises(UserError, match="was made with another class_names"):
        main(argv)
    (tmp_path / "a.yaml").write_text("task: classification\ndata: pictures\nclass_names: [red, blue]\n")
    save(tmp_path, Image(image_size=32), clip_folder, 1)
    with pytest.raises(UserError, match="was made with another checkpoint_changed"):
        main(argv)


def test_a_restart_with_two_modalities_and_with_views_of_the_paper_is_done(films, world, tmp_path):
    films.write_text(films.read_text() + "paper: {inputs: views}\n")
    (tmp_path / "here.yaml").write_text(f"task: classification\nmodality: image\ndata: {world}/folders\n")
    argv = ["--config", str(tmp_path / "here.yaml"), str(films), "--model", f"a={COLOURS}", f"b={HERE}:Films",
            "--workers", "0", "--output", str(tmp_path / "out"), "--skip-existing"]  # fmt: skip
    main(argv)
    main(argv)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["films_b.json", "here_a.json"]
    paper = ["--config", str(films), "--model", f"b={HERE}:Films", "--workers", "0", "--protocol", "paper",
             "--output", str(tmp_path / "out"), "--skip-existing"]  # fmt: skip
    main(paper)
    main(paper)
    assert (tmp_path / "out" / "films_paper_b.json").is_file()


def test_a_model_that_cannot_be_loaded_does_not_stop_the_others(world, tmp_path, capsys):
    argv = flags(world, tmp_path / "out", "--config", config(world), "--model", "x=none.pt", f"a={COLOURS}")
    with pytest.raises(UserError, match=r"(?s)1 of 2 evaluations failed; the others were written:\n  x: no checkpoint"):
        main(argv)
    assert " top1 " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"2 of 2 evaluations failed:"):
        main([*flags(world, tmp_path / "b", "--compare", "--config", config(world)), "--model", "x=no.pt", "y=no2.pt"])
    assert capsys.readouterr().out == ""


def test_all_by_the_paper_leaves_out_what_it_does_not_have(world, tmp_path, caplog):
    for name, more in (("a", ""), ("b", "paper: {}\n")):
        (tmp_path / f"{name}.yaml").write_text(f"task: classification\nmodality: image\ndata: {world}/folders\n{more}")
    with caplog.at_level(logging.INFO):
        main(
            flags(world, tmp_path / "out", "--all", f"--configs={tmp_path}", f"--model=m={COLOURS}", "--protocol=paper")
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b_paper_m.json"]
    assert "a is left out: it has no paper protocol" in caplog.text
    (tmp_path / "b.yaml").unlink()
    with pytest.raises(UserError, match=r"no datasets: .* holds the data of none of the configs in"):
        main(flags(world, tmp_path / "c", "--all", f"--configs={tmp_path}", f"--model=m={COLOURS}", "--protocol=paper"))


def test_what_a_stopped_run_has_left_is_made_again(world, tmp_path):
    argv = flags(world, tmp_path / "out", "--config", config(world), "--model", f"m={COLOURS}",
                 "--export-features", str(tmp_path / "features"))  # fmt: skip
    main(argv)
    (tmp_path / "out" / "here_m.json").unlink()  # stopped between the two
    with pytest.raises(UserError, match=r"here_m.safetensors exists: --overwrite"):
        main(argv)
    main([*argv, "--skip-existing"])
    assert (tmp_path / "out" / "here_m.json").is_file()


def test_no_old_value_is_shown_for_a_dataset_that_failed(world, tmp_path, capsys):
    (tmp_path / "here.yaml").write_text(f"task: classification\ndata: {tmp_path}/here\n")
    import shutil

    shutil.copytree(world / "folders", tmp_path / "here")
    argv = flags(world, tmp_path / "out", "--config", str(tmp_path / "here.yaml"), config(world, "texts"), "--compare",
                 "--model", f"a={COLOURS}", f"b={COLOURS}")  # fmt: skip
    main(argv)
    assert " top1 " in capsys.readouterr().out
    (tmp_path / "here" / "red" / "00.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="2 of 4 evaluations failed"):
        main([*argv, "--overwrite"])
    out = capsys.readouterr().out
    assert " top1 " not in out
    assert "text_to_modality/R@1" in out


def test_features_as_parquet(world, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    for name in ("here", "texts"):
        main(flags(world, tmp_path / "out", "--config", config(world, name), "--model", f"m={COLOURS}",
                   "--export-features", str(tmp_path), "--export-format", "parquet"))  # fmt: skip
        main(flags(world, tmp_path / "again", "--config", config(world, name), "--model", f"m={COLOURS}",
                   "--export-features", str(tmp_path)))  # fmt: skip
        rows = pyarrow.read_table(tmp_path / f"{name}_m.parquet").to_pylist()
        lines = [json.loads(line) for line in (tmp_path / f"{name}_m.jsonl").read_text().splitlines()]
        assert [{key: row[key] for key in line} for row, line in zip(rows, lines, strict=True)] == lines
        from safetensors.torch import load_file

        tensors = load_file(tmp_path / f"{name}_m.safetensors")
        expected = torch.cat([tensors["features"], tensors["text_features"]])
        assert torch.equal(torch.tensor([row["vector"] for row in rows]), expected)


def test_an_encoder_that_has_collapsed_is_told(world, caplog):
    model, reader = load_eval_model("colours:Green", torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        evaluate(model, reader, classification(world / "folders"), workers=0)
    assert "all 30 samples have the same features: the encoder has collapsed" in caplog.text
    caplog.clear()
    model, reader = load_eval_model(COLOURS, torch.device("cpu"))
    evaluate(model, reader, classification(world / "folders"), workers=0)
    assert "collapsed" not in caplog.text


def on_a_node(rank, folder, data):
    """Every rank has to learn that the ranks' data differ."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, reader = load_eval_model(COLOURS, torch.device("cpu"))
    try:
        evaluate(model, reader, classification(data[rank]), workers=0)
    except UserError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_ranks_that_see_other_data_are_refused(world, tmp_path):
    import shutil

    other = shutil.copytree(world / "folders", tmp_path / "folders")
    (other / "red" / "00.png").rename(other / "red" / "99.png")
    data = [str(world / "folders"), str(other)]
    torch.multiprocessing.spawn(on_a_node, (str(tmp_path), data), nprocs=2)
    for rank in range(2):
        assert "the ranks see different samples" in (tmp_path / f"{rank}.txt").read_text()


def test_help_names_every_flag():
    found = call("-m", "languagebind.eval", "--help")
    assert all(
        f"--{name}" in found for name in ("config", "model", "templates", "num-frames", "clips", "export-format")
    )


def test_clips_that_are_averaged_are_the_mean_of_their_features(films, tmp_path):
    from languagebind.eval.data.readers import choose_protocol
    from languagebind.eval.data.samples import Sample
    from languagebind.eval.features import EncodeOptions, FeatureEncoder

    model, reader = load_eval_model(f"{HERE}:Films", torch.device("cpu"))
    paths = sorted((tmp_path / "films").rglob("*.mp4"))
    samples = [Sample(path.name, path) for path in paths]
    protocol = choose_protocol("ours", None, None, replace(reader, num_frames=2), 3, 2)
    found, _ = FeatureEncoder(model, protocol, EncodeOptions(workers=0)).encode_samples(samples)
    for path, feature in zip(paths, found, strict=True):
        views = torch.nn.functional.normalize(model.encode(protocol.reader.read(path)), dim=-1)
        assert torch.allclose(feature, torch.nn.functional.normalize(views.mean(dim=0), dim=0), atol=1e-6)
