"""Between modalities, on shards of the sample world: the figures of brute force, fusions, and mistakes."""

import json

import numpy as np
import pytest
import torch
from eval_files import save
from helpers import call, retrieval_metrics
from torch.nn import functional as F

import languagebind
from languagebind import load
from languagebind.config import UserError
from languagebind.data.shards import ShardWriter
from languagebind.data.vidal import media_paths
from languagebind.eval import load_dataset_config
from languagebind.eval.data.pairing import load_pairs_config
from languagebind.eval.evaluate import evaluate as evaluate_one
from languagebind.eval.features import EncodeOptions
from languagebind.eval.pairs import evaluate_pairs, main
from languagebind.eval.score.metrics import classification_metrics, modality_gap
from languagebind.fusion import fuse
from languagebind.modalities.depth import Depth
from languagebind.modalities.infrared import Infrared

COUNT = 14
MODALITIES = ("depth", "infrared")
OPTIONS = EncodeOptions(workers=0)
CLASSES = "class_names: {near: a near thing, far: a far thing, gone: nothing}\n"
RETRIEVAL = "query: depth\ngallery: infrared\ndata: {depth: both.tar, infrared: both.tar}\n"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Middle frames of scenes: in one shard, in two by modality and in another order, and as files with manifests."""
    root = tmp_path_factory.mktemp("scenes")
    call("-m", "languagebind.data.world", f"--output={root}", "--num-train=2", f"--num-test={COUNT}",
         "--modalities", "depth", "infrared", "--workers=1")  # fmt: skip
    annotation = json.loads((root / "test" / "vidal.json").read_text())
    samples = {}
    for number, (key, entry) in enumerate(annotation.items()):
        files = {name: media_paths(root / "test", key, entry["folder"], name)[0][4] for name in MODALITIES}
        captions = {"ofa": entry["ofa"][:2], "mplug": entry["mplug"][:1]}
        samples[key] = files, {"captions": captions, "label": ("near", "far")[number % 2]}
    write(root / "both.tar", samples)
    write(root / "depth.tar", samples, ("depth",))
    write(root / "infrared.tar", dict(reversed(samples.items())), ("infrared",))
    for name in MODALITIES:
        rows = [{"path": str(files[name]), "id": key, **record} for key, (files, record) in samples.items()]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / f"{name}_folder").mkdir()
        for key, (files, _) in samples.items():
            (root / f"{name}_folder" / f"{key}{files[name].suffix}").symlink_to(files[name])
    return root, samples


def write(path, samples, names=MODALITIES):
    extensions = {"depth": "depth.png", "infrared": "infrared.jpg"}
    with ShardWriter(path) as writer:
        for key, (files, record) in samples.items():
            writer.add(key, {extensions[name]: files[name].read_bytes() for name in names}, record)


@pytest.fixture(scope="module")
def checkpoints(clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    modalities = {"depth": Depth(image_size=32), "infrared": Infrared(image_size=32)}
    return {name: save(folder, modality, clip_folder, seed) for seed, (name, modality) in enumerate(modalities.items())}


@pytest.fixture(scope="module")
def encoders(checkpoints):
    return load(checkpoints)


@pytest.fixture(scope="module")
def features(scenes, encoders):
    """What `encode` gives for the files, one (N, D) a modality, and the mean of each sample's OFA captions."""
    _, samples = scenes
    found = {name: encoders.encode(**{name: [files[name] for files, _ in samples.values()]}) for name in MODALITIES}
    texts = [encoders.encode(text=record["captions"]["ofa"]).mean(dim=0) for _, record in samples.values()]
    return found | {"text": F.normalize(torch.stack(texts), dim=-1)}


def evaluate(scenes, encoders, tmp_path, text, skip_bad=False):
    (tmp_path / "a.yaml").write_text(text)
    config = load_pairs_config(tmp_path / "a.yaml", scenes[0])
    return evaluate_pairs(encoders, config, EncodeOptions(workers=0, skip_bad=skip_bad))


