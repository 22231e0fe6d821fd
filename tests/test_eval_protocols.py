"""The paper's protocols against code that shares nothing with them: frames, crops, views, similarity."""

import json
import math
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from helpers import ROOT
from lookalikes import film, write_json
from PIL import Image as Picture

from languagebind.config import UserError
from languagebind.eval import DatasetConfig, load_dataset_config
from languagebind.eval.__main__ import main
from languagebind.eval.data.readers import EvalProtocol, Reader, choose_protocol
from languagebind.eval.evaluate import check_dataset, evaluate
from languagebind.eval.features import EncodeOptions, FeatureEncoder
from languagebind.eval.results import model_name, read_results, write_result
from languagebind.modalities import DecodeError
from languagebind.modalities.audio import Audio
from languagebind.modalities.image import Image
from languagebind.modalities.video import Video

VIDEO = Video(image_size=16, num_frames=8, video_backend="pyav")
CLIP = np.array([(0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)])
IMAGENET = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])
NEAR = 4 / 255 / 0.22  # four of 255 levels: decoders round colours differently
RETRIEVAL = {"inputs": "seconds", "similarity": "dot"}


def video(path, count, rate, size=(48, 64), **options):
    """Frames of coarse random colours, each unlike all others; `size` is (height, width)."""
    rng = np.random.default_rng(count)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": "4", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        for _ in range(count):
            coarse = Picture.fromarray(rng.integers(0, 255, (3, 4, 3), np.uint8))
            pixels = np.asarray(coarse.resize((size[1], size[0]), Picture.Resampling.BICUBIC))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


def every_frame(path):
    """(seconds, (H, W, 3)) of each frame."""
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def pil_square(pixels, size=16):
    """(3, size, size): short side by PIL's bicubic filter, centre, CLIP's statistics."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    resized = Picture.fromarray(pixels).resize(
        (int(size * width / short), int(size * height / short)), Picture.Resampling.BICUBIC
    )
    left, top = (round((side - size) / 2) for side in resized.size)
    cut = np.asarray(resized.crop((left, top, left + size, top + size))) / 255
    return ((cut - CLIP[0]) / CLIP[1]).transpose(2, 0, 1)


def original_seconds(count, rate, clip):
    """The frames as the original's loader counted them, in plain Python."""
    fps = int(rate)
    seconds = math.ceil(count / fps)
    first, last = 0, seconds - 1
    if clip is not None:
        first, last = clip[0], min(clip[1], seconds) - 1
    return [int(first * fps + k * (last - first) * fps / 7) for k in range(8)]


# ---------------------------------------------------------------------------------------------- frames by seconds


@pytest.mark.parametrize(
    ("count", "rate", "size", "clip"),
    [
        (37, "10", (48, 64), None),
        (61, "25", (64, 48), None),
        (95, "30000/1001", (48, 48), None),
        (7, "30", (34, 62), None),  # less than a second: the first frame eight times
        (53, "25/2", (48, 64), (1, 4)),
        (41, "15", (48, 64), (0, 31)),  # longer than the video
    ],
)
def test_seconds_takes_the_original_s_frames(tmp_path, count, rate, size, clip):
    path = video(tmp_path / "a.mp4", count, rate, size)
    frames = [pixels for _, pixels in every_frame(path)]
    assert len(frames) == count
    squares = np.stack([pil_square(pixels) for pixels in frames])
    for source in (path, path.read_bytes()):
        views = choose_protocol("paper", RETRIEVAL, clip, VIDEO).reader.read(source)
        assert views.shape == (1, *VIDEO.input_shape)
        found = views[0].numpy().transpose(1, 0, 2, 3)  # (T, 3, H, W)
        apart = np.abs(found[:, None] - squares).max(axis=(2, 3, 4))  # (T, count)
        assert apart.argmin(axis=1).tolist() == original_seconds(count, Fraction(rate), clip)
        assert apart.min(axis=1).max() < NEAR
        assert np.sort(apart, axis=1)[:, 1].min() > 5 * NEAR, "frames are told apart"


def test_seconds_of_duration_ends_where_the_annotation_does(tmp_path):
    # 29.97 counts as 29: 3120 frames are 108 of the original's seconds, and 104.1 of the clock's.
    path = video(tmp_path / "a.mp4", 3120, "30000/1001", (16, 16))
    with av.open(str(path)) as container:
        assert math.ceil(container.duration / 1e6) == 105
    squares = np.stack([pil_square(pixels) for _, pixels in every_frame(path)])
    for rule, end in (("seconds", 108), ("seconds_of_duration", 105)):
        found = choose_protocol("paper", {"inputs": rule}, None, VIDEO).reader.read(path)[0].numpy()
        expected = squares[[int(k * (end - 1) * 29 / 7) for k in range(8)]].transpose(1, 0, 2, 3)
        assert np.abs(found - expected).max() < NEAR


