"""CLIP4Clip: its heads against the paper's description, and checkpoints in its layout."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from clip4clip_files import WIDTH, clip_feature, pair_score, write_clip4clip
from eval_files import write_jsonl
from helpers import MINILM, ROOT, call_ranks, checkpoint, losses, metrics
from imagebind_files import small_state
from open_clip import get_tokenizer
from tiny_towers import CLIP_TEXT, SIGLIP_TEXT, write_tower

from languagebind import load
from languagebind.clip4clip import read_head
from languagebind.config import UserError
from languagebind.data.shards import ShardWriter, write_index
from languagebind.eval import load_dataset_config
from languagebind.eval.__main__ import main as evaluate
from languagebind.eval.data.readers import clip4clip_protocol
from languagebind.eval.report.__main__ import main as report
from languagebind.eval.score.retrieval import Captioned, retrieve
from languagebind.hub.encoders import load_model
from languagebind.hub.export import main as export
from languagebind.modalities.video import Video
from languagebind.model import build_model
from languagebind.temporal import TransformerHead, build_head
from languagebind.tuning import apply_tuning
from training.main import main as train
from training.optim import build_optimizer
from training.params import parse_args

ENGINES = {"ddp": [], "fsdp": ["--engine=fsdp"], "zero3": ["--engine=deepspeed", "--zero-stage=3"]}
HEADS = {"meanP": "mean", "seqLSTM": "lstm", "seqTransf": "transformer"}
RATE = 5  # frames a second
SECONDS = (2, 4, 7, 20)  # of the videos; 12 frames at most, one a second
CAPTIONS = [["a dog runs", "a brown dog"], ["a man cooks"], ["two cars race", "cars", "a race"], ["the sea at night"]]


@pytest.fixture(scope="module", params=HEADS)
def file(request, tmp_path_factory):
    """A checkpoint with each head, the CLIP in it, and the head's weights."""
    path = tmp_path_factory.mktemp(request.param) / "pytorch_model.bin.3"
    return request.param, path, *write_clip4clip(path, request.param)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number, seconds in enumerate(SECONDS):
        rng = np.random.default_rng(number)
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=RATE, options={"crf": "4"})
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for _ in range(seconds * RATE):
                pixels = np.kron(rng.integers(0, 255, (4, 6, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode())
    rows = [{"path": f"{number}.mp4", "captions": captions} for number, captions in enumerate(CAPTIONS)]
    write_jsonl(folder / "test.jsonl", rows)
    text = "name: films\ntask: retrieval\nmodality: video\ndata: test.jsonl\nclip4clip: {frames: 12, words: 5}\n"
    (folder / "films.yaml").write_text(text)
    return folder


def real_frames(modality, sources):
    """The frames (T, 3, H, W) of each of the videos, without padding."""
    return [modality.preprocess(x).transpose(0, 1)[: min(s, 12)] for x, s in zip(sources, SECONDS, strict=True)]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_as_the_paper_says_forwards_and_in_gradients(head, tmp_path):
    _, weights = write_clip4clip(tmp_path / "model.bin", head)
    own = build_head(HEADS[head], WIDTH, 2, 12).double()
    _, state = read_head(f"clip4clip:{tmp_path / 'model.bin'}")
    own.load_state_dict({key.removeprefix("temporal_head."): x for key, x in state.items()})
    frames = torch.randn(3, 12, WIDTH, dtype=torch.float64, requires_grad=True)
    counts, direction = (12, 1, 7), torch.randn(3, WIDTH, dtype=torch.float64)
    mask = torch.arange(12) < torch.tensor(counts)[:, None]
    found = torch.nn.functional.normalize(own(frames, mask).double(), dim=1)
    found_grads = torch.autograd.grad((found * direction).sum(), [frames, *own.parameters()], allow_unused=True)
    weights = {key: x.double().requires_grad_() for key, x in weights.items()}
    expected = torch.stack([clip_feature(clip[:n], weights) for clip, n in zip(frames, counts, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    names = [theirs(name) for name, _ in own.named_parameters()]
    sought = [frames, *(weights[name] for name in names)]
    for ours, grad in zip(found_grads, torch.autograd.grad((expected * direction).sum(), sought), strict=True):
        torch.testing.assert_close(ours, grad, atol=1e-6, rtol=0)


def theirs(name: str) -> str:
    """CLIP4Clip's name of a head's parameter."""
    for ours, its in {"layers.": "transformerClip.resblocks.", "positions.": "frame_position_embeddings.",
                      "lstm.": "lstm_visual.", ".self_attn.": ".attn.", ".norm": ".ln_", ".linear1.": ".mlp.c_fc.",
                      ".linear2.": ".mlp.c_proj."}.items():  # fmt: skip
        name = (
            name.replace(ours, its)
            if ours[0] == "."
            else its + name.removeprefix(ours)
            if name.startswith(ours)
            else name
        )
    return name


def test_a_checkpoint_gives_the_features_of_its_clip_and_head(file, videos):
    _, path, clip, weights = file
    model = load(f"clip4clip:{path}")
    encoder, modality = model.encoders["video"]
    assert encoder.vision_model.sizes.activation == "quick_gelu"
    texts = ["a dog", "two cars race"]
    with torch.no_grad():
        expected = clip.encode_text(get_tokenizer("ViT-B-32")(texts), normalize=True)
        torch.testing.assert_close(model.encode(text=texts), expected, atol=1e-5, rtol=0)
        sources = [videos / f"{number}.mp4" for number in range(4)]
        expected = torch.stack(
            [clip_feature(clip.encode_image(each), weights) for each in real_frames(modality, sources)]
        )
    torch.testing.assert_close(model.encode(video=sources), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.logit_scale, clip.logit_scale)


def test_frames_are_taken_at_one_a_second_and_short_clips_padded(videos):
    modality = Video(image_size=32, num_frames=12, frames_per_second=1.0, video_backend="pyav")
    every = replace(modality, num_frames=100, frames_per_second=0.0)
    x, whole = modality.preprocess(videos / "1.mp4"), replace(every, num_frames=20).preprocess(videos / "1.mp4")
    assert torch.equal(x[:, :4], whole[:, ::5])
    assert not x[:, 4:].any()
    x, whole = modality.preprocess(videos / "3.mp4"), every.preprocess(videos / "3.mp4")
    assert torch.equal(x, whole[:, ::5][:, [0, 1, 3, 5, 6, 8, 10, 12, 13, 15, 17, 19]])
    assert (
        modality.preprocess(torch.rand(3, 3, 40, 40)).ne(0).any(dim=0).any(dim=(1, 2)).tolist()
        == [True] * 3 + [False] * 9
    )


def test_evaluation_by_clip4clips_protocol(file, videos, tmp_path, caplog):
    _, path, clip, weights = file
    flags = ["--model", f"clip4clip:{path}", "--config", str(videos / "films.yaml"), "--workers=0"]
    evaluate([*flags, "--protocol=clip4clip", f"--output={tmp_path}"])
    assert "1 of 7 texts have more tokens than are read, and are cut" in caplog.text
    with pytest.raises(UserError, match="clips and crops belong to our protocol alone"):
        evaluate([*flags, "--protocol=clip4clip", f"--output={tmp_path}", "--clips=2"])
    (result,) = (json.loads(each.read_text()) for each in tmp_path.glob("*.json"))
    _, modality = load(f"clip4clip:{path}").encoders["video"]
    with torch.no_grad():
        sources = [videos / f"{number}.mp4" for number in range(4)]
        films = torch.stack([clip_feature(clip.encode_image(each), weights) for each in real_frames(modality, sources)])
        tokens = get_tokenizer("ViT-B-32", context_length=5)([text for texts in CAPTIONS for text in texts])
        texts = clip.encode_text(torch.nn.functional.pad(tokens, (0, 72)), normalize=True)
    scores = (texts @ films.T).numpy()  # (7, 4)
    owners = [n for n, captions in enumerate(CAPTIONS) for _ in captions]
    ranks = [1 + sum(row > row[owner]) for row, owner in zip(scores, owners, strict=True)]
    best = np.stack([scores[[i for i, o in enumerate(owners) if o == n]].max(axis=0) for n in range(4)])  # (text, film)
    back = [1 + sum(best[:, n] > best[n, n]) for n in range(4)]
    for name, own in (("text_to_modality", ranks), ("modality_to_text", back)):
        assert result["metrics"][f"{name}/mean_rank"] == pytest.approx(np.mean(own))
        assert result["metrics"][f"{name}/R@1"] == pytest.approx(np.mean(np.equal(own, 1)))
    assert result["protocol"]["words"] == 5
    assert result["protocol"]["chance"]["modality_to_text/R@1"] == 0.25
    assert result["asked"]["checkpoint"] == str(path)
    evaluate([*flags, f"--output={tmp_path / 'ours'}"])  # by our own protocol, too
    with pytest.raises(UserError, match="needs a temporal head and --num-frames 12; this model has 8"):
        evaluate([*flags, "--protocol=clip4clip", "--num-frames=8", f"--output={tmp_path / 'other'}"])


def test_the_systems_of_the_paper_are_on_one_page(toys, videos, tmp_path, capsys):
    write_clip4clip(tmp_path / "clip4clip", "meanP")
    torch.save(small_state(), tmp_path / "imagebind")
    models = {"video": toys / "video"} | {name: f"{name}:{tmp_path / name}" for name in ("clip4clip", "imagebind")}
    for kind, text in (("pe", CLIP_TEXT), ("siglip", SIGLIP_TEXT)):
        write_tower(tmp_path / kind, kind, text)
        models[kind] = f"open_clip:local-dir:{tmp_path / kind}"
    words = [f"{name}={model}" for name, model in models.items()]
    flags = ["--config", str(videos / "films.yaml"), "--workers=0", f"--output={tmp_path / 'results'}", "--compare"]
    evaluate([*flags, "--model", *words])
    assert set(models) <= set(capsys.readouterr().out.splitlines()[0].split())
    report([str(tmp_path / "results")])
    rows = [row.split(",")[:2] for row in (tmp_path / "results" / "report.csv").read_text().splitlines()[1:]]
    assert {tuple(row) for row in rows} == {(name, "films") for name in models}


def test_tight_transf_ranks_pairs_again(videos, tmp_path):
    path = tmp_path / "pytorch_model.bin.0"
    clip, weights = write_clip4clip(path, "tightTransf")
    flags = ["--model", f"clip4clip:{path}", "--config", str(videos / "films.yaml"), "--workers=0"]
    evaluate([*flags, "--protocol=clip4clip", f"--output={tmp_path}"])
    (result,) = (json.loads(each.read_text()) for each in tmp_path.glob("*.json"))
    _, modality = load_model(f"clip4clip:{path}")
    with torch.no_grad():
        clips = [clip.encode_image(x) for x in real_frames(modality, [videos / f"{n}.mp4" for n in range(4)])]
        tokens = get_tokenizer("ViT-B-32", context_length=5)([text for texts in CAPTIONS for text in texts])
        texts = clip.encode_text(torch.nn.functional.pad(tokens, (0, 72)))
        scores = torch.stack([torch.stack([pair_score(text, frames, weights) for frames in clips]) for text in texts])
    owners = [n for n, captions in enumerate(CAPTIONS) for _ in captions]
    ranks = [1 + int((row > row[owner]).sum()) for row, owner in zip(scores, owners, strict=True)]
    assert result["metrics"]["text_to_modality/mean_rank"] == pytest.approx(np.mean(ranks))
    best = torch.stack([scores[[i for i, o in enumerate(owners) if o == n]].amax(dim=0) for n in range(4)])
    back = [1 + int((best[:, n] > best[n, n]).sum()) for n in range(4)]
    assert result["metrics"]["modality_to_text/mean_rank"] == pytest.approx(np.mean(back))
    assert result["protocol"]["reranked"] == 100
    with pytest.raises(UserError, match="scores pairs and has no embedding: use it with languagebind eval"):
        load(f"clip4clip:{path}")


def test_samples_are_ranked_by_the_best_of_their_captions():
    torch.manual_seed(0)
    films, texts = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (9, 30))
    owners = torch.cat([torch.arange(9), torch.randint(9, (21,))])
    found, _ = retrieve(Captioned(films, texts, torch.arange(30), owners, by_sample=True))
    scores = films @ texts.T
    best = torch.stack([scores[:, owners == n].amax(dim=1) for n in range(9)], dim=1)
    ranks = 1 + (best > best.diagonal()[:, None]).sum(dim=1)
    assert found["metrics"]["modality_to_text/mean_rank"] == pytest.approx(ranks.double().mean().item())
    assert found["metrics"]["modality_to_text/R@5"] == pytest.approx((ranks <= 5).double().mean().item())


@pytest.fixture(scope="module")
def shards(videos, tmp_path_factory):
    folder, infos = tmp_path_factory.mktemp("films"), []
    for shard in range(2):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for number in range(4):
                texts = {"raw": CAPTIONS[number][0]}
                writer.add(f"s{shard}_{number}", {"mp4": (videos / f"{number}.mp4").read_bytes()}, {"captions": texts})
        infos.append(writer.info)
    write_index(folder, infos)
    return folder


def flags(shards, logs, path, *more):
    """A run of two steps from a checkpoint of CLIP4Clip, with CLIP's text tower tuned as well."""
    tower = f"clip4clip:{path}"
    return ["--modality=video", f"--encoder-tower={tower}", "--encoder-pretrained=own", f"--text-tower={tower}",
            "--tuning=full", "--tune-text", "--init-temperature=0", "--context-length=32", "--lr=1e-3",
            "--coef-lr=1e-1", f"--train-data={shards}", "--caption-source=raw", "--batch-size=4", "--workers=0",
            "--precision=fp32", "--warmup=1", f"--logs={logs}", "--log-every-n-steps=1", *more]  # fmt: skip


def test_a_checkpoint_trains_on_with_its_text_tower(file, shards, videos, tmp_path, capfd):
    path = file[1]
    train(flags(shards, tmp_path, path, "--name=whole", "--save-every-n-steps=1"))
    assert "text features: encoded at each step, because the text tower trains" in capfd.readouterr().err
    saved, before = checkpoint(tmp_path, "whole", 2)["model"], load(f"clip4clip:{path}").encoders["video"][0]
    state = before.state_dict()
    assert saved.keys() == state.keys()
    unused = ("position_ids", "lstm.bias")
    same = [key for key, x in saved.items() if torch.equal(x, state[key]) and not key.endswith(unused)]
    assert not [key for key in same if "embedding" not in key]
    resume = f"--resume={tmp_path / 'whole/checkpoints/step_00000001.pt'}"
    train(["--config", str(tmp_path / "whole/config.yaml"), resume, "--name=rest"])
    assert all(torch.equal(x, saved[key]) for key, x in checkpoint(tmp_path, "rest", 2)["model"].items())
    export([f"--checkpoint={tmp_path / 'whole'}", f"--output={tmp_path / 'out'}"])
    run = load({"video": tmp_path / "whole"})
    for key, value in run.encoders["video"][0].state_dict().items():
        assert torch.equal(value, saved[key])
    assert torch.equal(load(tmp_path / "out").encode(text=["a dog"]), run.encode(text=["a dog"]))
    assert run.encode(video=[videos / "0.mp4"]).shape == (1, WIDTH)
    begin = flags(shards, tmp_path, path, f"--encoder-pretrained={tmp_path / 'whole/checkpoints/step_00000002.pt'}")
    state = model_of(begin).state_dict()
    assert all(torch.equal(x, state[key]) for key, x in saved.items())
    with pytest.raises(UserError, match=r"step_00000002.pt was trained with --tune-text; add it, or --text-pretrained"):
        model_of([*begin, "--no-tune-text"])
    if any("temporal_head" in key for key in saved):
        with pytest.raises(UserError, match=r"do not fit the temporal head \(--temporal-head None\)"):
            model_of([*begin, "--temporal-head=None", "--frames-per-second=0"])


def model_of(argv):
    config = parse_args(argv)
    return build_model(config.model, config.inputs.input_shape)


def test_accumulated_and_distributed_batches_have_the_same_gradients(shards, videos, tmp_path):
    path = tmp_path / "pytorch_model.bin.0"
    write_clip4clip(path, "seqTransf")
    more = ["--batch-size=8", "--shuffle-buffer=0", "--warmup=0"]
    train(flags(shards, tmp_path, path, *more, "--name=large"))
    train(flags(shards, tmp_path, path, *more, "--batch-size=2", "--accum-freq=4", "--name=parts"))
    large = checkpoint(tmp_path, "large", 1)["optimizer"]
    for name, engine in ENGINES.items():
        ranks = ["--batch-size=4", *engine, f"--name={name}", f"--val-config={videos / 'films.yaml'}"]
        call_ranks(2, "-m", "training.main", *flags(shards, tmp_path, path, *more, *ranks))
        assert "films/text_to_modality/R@1" in metrics(tmp_path, name)[-1]
    for name in ("parts", *ENGINES):
        other = checkpoint(tmp_path, name, 1)["optimizer"]
        assert other.keys() == large.keys()
        for key, value in large.items():
            torch.testing.assert_close(other[key]["exp_avg"], value["exp_avg"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("head", HEADS.values())
def test_a_new_head_under_a_frozen_text_tower(head, shards, videos, tmp_path):
    sizes = ["--patch-size=16", "--width=64", "--depth=2", "--num-heads=1", "--mlp-dim=64", "--image-size=32"]
    more = [*sizes, f"--temporal-head={head}", "--num-frames=3", "--frames-per-second=1", f"--text-tower={MINILM}"]
    own = ["--modality=video", "--encoder-pretrained=none", f"--train-data={shards}", "--caption-source=raw",
           "--batch-size=4", "--workers=0", "--precision=fp32", "--warmup=1", f"--logs={tmp_path}", "--name=run",
           "--log-every-n-steps=1", *more]  # fmt: skip
    train(own)
    assert not any(key.startswith("text") for key in checkpoint(tmp_path, "run", 2)["model"])
    found = load(tmp_path / "run", num_frames=5)
    assert found.encoders["video"][1].num_frames == 5
    assert found.encode(video=[videos / "0.mp4"]).shape == (1, 384)
    assert len(losses(tmp_path, "run")) == 2


def test_the_head_learns_at_its_own_rate_and_starts_from_the_text_tower(tmp_path):
    write_clip4clip(tmp_path / "model.bin", "meanP")
    tower = f"clip4clip:{tmp_path / 'model.bin'}"
    config = parse_args(["--modality=video", f"--encoder-tower={tower}", "--encoder-pretrained=own", "--tune-text",
                         f"--text-tower={tower}", "--temporal-head=transformer", "--tuning=full", "--lr=1e-4",
                         "--coef-lr=1e-3"])  # fmt: skip
    model = build_model(config.model, config.inputs.input_shape)
    assert isinstance(model.temporal_head, TransformerHead)
    text = model.text_model
    assert torch.equal(model.temporal_head.positions.weight, text.embeddings["position_embedding"].weight)
    x, own = torch.randn(2, 6, WIDTH), text.encoder.layers[3]
    torch.testing.assert_close(model.temporal_head.layers[3](x), own(x)[0], atol=1e-5, rtol=0)
    apply_tuning(model, config.model.tuning)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert len(trained) == len(list(model.parameters()))
    names = {parameter: name.partition(".")[0] for name, parameter in trained.items()}
    rates = {
        (names[x], round(group["lr"], 12))
        for group in build_optimizer(trained, config.optim).param_groups
        for x in group["params"]
    }
    rest = ("vision_model", "visual_projection", "text_model", "text_projection", "logit_scale")
    assert rates == {("temporal_head", 1e-4), *((name, 1e-7) for name in rest)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"weight": torch.ones(1)}, "is not a checkpoint of CLIP4Clip"),
        (lambda state: state | {"clip.visual.conv2.weight": torch.ones(1)}, "trained with --linear_patch 3d"),
        (lambda state: state | {"lstm_visual.extra": torch.ones(1)}, "do not fit the temporal head"),
        (
            lambda state: {key: x for key, x in state.items() if "transformerClip" not in key},
            "unexpected:\n  positions.weight",
        ),
        (
            lambda state: {key: x for key, x in state.items() if "ln_final" not in key},
            "other.bin cannot be used: 'ln_fin",
        ),
        (
            lambda state: state | {"clip.visual.proj": torch.ones(64, 9)},
            "other.bin cannot be used: .* mismatch for visual",
        ),
        (
            lambda state: {key: x for key, x in state.items() if "resblocks.1.ln_2" not in key or "Clip" not in key},
            "missing",
        ),
    ],
)
def test_other_files_are_refused(change, message, tmp_path):
    write_clip4clip(tmp_path / "model.bin", "seqTransf")
    torch.save(change(torch.load(tmp_path / "model.bin")), tmp_path / "other.bin")
    with pytest.raises(UserError, match=message):
        load(f"clip4clip:{tmp_path / 'other.bin'}")
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        load("clip4clip:absent.bin")


def test_files_of_data_parallel_and_openais_sizes_load(tmp_path):
    clip, _ = write_clip4clip(tmp_path / "model.bin", "meanP")
    sizes = dict.fromkeys(("clip.input_resolution", "clip.context_length", "clip.vocab_size"), torch.tensor(32))
    state = torch.load(tmp_path / "model.bin") | sizes
    torch.save({f"module.{key}": x for key, x in state.items()}, tmp_path / "other.bin")
    found = load(f"clip4clip:{tmp_path / 'other.bin'}").encode(text=["a dog"])
    expected = clip.encode_text(get_tokenizer("ViT-B-32")(["a dog"]), normalize=True)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)


def test_what_cannot_be_is_refused(files, capsys):
    padded = ["--modality=video", "--frames-per-second=1", "--temporal-head=mean"]
    for wrong in (["--temporal-head=None"], ["--temporal-attention"], ["--image-mean", "0", "0", "0"]):
        with pytest.raises(UserError, match="--frames-per-second pads short clips, which needs a --temporal-head"):
            parse_args([*padded, *wrong])
    with pytest.raises(SystemExit):
        parse_args([*padded, "--frames-per-second=-1"])
    assert "frames_per_second should be a number of at least 0" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="takes at most 77 frames, not 80"):
        build_head("transformer", 64, 4, 80)


@pytest.mark.parametrize("name", ["msrvtt", "msvd", "lsmdc", "didemo", "activitynet"])
def test_the_configs_have_the_protocol(name):
    config = load_dataset_config(ROOT / "configs" / "eval" / f"{name}.yaml")
    protocol = clip4clip_protocol(config.clip4clip, config.clip, Video(num_frames=config.clip4clip["frames"]))
    assert protocol.reader.modality.frames_per_second == 1
    assert protocol.words == (64 if name in ("didemo", "activitynet") else 32)