def test_captions_that_are_not_text_are_counted(scenes, encoders, tmp_path):
    root, samples = scenes
    rows = [{"path": str(files["depth"]), "id": key, "captions": [*record["captions"]["ofa"], "half a \ud83d"]}
            for key, (files, record) in samples.items()]  # fmt: skip
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"query: text\ngallery: depth\ndata: {{text: {tmp_path}/texts.jsonl, depth: {root}/depth.jsonl}}\n"
    assert evaluate(scenes, encoders, tmp_path, text)["protocol"]["bad_captions"] == len(samples)


def both_ways(query, gallery):
    right = torch.eye(len(query), dtype=torch.bool)
    ways = {"query_to_gallery": query @ gallery.T, "gallery_to_query": gallery @ query.T}
    return {
        f"{way}/{key}": value for way, scores in ways.items() for key, value in retrieval_metrics(scores, right).items()
    }


def gap(query, gallery, right=None):
    """Of unit-norm features, from the matrices of all cosines."""
    query, gallery = (F.normalize(x.double(), dim=-1).numpy() for x in (query, gallery))
    cosines = query @ gallery.T
    places = enumerate(range(len(query)) if right is None else right)
    within = [(x @ x.T)[~np.eye(len(x), dtype=bool)].mean() for x in (query, gallery)]
    distance = np.sqrt(((query.mean(axis=0) - gallery.mean(axis=0)) ** 2).sum())
    expected = {
        "distance": distance,
        "matched": np.mean([cosines[place] for place in places]),
        "across": cosines.mean(),
    }
    return pytest.approx(expected | {"within_query": within[0], "within_gallery": within[1]}, abs=1e-5)


def test_the_gap_of_cones_by_hand():
    query = torch.tensor([[0.6, 0.8, 0.0], [0.6, -0.8, 0.0]])
    item = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert modality_gap(query, item, torch.tensor([1, 1])) == pytest.approx(
        {
            "distance": (0.1**2 + 0.5**2) ** 0.5,
            "matched": 0.6,
            "across": 0.3,
            "within_query": -0.28,
            "within_gallery": 0,
        }
    )
    single = modality_gap(query, item[:1], torch.tensor([0, 0]))
    assert (single["matched"], single["within_gallery"]) == (0, None)


@pytest.mark.parametrize(
    "data", ["depth: both.tar, infrared: both.tar", "depth: depth.tar, infrared: infrared.tar",
             "depth: depth.jsonl, infrared: infrared.tar", "depth: depth_folder, infrared: infrared_folder"]
)  # fmt: skip
def test_retrieval_matches_brute_force_wherever_the_samples_lie(scenes, encoders, features, tmp_path, data):
    text = f"query: depth\ngallery: infrared\ndata: {{{data}}}\n"
    result = evaluate(scenes, encoders, tmp_path, text)
    expected = both_ways(features["depth"], features["infrared"])
    assert result["metrics"] == pytest.approx(expected)
    assert result["gap"] == gap(features["depth"], features["infrared"])
    assert result["intervals"].keys() == expected.keys()
    assert {key for key in expected if "R@" in key} == result["protocol"]["chance"].keys()
    assert result["protocol"]["chance"]["gallery_to_query/R@5"] == pytest.approx(5 / COUNT)
    assert dict(result["curves"]["query_to_gallery"])[5] == result["metrics"]["query_to_gallery/R@5"]
    assert (result["protocol"]["query"], result["protocol"]["gallery"]) == ({"depth": 1.0}, {"infrared": 1.0})
    assert (result["protocol"]["samples"], result["protocol"]["skipped_samples"]) == (COUNT, 0)
    keys = list(scenes[1])
    scores = features["depth"] @ features["infrared"].T
    for example in result["examples"]["worst"]:
        i = keys.index(example["text"])
        others = scores[i].clone()
        others[i] = -1
        assert keys[int(others.argmax())] in example["found"]
    if "both.tar" in data:
        again = load_pairs_config(tmp_path / "a.yaml", scenes[0])
        assert evaluate_pairs(encoders, again, EncodeOptions(workers=2)) == result, "the same bits"