def test_seconds_leaves_zeros_where_a_file_is_cut_off(tmp_path):
    path = video(tmp_path / "a.mkv", 64, "10")
    whole = choose_protocol("paper", RETRIEVAL, None, VIDEO).reader
    expected = whole.read(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    found = whole.read(path)[0]
    filled = [bool(found[:, k].any()) for k in range(8)]
    assert filled == sorted(filled, reverse=True)
    assert 2 < sum(filled) < 8
    assert torch.equal(found[:, : sum(filled)], expected[0, :, : sum(filled)])
    with pytest.raises(DecodeError):  # ours does not take less for the whole
        Reader(VIDEO).read(path)
    # Of an MP4, OpenCV repeats the last frame that it can read, without an error.
    path = video(tmp_path / "a.mp4", 64, "10", movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    found = whole.read(path)[0]
    assert torch.equal(found[:, -2], found[:, -1])
    assert found[:, -1].any()
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 99)
    with pytest.raises(DecodeError):
        whole.read(tmp_path / "junk.mp4")
    long = Video(image_size=16, max_seconds=2)
    with pytest.raises(DecodeError, match="exceeds --max-seconds 2"):
        choose_protocol("paper", RETRIEVAL, None, long).reader.read(video(tmp_path / "b.mp4", 30, "10"))


# ---------------------------------------------------------------------------------------------- views


def bilinear(pixels, height, width):
    """Pixel centres half a pixel in, no smoothing, rounded to bytes, as OpenCV resizes."""
    out = np.empty((height, width, 3))
    for y in range(height):
        for x in range(width):
            v, u = (y + 0.5) * pixels.shape[0] / height - 0.5, (x + 0.5) * pixels.shape[1] / width - 0.5
            v, u = min(max(v, 0), pixels.shape[0] - 1), min(max(u, 0), pixels.shape[1] - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, pixels.shape[0] - 1), min(left + 1, pixels.shape[1] - 1)
            a, b = v - top, u - left
            out[y, x] = (1 - a) * ((1 - b) * pixels[top, left] + b * pixels[top, right]) + a * (
                (1 - b) * pixels[bottom, left] + b * pixels[bottom, right]
            )
    return out.round()


@pytest.mark.parametrize(
    ("count", "rate", "size"),
    [(5, "10", (48, 64)), (64, "25", (64, 48)), (97, "30000/1001", (34, 66)), (131, "24", (16, 26))],
)
def test_views_are_the_original_s(tmp_path, count, rate, size):
    path = video(tmp_path / "a.mp4", count, rate, size)
    frames = [pixels for _, pixels in every_frame(path)]
    sampled = [frames[i] for i in range(count) if i % 8 == 0]
    while len(sampled) < 8:
        sampled.append(sampled[-1])
    short = min(size)
    height, width = int(16 * size[0] / short), int(16 * size[1] / short)
    resized = [bilinear(pixels, height, width) for pixels in sampled]
    expected = []
    for segment in range(5):
        start = int(segment * max((len(sampled) - 8) / 4, 0))
        for crop in range(3):
            offset = int(crop * (max(height, width) - 16) / 2)
            cut = [
                x[offset : offset + 16] if height > width else x[:, offset : offset + 16]
                for x in resized[start : start + 8]
            ]
            expected.append(((np.stack(cut) / 255 - IMAGENET[0]) / IMAGENET[1]).transpose(3, 0, 1, 2))
    reader = choose_protocol("paper", {"inputs": "views"}, None, VIDEO).reader
    found = reader.read(path)
    assert found.shape == (15, *VIDEO.input_shape)
    assert np.abs(found.numpy() - np.stack(expected)).max() < NEAR
    assert not torch.equal(found[0], found[1]), "the crops differ"
    assert torch.equal(found[0], found[3]) == (len(sampled) == 8), "the segments differ where there are frames enough"


def test_scores_of_views_are_averaged_probabilities():
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    features, classes = (unit(torch.randn(*shape, generator=generator), dim=-1) for shape in ((4, 15, 6), (9, 6)))
    protocol = choose_protocol("paper", {"inputs": "views"}, None, VIDEO)
    scores, logits = protocol.class_scores(features, classes, torch.tensor(1.0))
    for sample in range(4):
        total = np.zeros(9)
        for view in range(15):
            weights = [math.exp(100 * float(features[sample, view].double() @ c.double())) for c in classes]
            total += np.array(weights) / sum(weights)
        assert scores[sample].tolist() == pytest.approx((total / 15).tolist(), abs=1e-4)
    assert torch.allclose(logits.softmax(dim=1), scores)


# ---------------------------------------------------------------------------------------------- pictures


def test_pictures_are_open_clip_s(tmp_path):
    from open_clip import image_transform

    theirs = image_transform(16, is_train=False)
    rng = np.random.default_rng(0)
    picture = Picture.fromarray(rng.integers(0, 255, (45, 37, 3), np.uint8))
    exif = Picture.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.convert("L").resize((90, 33)).save(tmp_path / "grey.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    reader = choose_protocol("paper", {"inputs": "picture"}, None, Image(image_size=16)).reader
    for path in tmp_path.iterdir():
        found = reader.read(path)
        assert found.shape == (1, 3, 1, 16, 16)
        assert torch.equal(found[0, :, 0], theirs(Picture.open(path).convert("RGB")))
        assert not torch.allclose(found[0], Image(image_size=16).preprocess(path), atol=0.1)


# ---------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("clip", [(0.0, 2.0), (1.0, 2.2), (1.3, 99.0), (2.35, 2.4), (1.1, 1.2)])
@pytest.mark.parametrize("rate", ["30000/1001", "20"])
def test_a_clip_of_ours_holds_the_frames_of_its_time(tmp_path, clip, rate):
    path = video(tmp_path / "a.mp4", 75, rate)
    inside = [pixels for time, pixels in every_frame(path) if clip[0] <= time < clip[1]]
    assert 0 < len(inside) < 75
    expected = VIDEO.preprocess(np.stack(inside))
    found = choose_protocol("ours", RETRIEVAL, clip, VIDEO).reader.read(path)[0]
    assert torch.allclose(found, expected, atol=NEAR)
    whole = choose_protocol("ours", None, (0.0, 31.0), VIDEO).reader.read(path)[0]
    assert torch.equal(whole, VIDEO.preprocess(path))
    for nothing in ((9.0, 10.0), (1.002, 1.003)):
        with pytest.raises(DecodeError, match="no frame of 75 lies from"):
            choose_protocol("ours", None, nothing, VIDEO).reader.read(path)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (32, 32)])