def test_a_result_says_which_pairs_were_trained(scenes, checkpoints, tmp_path):
    saved = torch.load(checkpoints["infrared"], weights_only=True)
    query = "query: {depth: 1, text: 0.1}\ngallery: infrared\ncaption_source: ofa\n"
    query += "data: {depth: both.tar, infrared: both.tar, text: both.tar}\n"
    for weight, known in ((0.0, "emergent"), (0.5, "trained")):
        record = {"modality": "depth", "fingerprint": "f" * 64, "weight": weight}
        torch.save(saved | {"partner": record}, tmp_path / "infrared.pt")
        encoders = load(checkpoints["depth"], tmp_path / "infrared.pt")
        result = evaluate(scenes, encoders, tmp_path, query)
        assert result["protocol"]["pairs"] == {"depth and infrared": known, "text and infrared": "trained"}
        (tmp_path / f"{known}.json").write_text(json.dumps(result | {"pretrained": known}))
    classes = "task: classification\nquery: depth\ndata: {depth: depth.tar}\n" + CLASSES
    assert evaluate(scenes, load(checkpoints["depth"]), tmp_path, classes)["protocol"]["pairs"] == {
        "depth and text": "trained"
    }
    (tmp_path / "a.json").unlink(missing_ok=True)
    call("-m", "languagebind.eval.report", str(tmp_path), f"--output={tmp_path / 'page.html'}")
    page = (tmp_path / "page.html").read_text()
    assert "emergent: depth and infrared is an emergent pair, never trained on" in page
    assert "trained: depth and infrared were trained on together" in page
    assert page.index('depth and infrared <span class="trained">') < page.index('<span class="emergent">')


def test_a_fusion_is_the_weighted_sum(scenes, encoders, features, tmp_path):
    text = (
        "query: {depth: 1, text: -0.5}\ngallery: infrared\ncaption_source: ofa\n"
        "data: {depth: both.tar, infrared: both.tar, text: both.tar}\n"
    )
    result = evaluate(scenes, encoders, tmp_path, text)
    query = F.normalize(features["depth"] - 0.5 * features["text"], dim=-1)
    assert result["metrics"] == pytest.approx(both_ways(query, features["infrared"]))
    assert result["gap"] == gap(query, features["infrared"])
    assert result["metrics"] != pytest.approx(both_ways(features["depth"], features["infrared"]))
    assert result["protocol"]["query"] == {"depth": 1.0, "text": -0.5}
    assert result["protocol"]["caption_source"] == "ofa"
    with pytest.raises(UserError, match="choose one with caption_source"):
        evaluate(scenes, encoders, tmp_path, text.replace("caption_source: ofa\n", ""))


def test_classification_of_a_fusion(scenes, encoders, features, tmp_path):
    text = (
        "task: classification\nquery: {depth: 1, infrared: 2}\ndata: {depth: depth.tar, infrared: infrared.tar}\n"
        "templates: ['a {c}', 'the {c}']\n"
    )
    result = evaluate(scenes, encoders, tmp_path, text + CLASSES)
    names = ("a near thing", "a far thing", "nothing")
    texts = [encoders.encode(text=[f"a {name}", f"the {name}"]).mean(dim=0) for name in names]
    fused = F.normalize(features["depth"] + 2 * features["infrared"], dim=-1)
    labels = torch.arange(COUNT) % 2
    expected = classification_metrics(fused @ F.normalize(torch.stack(texts), dim=-1).T, labels)
    assert result["gap"] == gap(fused, torch.stack(texts), labels)
    assert result["metrics"] == pytest.approx(expected | {"chance": 1 / 3})
    assert 0 < result["metrics"]["top1"] < 1
    assert {"top1"} <= result["intervals"].keys() <= expected.keys()
    assert result["protocol"]["classes_with_samples"] == 2


def test_whose_labels_count_is_said_where_they_differ(scenes, encoders, tmp_path):
    root, samples = scenes
    flipped = {key: (files, record | {"label": "far"}) for key, (files, record) in samples.items()}
    write(tmp_path / "flipped.tar", flipped, ("infrared",))
    text = (
        f"task: classification\nquery: {{depth: 1, infrared: 1}}\ndata: {{depth: {root}/depth.tar,"
        f" infrared: {tmp_path}/flipped.tar}}\n"
    ) + CLASSES
    with pytest.raises(UserError, match=r"has the labels \('near',\) in depth, but \('far',\) in infrared; choose"):
        evaluate(scenes, encoders, tmp_path, text)
    counts = [
        {x["label"]: x["samples"] for x in evaluate(scenes, encoders, tmp_path, f"{text}labels: {name}\n")["classes"]}
        for name in MODALITIES
    ]
    assert counts == [{"near": 7, "far": 7, "gone": 0}, {"near": 0, "far": COUNT, "gone": 0}]


def test_samples_without_a_partner_stop_the_run_or_are_counted(scenes, encoders, features, tmp_path):
    root, samples = scenes
    keys = list(samples)
    cut = {key: samples[key] for key in keys[2:]}
    write(tmp_path / "cut.tar", cut, ("infrared",))
    picture = samples[keys[5]][0]["infrared"]
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(picture.read_bytes()[:200])
    text = f"query: depth\ngallery: infrared\ndata: {{depth: {root}/depth.tar, infrared: {tmp_path}/cut.tar}}\n"
    with pytest.raises(UserError, match=rf"(?s)2 of 14 samples lack a partner \(--skip-bad.*{keys[0]} has no infrared"):
        evaluate(scenes, encoders, tmp_path, text)
    result = evaluate(scenes, encoders, tmp_path, text, skip_bad=True)
    assert result["metrics"] == pytest.approx(both_ways(features["depth"][2:], features["infrared"][2:]))
    protocol = result["protocol"]
    assert (protocol["samples"], protocol["skipped_samples"], protocol["unpaired_samples"]) == (12, 2, 2)
    cut[keys[5]] = {"depth": picture, "infrared": damaged}, cut[keys[5]][1]
    write(tmp_path / "cut.tar", cut, ("infrared",))
    protocol = evaluate(scenes, encoders, tmp_path, text, skip_bad=True)["protocol"]
    assert (protocol["samples"], protocol["skipped_samples"], protocol["unpaired_samples"]) == (11, 3, 2)
    # Those of depth alone that are left have to stay in step.
    rows = [i for i in range(2, COUNT) if i != 5]
    found = evaluate(scenes, encoders, tmp_path, text, skip_bad=True)["metrics"]
    assert found == pytest.approx(both_ways(features["depth"][rows], features["infrared"][rows]))