@pytest.mark.parametrize(("clips", "crops"), [(1, 3), (4, 1), (3, 2), (1, 2)])
def test_clips_and_crops_of_ours(tmp_path, size, clips, crops):
    path = video(tmp_path / "a.mp4", 75, "10", size)
    frames = np.stack([pixels for _, pixels in every_frame(path)])[10:50]
    reader = choose_protocol("ours", None, (1.0, 5.0), VIDEO, clips, crops).reader
    found = reader.read(path)
    assert found.shape == (clips * crops, *VIDEO.input_shape)
    side, room = min(size), max(size) - min(size)
    expected = []
    for c in range(crops):
        start = round(room / 2) if crops == 1 else round(room * c / (crops - 1))
        for s in range(clips):
            chosen = frames[[int((t + (s + 0.5) / clips) * 40 / 8) for t in range(8)]]
            square = chosen[:, :, start : start + side] if size[1] >= size[0] else chosen[:, start : start + side]
            expected.append(VIDEO.preprocess(square))
    assert torch.allclose(found, torch.stack(expected), atol=NEAR)
    together = sorted(int((t + (s + 0.5) / clips) * 40 / 8) for t in range(8) for s in range(clips))
    assert len(set(together)) == min(40, 8 * clips), "no frame twice"
    with pytest.raises(ValueError, match="clips and crops belong to our protocol"):
        DatasetConfig("a", "retrieval", "a.jsonl", protocol="paper", paper=RETRIEVAL, clips=clips, crops=crops)