def test_samples_that_no_two_modalities_can_read_stop_the_run(scenes, encoders, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\xff")
    pairs = list(scenes[1].items())[:2]
    samples = {
        key: (files | {name: broken}, record) for name, (key, (files, record)) in zip(MODALITIES, pairs, strict=True)
    }
    write(tmp_path / "both.tar", samples)
    text = RETRIEVAL.replace("both.tar", str(tmp_path / "both.tar"))
    with pytest.raises(UserError, match="no sample can be read in all of depth, infrared"):
        evaluate(scenes, encoders, tmp_path, text, skip_bad=True)


def test_data_that_does_not_go_together(scenes, encoders, tmp_path):
    root, samples = scenes
    other = {f"other_{key}": value for key, value in samples.items()}
    write(tmp_path / "other.tar", other, ("infrared",))
    text = f"query: depth\ngallery: infrared\ndata: {{depth: {root}/depth.tar, infrared: {tmp_path}/PLACE}}\n"
    with pytest.raises(UserError, match=r"depth, infrared have no key in common; .*Set `id` in the manifests"):
        evaluate(scenes, encoders, tmp_path, text.replace("PLACE", "other.tar"), skip_bad=True)
    (tmp_path / "twice").mkdir()
    write(tmp_path / "twice" / "0.tar", samples, ("infrared",))
    write(tmp_path / "twice" / "1.tar", samples, ("infrared",))
    with pytest.raises(UserError, match="have the same key, 'test"):
        evaluate(scenes, encoders, tmp_path, text.replace("PLACE", "twice"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RETRIEVAL + "galery: x\n", "unknown key 'galery', did you mean 'gallery'"),
        (RETRIEVAL.replace("depth: both.tar, ", ""), "data should name depth, infrared, but names infrared"),
        (RETRIEVAL.replace("gallery: infrared", "gallery: {infrared: 1, depth: 1}"), "depth is on both sides"),
        (RETRIEVAL.replace("query: depth", "query: {depth: 0}"), "query.depth should be from 0.001 to 1000"),
        (RETRIEVAL.replace("query: depth", "query: {depth: nan}"), "query.depth should be a finite number"),
        (RETRIEVAL.replace("query: depth", "query: {depth: much}"), "query.depth should be a number, not 'much'"),
        (RETRIEVAL.replace("query: depth", "query: [depth]"), "query should be `key: value` lines"),
        (RETRIEVAL + "metric: query_to_gallery/R1\n", "unknown metric .*did you mean 'query_to_gallery/R@1'"),
        (RETRIEVAL + "task: sorting\n", "task should be 'retrieval' or 'classification', not 'sorting'"),
        (RETRIEVAL + "task: classification\n", "retrieval needs a gallery, and classification has none"),
        (RETRIEVAL.replace("gallery: infrared\n", ""), "retrieval needs a gallery"),
        ("task: classification\nquery: depth\ndata: {depth: both.tar}\n", "classification needs class_names"),
        (RETRIEVAL + "labels: infrared\n", "labels is 'infrared', which is not in the query"),
        ("task: classification\nquery: text\ndata: {text: both.tar}\n" + CLASSES, "needs a modality besides text"),
        (RETRIEVAL.replace("infrared: both.tar", "infrared: none.tar"), "no such shard or folder|does not exist"),
        (RETRIEVAL.replace("infrared: both.tar", "infrared: none.jsonl"), "none.jsonl does not exist"),
        (RETRIEVAL.replace("infrared", "video"), "needs an encoder: --model video=CHECKPOINT"),
    ],
)
def test_mistakes_in_a_config(scenes, encoders, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        evaluate(scenes, encoders, tmp_path, text)


def test_command_line(scenes, checkpoints, encoders, tmp_path, capsys):
    (tmp_path / "pair.yaml").write_text(RETRIEVAL)
    models = ["--model", *(f"{name}={path}" for name, path in checkpoints.items())]
    rest = ["--config", str(tmp_path / "pair.yaml"), "--data-root", str(scenes[0]), "--workers=0", "--device=cpu",
            "--output", str(tmp_path / "results")]  # fmt: skip
    main([*models, *rest])
    assert "query_to_gallery/R@1" in capsys.readouterr().out
    (file,) = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text())
    assert file.name == "pair_depth+infrared.json"
    config = load_pairs_config(tmp_path / "pair.yaml", scenes[0])
    assert result["checkpoint"] == {name: str(path) for name, path in checkpoints.items()}
    assert {len(weights) for weights in result["weights_sha256"].values()} == {64}
    cached = EncodeOptions(workers=0, feature_cache=tmp_path / "cache")
    for _ in range(2):
        plain = evaluate_pairs(encoders, config, cached) | {"pretrained": "depth+infrared"}
        assert {key: result[key] for key in plain} == plain
    assert len(list(tmp_path.glob("cache/*/*.features"))) == 2, "one a modality, and none anew"
    call("-m", "languagebind.eval.report", str(tmp_path / "results"), f"--output={tmp_path / 'page.html'}")
    assert "depth+infrared, gallery to query" in (tmp_path / "page.html").read_text()
    for argv, message in (
        ([*models, *rest], "exists: --overwrite replaces it"),
        ([*models, *rest[2:]], "pass one --model MODALITY=CHECKPOINT"),
        (rest, "pass one --model MODALITY=CHECKPOINT"),
        (["--model", "depth", *rest], "pass one --model MODALITY=CHECKPOINT"),
        (["--model", f"infrared={checkpoints['depth']}", *rest, "--overwrite"], "is for depth, not infrared"),
    ):
        with pytest.raises(UserError, match=message):
            main(argv)
    assert call("-m", "languagebind.eval.pairs", *rest, status=2).startswith("error: pass one --model")


# ---------------------------------------------------------------------------------------------- text towers


@pytest.fixture(scope="module")
def own_text(checkpoints, clip_folder, tmp_path_factory):
    """The depth checkpoint, and one of infrared with another text tower."""
    root = tmp_path_factory.mktemp("own")
    tower = root / "tower"
    tower.mkdir()
    (tower / "open_clip_config.json").write_bytes((clip_folder / "open_clip_config.json").read_bytes())
    state = torch.load(clip_folder / "open_clip_pytorch_model.bin", weights_only=True)
    torch.manual_seed(1)
    state = {key: value + 0.2 * torch.randn(value.shape) for key, value in state.items()}
    torch.save(state, tower / "open_clip_pytorch_model.bin")
    return {"depth": checkpoints["depth"], "infrared": save(root, Infrared(image_size=32), tower, 1)}


@pytest.fixture(scope="module")
def separate(scenes, own_text):
    """What each model gives alone for its files, its texts of the samples (N, D), and its class prompts (K, D)."""
    found = {}
    for name, path in own_text.items():
        model, samples = load(path), scenes[1].values()
        texts = [model.encode(text=record["captions"]["ofa"]).mean(dim=0) for _, record in samples]
        names = ("near thing", "far thing", "nothing")
        prompts = [model.encode(text=[f"a {thing}", f"the {thing}"]).mean(dim=0) for thing in names]
        files = model.encode(**{name: [files[name] for files, _ in samples]})
        found[name] = [files, *(F.normalize(torch.stack(x), dim=-1) for x in (texts, prompts))]
    return found


def test_texts_are_those_of_the_modality_that_they_are_compared_with(scenes, own_text, separate, tmp_path):
    encoders = load(own_text)
    (depth, depth_text, depth_classes), (heat, heat_text, heat_classes) = separate.values()
    assert (depth_text - heat_text).abs().max() > 0.1
    data = "caption_source: ofa\ndata: {depth: both.tar, infrared: both.tar, text: both.tar}\n"
    for sides, query, gallery in (
        ("query: text\ngallery: {depth: 2, infrared: 1}\n", torch.cat([depth_text, heat_text], 1),
         torch.cat([2 * depth, heat], 1)),
        ("query: {infrared: 1, depth: 3}\ngallery: text\n", torch.cat([heat, 3 * depth], 1),
         torch.cat([heat_text, depth_text], 1)),
        ("query: {depth: 1, text: 0.5}\ngallery: infrared\n", F.normalize(depth + 0.5 * heat_text, dim=-1), heat),
        ("query: depth\ngallery: {infrared: 1, text: -2}\n", depth, F.normalize(heat - 2 * depth_text, dim=-1)),
    ):  # fmt: skip
        result = evaluate(scenes, encoders, tmp_path, sides + data)
        assert result["metrics"] == pytest.approx(both_ways(query, gallery)), sides
        assert result["gap"] == gap(query, gallery), sides
        prints = {name: model.text_fingerprint() for name, (model, _) in encoders.encoders.items()}
        assert result["protocol"]["text_fingerprint"] == prints
    for name in MODALITIES:
        alone = f"caption_source: ofa\ndata: {{{name}: both.tar, text: both.tar}}\n"
        result = evaluate(scenes, encoders, tmp_path, f"query: text\ngallery: {name}\n{alone}")
        assert result["metrics"] == pytest.approx(both_ways(separate[name][1], separate[name][0]))
        assert result["protocol"]["text_fingerprint"] == encoders.encoders[name][0].text_fingerprint()
    result = evaluate(scenes, encoders, tmp_path, RETRIEVAL)
    assert result["metrics"] == pytest.approx(both_ways(depth, heat)), "without texts, features are compared directly"
    text = CLASSES.replace("a near", "near").replace("a far", "far") + "templates: ['a {c}', 'the {c}']\n"
    fused = "task: classification\nquery: {depth: 1, infrared: 2}\ndata: {depth: both.tar, infrared: both.tar}\n"
    scores = depth @ depth_classes.T + 2 * heat @ heat_classes.T
    result = evaluate(scenes, encoders, tmp_path, fused + text)
    expected = classification_metrics(scores, torch.arange(COUNT) % 2)
    assert result["metrics"] == pytest.approx(expected | {"chance": 1 / 3})
    alone = "task: classification\nquery: infrared\ndata: {infrared: both.tar}\n"
    scores, result = heat @ heat_classes.T, evaluate(scenes, encoders, tmp_path, alone + text)
    assert result["metrics"] == pytest.approx(
        classification_metrics(scores, torch.arange(COUNT) % 2) | {"chance": 1 / 3}
    )