# ---------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def model(clip_folder):
    from languagebind.model import DualEncoder, EncoderConfig
    from languagebind.text import TextConfig, build_text

    torch.manual_seed(0)
    sizes = EncoderConfig(patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
    return DualEncoder(VIDEO.input_shape, sizes, build_text(TextConfig(f"local-dir:{clip_folder}"))).eval()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Videos of several lengths with captions and labels."""
    root = tmp_path_factory.mktemp("films")
    rows = []
    for k, count in enumerate((5, 19, 33, 47, 70, 90)):
        video(root / f"{k}.mp4", count, "10", (16, 24))
        text = ["a dog", "two cats", "rain", "a red car", "a man sings", "snow"][k]
        rows.append({"path": f"{k}.mp4", "caption": text, "label": "ab"[k % 2]})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def dataset(films, task, **options):
    names = {} if task == "retrieval" else {"class_names": {"a": "a dog", "b": "a car"}}
    return DatasetConfig("films", task, str(films / "data.jsonl"), **names, **options)


def test_retrieval_by_the_paper_ranks_raw_dot_products(films, model):
    from languagebind.eval.data.samples import read_samples

    config = dataset(films, "retrieval", protocol="paper", paper=RETRIEVAL)
    result = evaluate(model, VIDEO, config, workers=0, batch_size=4)
    samples = read_samples(config, VIDEO)
    rules = choose_protocol("paper", RETRIEVAL, None, VIDEO)
    with torch.no_grad():
        x = torch.cat([model.project(rules.reader.read(sample.source)) for sample in samples]).double()
        texts = torch.cat([model.project_text(model.tokenize([sample.captions[0]])) for sample in samples]).double()
    assert x.norm(dim=1).max() > 1.01 * x.norm(dim=1).min(), "the norms matter"
    ranks = [1 + sum(float(t @ x[j]) >= float(t @ x[i]) for j in range(6) if j != i) for i, t in enumerate(texts)]
    assert result["metrics"]["text_to_modality/R@1"] == pytest.approx(np.mean([r == 1 for r in ranks]))
    assert result["metrics"]["text_to_modality/mean_rank"] == pytest.approx(np.mean(ranks))
    back = [1 + sum(float(v @ texts[j]) >= float(v @ texts[i]) for j in range(6) if j != i) for i, v in enumerate(x)]
    assert result["metrics"]["modality_to_text/mean_rank"] == pytest.approx(np.mean(back))
    captions = (sample.captions[0] for sample in samples)
    found, rows = FeatureEncoder(model, rules, EncodeOptions(workers=0)).encode_texts(captions)
    assert torch.allclose(found[torch.tensor(rows)].double(), texts, atol=1e-5)
    assert (found.norm(dim=1) - 1).abs().min() > 0.01, "not of unit norm"
    protocol = result["protocol"]
    assert (protocol["protocol"], protocol["views"], protocol["resize"]) == ("paper", 1, "PIL bicubic")
    assert protocol["similarity"] == "dot product of features that are not normalised"
    assert protocol["ties"] == "count against the model"
    assert "OpenCV" in protocol["frames_rule"]
    with pytest.raises(UserError, match="films: the dual softmax needs cosines"):
        evaluate(model, VIDEO, config, workers=0, dual_softmax=True)


@pytest.mark.parametrize("batch_size", [4, 32])  # less than the views of one sample, and of two
def test_kinetics_by_the_paper_averages_views(films, model, batch_size):
    config = dataset(films, "classification", protocol="paper", paper={"inputs": "views"})
    result = evaluate(model, VIDEO, config, workers=0, batch_size=batch_size)
    reader = choose_protocol("paper", {"inputs": "views"}, None, VIDEO).reader
    right = 0
    with torch.no_grad():
        classes = torch.cat([model.encode_text(model.tokenize([name])) for name in ("a dog", "a car")])
        for k in range(6):
            views = torch.stack([model.encode(view[None])[0] for view in reader.read(films / f"{k}.mp4")])
            mean = (100 * views @ classes.T).softmax(dim=1).mean(dim=0)
            right += int(mean.argmax()) == k % 2
    assert result["metrics"]["top1"] == pytest.approx(right / 6)
    assert result["protocol"]["views"] == 15
    assert result["protocol"]["pixel_statistics"] == IMAGENET.tolist()
    assert 0 <= result["calibration"]["ece"] <= 1


def test_results_of_both_protocols_lie_side_by_side(films, model, tmp_path, clip_folder):
    from languagebind.config import to_dict
    from languagebind.model import EncoderConfig, InitConfig, ModelConfig, TextConfig

    sizes = EncoderConfig(patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
    own = ModelConfig(sizes, TextConfig(f"local-dir:{clip_folder}"), init=InitConfig("none"))
    saved = {
        "model": model.encoder_state(),
        "config": {"model": to_dict(own), "modality": "video", "inputs": to_dict(VIDEO)},
        "text_fingerprint": model.text_fingerprint(),
    }
    torch.save(saved, tmp_path / "a.pt")
    (tmp_path / "films.yaml").write_text(
        "task: retrieval\ndata: data.jsonl\nclip: [0, 4]\npaper: {inputs: seconds, similarity: dot}\n"
    )
    argv = ["--checkpoint", str(tmp_path / "a.pt"), "--config", str(tmp_path / "films.yaml"), "--data-root", str(films)]
    argv += ["--output", str(tmp_path / "results"), "--workers", "0", "--device", "cpu"]
    main(argv)
    main([*argv, "--protocol", "paper"])
    ours, paper = (json.loads((tmp_path / "results" / f"films{x}_a.json").read_text()) for x in ("", "_paper"))
    assert (ours["protocol"]["protocol"], ours["protocol"]["similarity"]) == ("ours", "cosine")
    assert (paper["protocol"]["protocol"], paper["dataset"]) == ("paper", "films")
    assert ours["protocol"]["clip"] == paper["protocol"]["clip"] == [0, 4]
    assert ours["metrics"] != paper["metrics"]
    names = [model_name(result) for result in read_results(tmp_path / "results")]
    assert sorted(names) == ["a", "a (paper protocol)"]
    write_result(ours, tmp_path / "results" / "twice.json")
    with pytest.raises(UserError, match="are both results of a on films"):
        read_results(tmp_path / "results")


# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_the_paper_s_protocol_or_says_that_there_is_none(path):
    config = load_dataset_config(path, "/nowhere", prepared=False)
    modality = {"A": Audio(), "i": Image()}.get(
        config.data.removeprefix("/nowhere/")[0],
        Video() if config.task == "retrieval" or "kinetics" in path.stem else Image(),
    )
    if config.paper is None:
        # What the original does not evaluate
        assert path.stem in ("lsmdc", "vatex", "sun_rgbd", "nyu_v2_rgb", "llvip_rgb", "nyu_v2_13", "nyu_v2_40",
                             "mfnet")  # fmt: skip
        with pytest.raises(ValueError, match="there is no paper protocol"):
            DatasetConfig(config.name, config.task, config.data, protocol="paper", paper=config.paper)
        return
    protocol = choose_protocol("paper", config.paper, config.clip, modality)
    assert isinstance(protocol, EvalProtocol)
    assert protocol.unit == (config.task != "retrieval")
    assert (protocol.reader.views == 15) == path.stem.startswith("kinetics")
    assert config.clip == ((0, 31) if path.stem == "didemo" else None)
    assert config.protocol == "ours"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("protocol: theirs", "protocol should be 'ours', 'paper' or 'clip4clip', not 'theirs'"),
        ("protocol: paper", "there is no paper protocol"),
        ("paper: seconds", "paper should be `key: value` lines"),
        ("paper: {input: seconds}", "unknown key 'paper.input', did you mean 'inputs'"),
        ("paper: {inputs: second}", "paper.inputs should be .*'seconds'.*, not 'second'"),
        ("paper: {similarity: dott}", "paper.similarity should be 'cosine' or 'dot', not 'dott'"),
        ("paper: {inputs: views}", "paper: inputs: views is for classification"),
        ("clip: [3, 1]", "should be a start and a later end"),
        ("clip: [0, inf]", "clip.1 should be a finite number"),
        ("clip: [nan, 1]", "clip.0 should be a finite number"),
        ("clip: 31", "clip should be a list, not '31'"),
        ("clip: [1, 2, 3]", "clip: Tuple should have at most 2 items"),
    ],
)
def test_mistakes_in_a_config(tmp_path, lines, message):
    (tmp_path / "a.yaml").write_text(f"task: retrieval\ndata: x.jsonl\n{lines}\n")
    with pytest.raises(UserError, match=message):
        load_dataset_config(tmp_path / "a.yaml")


def test_rules_that_do_not_fit_the_modality_or_the_files(films, tmp_path):
    config = dataset(films, "retrieval", protocol="paper", paper=RETRIEVAL)
    with pytest.raises(UserError, match="films: the dataset's protocol is for videos, not for audio"):
        check_dataset(config, Audio())
    with pytest.raises(UserError, match="is for videos, not for image"):
        choose_protocol("ours", None, (0, 1), Image())
    with pytest.raises(DecodeError, match="expected one file, not several frames"):
        choose_protocol("ours", None, (0, 1), VIDEO).reader.read([b"a", b"b"])
    check_dataset(config, VIDEO)
    write_json(tmp_path / "data.jsonl", {"path": "a.mp4", "caption": "x"})
    film(tmp_path / "a.mp4").write_bytes(b"junk")
    with pytest.raises(UserError, match="none of the first samples can be read as video"):
        check_dataset(dataset(tmp_path, "retrieval", protocol="paper", paper=RETRIEVAL), VIDEO)