def test_the_command_caches_texts_by_their_tower(scenes, own_text, separate, tmp_path):
    (tmp_path / "pair.yaml").write_text(
        "query: text\ngallery: {depth: 1, infrared: 1}\ncaption_source: ofa\n"
        "data: {depth: both.tar, infrared: both.tar, text: both.tar}\n"
    )
    (depth, depth_text, _), (heat, heat_text, _) = separate.values()
    expected = both_ways(torch.cat([depth_text, heat_text], 1), torch.cat([depth, heat], 1))
    for place in ("first", "again"):
        main(["--model", *(f"{name}={path}" for name, path in own_text.items()), "--config",
              str(tmp_path / "pair.yaml"), "--data-root", str(scenes[0]), "--output", str(tmp_path / place),
              "--workers=0", "--device=cpu", f"--feature-cache={tmp_path / 'cache'}"])  # fmt: skip
        (file,) = (tmp_path / place).glob("*.json")
        assert json.loads(file.read_text())["metrics"] == pytest.approx(expected)
    assert len(list(tmp_path.glob("cache/*/*.features"))) == 4, "files and texts of each model, and none anew"


def test_one_model_is_evaluated_with_its_own_text_tower(scenes, own_text, separate, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"task: classification\ndata: {scenes[0] / 'both.tar'}\ntemplates: ['a {{c}}', 'the {{c}}']\n"
        + CLASSES.replace("a near", "near").replace("a far", "far")
    )
    encoders = load(own_text)
    for name, (features, _, classes) in separate.items():
        result = evaluate_one(*encoders.encoders[name], load_dataset_config(tmp_path / "a.yaml"), workers=0)
        assert (
            result["metrics"]["top1"] == classification_metrics(features @ classes.T, torch.arange(COUNT) % 2)["top1"]
        )


def test_features_of_two_sizes_are_not_compared(scenes, checkpoints, toys, tmp_path):
    config = languagebind.LanguageBindThermalConfig.from_pretrained(toys / "thermal", projection_dim=24)
    languagebind.LanguageBindThermal(config).save_pretrained(tmp_path / "wide")
    encoders = load({"depth": checkpoints["depth"], "infrared": tmp_path / "wide"})
    with pytest.raises(UserError, match="features of 16 and 24 dimensions cannot be compared"):
        evaluate(scenes, encoders, tmp_path, RETRIEVAL)
    data = "caption_source: ofa\ndata: {depth: both.tar, infrared: both.tar, text: both.tar}\n"
    both = evaluate(scenes, encoders, tmp_path, "query: text\ngallery: {depth: 1, infrared: 1}\n" + data)
    assert both["protocol"]["samples"] == COUNT, "each is compared with the texts of its own tower"


# ---------------------------------------------------------------------------------------------- arithmetic


def test_fuse_adds_directions_not_lengths():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(5, 8))).float() for _ in range(2))
    units = [x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (a, b)]
    for weights in ((1, 1), (2, -0.5), (-1, 3)):
        total = weights[0] * units[0] + weights[1] * units[1]
        expected = total / np.linalg.norm(total, axis=1, keepdims=True)
        found = fuse({"a": a, "b": 7 * b, "unused": b}, dict(zip("ab", weights, strict=True)))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert fuse({"a": a.half()}, {"a": 1}).dtype == torch.float32


@pytest.mark.parametrize(
    ("features", "weights", "message"),
    [
        (
            {"a": torch.ones(2, 3), "b": 2 * torch.ones(2, 3)},
            {"a": 1, "b": -1},
            "a and b cancel out; the first such row is 0",
        ),
        ({"a": torch.ones(2, 3), "b": torch.ones(3, 3)}, {"a": 1, "b": 1}, "different shapes"),
        ({"a": torch.ones(2, 3)}, {"b": 1}, r"finite, non-zero numbers for some of \['a'\], got {'b': 1}"),
        ({"a": torch.ones(2, 3)}, {"a": float("nan")}, "non-zero .* {'a': nan}"),
        ({"a": torch.ones(2, 3)}, {"a": 0}, "non-zero"),
        ({"a": torch.ones(2, 3)}, {}, "weights should be"),
    ],
)
def test_what_cannot_be_fused(features, weights, message):
    with pytest.raises(ValueError, match=message):
        fuse(features, weights)
