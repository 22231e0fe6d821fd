"""Captions and polish: by a server that misbehaves, by `transformers serve`, and by models in this process."""

import json
import random
import shutil
import tarfile
import time
import urllib.request
from collections import Counter

import numpy as np
import pytest
import torch
from chat_server import Server, answer_to, content_of, level, says, serving
from generating import RUNNERS, disk, end_step, kill_step, report
from helpers import free_port, start, wait_for
from PIL import Image

from languagebind.config import UserError
from languagebind.data.making import main as make_shards
from languagebind.data.vidal import read_annotation
from languagebind.generate.__main__ import main
from languagebind.generate.chat import ChatOptions, ask
from languagebind.generate.steps import Unmade

PROMPTS = ChatOptions(model="m").prompts
FRAMES = "clips_resize256_skip15/clip{}_resize256_folder"


def clip_of(body):
    """The number of the entry whose clip a request is about, or None."""
    return (level(content_of(body)[0]) - 20) // 10 if len(content_of(body)) == 9 else None


def write_frames(root, entries):
    """VIDAL's layout with frames alone: frame k of entry i has grey 10 (i % 10 + k) + 20. Return a step's flags."""
    annotation = {}
    for i in range(entries):
        folder = root / FRAMES.format(i)
        folder.mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (32 + i, 32), (10 * (i % 10 + k) + 20,) * 3).save(folder / f"{k}.jpg", quality=95)
        annotation[f"clip{i}"] = {"folder": "clips", "raw": f"Ball No. {i}! #shorts #red"}
    (root / "vidal.json").write_text(json.dumps(annotation))
    return flags_of(root)


def flags_of(root):
    return [f"--annotation={root / 'vidal.json'}", f"--root={root}", "--max-bad-share=1"]


def levels(i):
    return [10 * (i + k) + 20 for k in range(8)]


def fields(root):
    return dict(read_annotation(root / "vidal.json"))


def counts(root, step):
    """The numbers of a report: made, failed, and failed for each reason."""
    found = report(root, step)
    assert found["there before"] == found["entries"] - found["made"] - found["failed"]
    return found["made"], found["failed"], {reason: each["count"] for reason, each in found["failures"].items()}


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """What a server that refuses one request in five has written, captions and then polish, and the server."""
    root = tmp_path_factory.mktemp("busy")
    faults = [(429, {"Retry-After": "0.1"}, b"slower"), (500, {}, b"<html>oops")]
    server = Server(lambda body, number: faults[number // 5 % 2] if number % 5 == 0 else None)
    flags = write_frames(root, 6)
    with serving(server) as where:
        for step in ("captions", "polish"):
            main([step, *flags, *where, "--workers=0", "--concurrency=4", "--batch-size=4"])
    return root, server


def test_captions_are_of_their_own_pictures(busy):
    root, server = busy
    for i, entry in enumerate(fields(root).values()):
        assert entry["ofa"] == [f"Grey of {value}" for value in levels(i)]
        assert entry["mplug"] == "Grey of " + ", ".join(map(str, levels(i)))
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("m", 0.0, 0, 128)
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
    asked = {content[-1]["text"] for content in map(content_of, server.bodies) if isinstance(content, list)}
    assert asked == {(PROMPTS / f"{field}.txt").read_text().strip() for field in ("ofa", "mplug")}
    record = json.loads((root / "generate/captions/record.json").read_bytes())
    assert (record["model"], len(record["prompt ofa"])) == ("m", 64)
    assert "127.0.0.1" not in json.dumps(record)


def test_requests_that_a_busy_server_refuses_are_sent_again(busy):
    root, server = busy
    refused = len(server.bodies) // 5
    assert len(server.bodies) - refused == 6 * 9 + 6 * 2, "each question has one answer"
    assert len({json.dumps(body["messages"]) for body in server.bodies}) == len(server.bodies) - refused
    assert counts(root, "captions") == counts(root, "polish") == (6, 0, {})
    assert 1 < server.most <= 4


def test_polish_reads_title_and_captions(busy):
    root, server = busy
    entry = fields(root)["clip2"]
    texts = {text for text in map(content_of, server.bodies) if isinstance(text, str) and "ball no. 2!, red" in text}
    assert sorted("heard" in text for text in texts) == [False, True]
    for text in texts:
        assert "\n".join(f"Grey of {value}" for value in levels(2)) in text
        assert entry["mplug"] in text
    assert entry["polish_mplug"] != entry["sound_mplug"]


def test_a_second_run_asks_for_what_is_missing_alone(busy, tmp_path):
    shutil.copytree(busy[0], tmp_path, dirs_exist_ok=True)
    before = fields(tmp_path)
    damaged = json.loads(json.dumps(before))
    del damaged["clip1"]["mplug"], damaged["clip3"]["ofa"], damaged["clip4"]["sound_mplug"]
    (tmp_path / "vidal.json").write_text(json.dumps(damaged))
    with serving(server := Server()) as where:
        for step, asked in (("captions", 1 + 8), ("polish", 9 + 1)):
            main([step, *flags_of(tmp_path), *where, "--workers=0"])
            assert len(server.bodies) == asked
    assert fields(tmp_path) == before


def test_the_result_packs(busy, tmp_path):
    root, *_ = busy
    make_shards(["vidal", f"--annotation={root / 'vidal.json'}", f"--root={root}", "--modality=video", "--frames=8",
                 f"--output={tmp_path}", "--workers=1"])  # fmt: skip
    with tarfile.open(next(tmp_path.glob("*.tar"))) as tar:
        captions = [json.load(tar.extractfile(name))["captions"] for name in tar.getnames() if name.endswith(".json")]
    known = {"raw", "ofa", "mplug", "polish_mplug", "sound_mplug"}
    assert captions == [{k: entry[k] for k in known} for entry in fields(root).values()]


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_answers_that_cannot_be_used_are_asked_for_again_and_counted(tmp_path):
    flags = [*write_frames(tmp_path, 7), "--workers=0"]
    bad = {
        0: says(" \n"), 1: says("I'm sorry, but I can't help with that."), 2: says(None),
        3: says("A red ball that", reason="length"), 4: (400, {}, b'{"error": {"message": "picture too large"}}'),
        5: (200, {"Content-Type": "text/html"}, b"<html>welcome"),
    }  # fmt: skip
    with serving(server := Server(lambda body, _: bad.get(clip_of(body)))) as where:
        main(["captions", *flags, *where])
    assert counts(tmp_path, "captions") == (1, 6, {"empty answer": 2, "refusal": 1, "too long": 1, "no answer": 2})
    assert [key for key, entry in fields(tmp_path).items() if "ofa" in entry or "mplug" in entry] == ["clip6"]
    asked = [(i, body["seed"], body["temperature"]) for body in server.bodies if (i := clip_of(body)) is not None]
    drawn = [(i, seed, 0.7 if seed else 0.0) for i in range(4) for seed in range(3)]
    assert sorted(asked) == [*drawn, (4, 0, 0.0), (5, 0, 0.0), (6, 0, 0.0)]
    with serving(server := Server()) as where:  # a new address, and a model in a better mood
        main(["captions", *flags, *where])
    assert len(server.bodies) == 6 * 9
    assert counts(tmp_path, "captions") == (6, 0, {})


def test_a_server_that_hangs_or_is_down_costs_those_entries_alone(tmp_path):
    flags, hung = [*write_frames(tmp_path, 4), "--workers=0"], []

    def fault(body, _):
        clip = clip_of(body)
        if clip == 1 or (clip == 2 and clip not in hung):  # forever, and once
            hung.append(clip)
            time.sleep(1.5)
        return (503, {}, b"{}") if clip == 3 else None

    with serving(server := Server(fault)) as where:
        main(["captions", *flags, *where, "--timeout=1", "--tries=2"])
    assert counts(tmp_path, "captions") == (2, 2, {"no answer": 2})
    assert Counter(map(clip_of, server.bodies)) == {None: 4 * 8, 0: 1, 1: 2, 2: 2, 3: 2}
    assert [key for key, entry in fields(tmp_path).items() if "mplug" in entry] == ["clip0", "clip2"]


def test_a_server_that_is_away_stops_the_step(tmp_path):
    flags = [*write_frames(tmp_path, 2), "--api-model=m", "--tries=2", "--workers=0"]
    with pytest.raises(UserError, match=r"cannot use --endpoint \(Connection error.\): check it, --api-model and "):
        main(["captions", *flags, f"--endpoint=http://127.0.0.1:{free_port()}/v1"])
    unknown = Server(lambda body, _: (404, {}, b'{"message": "no model m"}'))
    with serving(unknown) as where, pytest.raises(UserError, match=r"cannot use --endpoint \(.*no model m.*: check it"):
        main(["captions", *flags, *where])
    assert not any("ofa" in entry for entry in fields(tmp_path).values())


def test_the_key_is_sent_and_kept_nowhere(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", key := "sk-very-secret")
    flags = [*write_frames(tmp_path, 2), "--workers=0"]
    echo = json.dumps({"error": {"message": f"bad request of {key}"}}).encode()
    with serving(server := Server(lambda body, _: (400, {}, echo) if clip_of(body) == 1 else None)) as where:
        main(["captions", *flags, *where])
    assert server.keys == {f"Bearer {key}"}
    assert "bad request of [key]" in (tmp_path / "generate/captions/report.json").read_text()
    with serving(Server(lambda body, _: (401, {}, echo))) as where, pytest.raises(UserError) as error:
        main(["captions", *flags, *where])
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(key.encode() in data for data in kept)
    assert key not in str(error.value) + "".join(capfd.readouterr())


def test_requests_per_minute(tmp_path):
    with serving(server := Server()) as where:
        main(["captions", *write_frames(tmp_path, 1), *where, "--requests-per-minute=1200", "--workers=0"])
    gaps = np.diff(server.times)
    assert len(gaps) == 8
    assert np.median(gaps) > 0.04, "50 ms, but for the jitter of a busy machine"


def test_entries_without_frames_or_captions_are_counted(tmp_path):
    flags = [*write_frames(tmp_path, 3), "--workers=0"]
    shutil.rmtree(tmp_path / FRAMES.format(0))
    (tmp_path / FRAMES.format(1) / "5.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    with serving(server := Server()) as where:
        for step in ("captions", "polish"):
            main([step, *flags, *where])
    assert counts(tmp_path, "captions") == (1, 2, {"no readable frames": 2})
    assert counts(tmp_path, "polish") == (1, 2, {"no captions": 2})
    assert len(server.bodies) == 9 + 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "pass --endpoint URL and --api-model NAME, or --model NAME alone"),
        (["--endpoint=http://x/v1"], "pass --endpoint URL and --api-model NAME"),
        (["--endpoint=http://x/v1", "--api-model=m", "--model=n"], "or --model NAME alone"),
        (["--model=/nowhere/at/all"], "/nowhere/at/all"),
        (["--endpoint=http://x/v1", "--api-model=m", "--prompts=/none"], "there is no prompt /none/polish_mplug.txt"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        main(["polish", *write_frames(tmp_path, 1), *flags])
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in printed + str(error.value)


def test_own_prompts(tmp_path):
    flags = [*write_frames(tmp_path, 1), f"--prompts={tmp_path}", "--workers=0"]
    (tmp_path / "ofa.txt").write_text("What is it? It costs $5.\n")
    (tmp_path / "mplug.txt").write_text("Which $title?")
    with serving(server := Server()) as where:
        with pytest.raises(UserError, match=r"mplug.txt: captions cannot fill in \$title"):
            main(["captions", *flags, *where, "--thinking"])
        (tmp_path / "mplug.txt").write_text("What happens?")
        main(["captions", *flags, *where, "--thinking"])
        texts = Counter(content_of(body)[-1]["text"] for body in server.bodies)
        assert texts == {"What is it? It costs $5.": 8, "What happens?": 1}
        assert not any("chat_template_kwargs" in body for body in server.bodies)
        (tmp_path / "ofa.txt").write_text("What else?")
        with pytest.raises(UserError, match="captions was made with prompt ofa"):
            main(["captions", *flags, *where, "--thinking"])


GOOD = {
    '<think>so\n"hm"</think> "A  ball."': "A ball.",
    'He says "no" and "yes"': 'He says "no" and "yes"',
    "I can see a sorry dog that cannot help itself.": "I can see a sorry dog that cannot help itself.",
    "Unable to stand, a foal falls.": "Unable to stand, a foal falls.",
}
BAD = {
    "I cannot clearly see the picture.": "refusal",
    "I'm sorry, but no.": "refusal",
    "As an AI language model, I": "refusal",
    "<think>A ball?</think>": "empty answer",
    "word " * 500: "too long",
}


@pytest.mark.parametrize("answer", [*GOOD, *BAD])
def test_a_better_second_answer_is_taken(answer):
    asked = []

    def model(chat, seed, temperature):
        asked.append((seed, temperature))
        return ("N/A" if seed == 0 else answer), False

    if answer in GOOD:
        assert ask(model, "What?") == GOOD[answer]
    else:
        with pytest.raises(Unmade, match=BAD[answer]):
            ask(model, "What?")
    assert asked == [(0, 0.0), (1, 0.7), (2, 0.7)][: 2 if answer in GOOD else 3]


# -------------------------------------------------------------------------------------- models with random weights

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
WORDS = [*SPECIAL, "user", "assistant", "a", "ball", "box", "red", "blue", "rolls", "falls"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endif %}{% endfor %} assistant "
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A LLaVA and a Llama with random weights, which end after a few words."""
    import transformers as hf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    root = tmp_path_factory.mktemp("models")
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    text = hf.LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=4096, **sizes, **ids)
    vision = hf.CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **sizes)
    seeing = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4, **ids)
    torch.manual_seed(3)
    for model, name in ((hf.LlamaForCausalLM(text), "llama"), (hf.LlavaForConditionalGeneration(seeing), "llava")):
        with torch.no_grad():
            model.get_output_embeddings().weight[:5] *= 0.01  # special words are not said
        model.generation_config.update(exponential_decay_length_penalty=(3, 1e4), **ids)
        model.generation_config.do_sample = False
        model.save_pretrained(root / name)
    pictures = hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = hf.LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                                  num_additional_image_tokens=1, chat_template=TEMPLATE)  # fmt: skip
    processor.save_pretrained(root / "llava")
    tokenizer.save_pretrained(root / "llama")
    return root


def write_noise(root, entries):
    """As `write_frames`, of pictures that differ more."""
    flags, rng = write_frames(root, entries), np.random.default_rng(0)
    for path in sorted(root.rglob("*.jpg")):
        Image.fromarray(rng.integers(0, 255, (28, 28, 3), np.uint8)).save(path)
    return [*flags, "--workers=0"]


def test_models_in_this_process(models, tmp_path):
    from transformers import pipeline

    flags = write_noise(tmp_path, 2)
    with pytest.raises(UserError, match=r"--model .*llama does not read pictures"):
        main(["captions", *write_noise(tmp_path / "other", 1), f"--model={models / 'llama'}"])
    main(["captions", *flags, f"--model={models / 'llava'}"])
    main(["polish", *flags, f"--model={models / 'llama'}"])
    seeing = pipeline("image-text-to-text", str(models / "llava"), device="cpu")
    prompt = {"type": "text", "text": (PROMPTS / "ofa.txt").read_text().strip()}
    for i, entry in enumerate(fields(tmp_path).values()):
        for k, caption in enumerate(entry["ofa"]):
            picture = {"type": "image", "url": str(tmp_path / FRAMES.format(i) / f"{k}.jpg")}
            chat = [{"role": "user", "content": [picture, prompt]}]
            (answer,) = seeing(text=chat, max_new_tokens=128, return_full_text=False)
            assert caption == answer["generated_text"].strip()
        assert entry["polish_mplug"]
        assert entry["sound_mplug"]
    record = json.loads((tmp_path / "generate/captions/record.json").read_bytes())
    assert list(record["weights_sha256"]) == ["model.safetensors"]


@pytest.mark.slow
def test_transformers_serve_writes_what_the_model_writes_in_this_process(models, tmp_path):
    roots, port = [tmp_path / "a", tmp_path / "b"], free_port()
    serve = ["-m", "transformers.cli.transformers", "serve", str(models / "llava"), f"--port={port}", "--device=cpu"]
    process = start(*serve, fresh=True)
    try:

        def healthy():
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200
            except OSError:
                assert process.poll() is None, process.stdout.read()
                return False

        wait_for(healthy, 120)
        server = [f"--endpoint=http://127.0.0.1:{port}/v1", f"--api-model={models / 'llava'}", "--concurrency=1"]
        for root, source in zip(roots, ([f"--model={models / 'llava'}"], server), strict=True):
            flags = write_noise(root, 3)
            for step in ("captions", "polish"):
                main([step, *flags, *source])
                assert counts(root, step) == (3, 0, {})
            (root / FRAMES.format(0) / "0.jpg").write_bytes(b"")
            (root / "vidal.json").write_text(json.dumps({"clip1": {"folder": "clips"}, "clip0": {"folder": "clips"}}))
            shutil.rmtree(root / "generate")
            with pytest.raises(UserError, match="all entries failed"):
                main(["captions", *flags, *source, "--max-tokens=2"])
            assert counts(root, "captions") == (0, 2, {"too long": 1, "no readable frames": 1})
    finally:
        process.kill()
        process.communicate()
    assert fields(roots[0]) == fields(roots[1])


# ---------------------------------------------------------------------------------------------- kills, a full disk


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The annotation before the steps, after captions, and after polish, by one process that nothing disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    flags = [*write_frames(root, 48), "--workers=0"]
    found = [(root / "vidal.json").read_bytes()]
    with serving(Server(delay=0)) as where:
        for step in ("captions", "polish"):
            main([step, *flags, *where])
            found.append((root / "vidal.json").read_bytes())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("step", ["captions", "polish"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_kills_lose_nothing_and_leave_nothing_half_written(runner, step, undisturbed, tmp_path):
    flags, rng = write_frames(tmp_path, 48), random.Random(f"{runner} {step}")
    before, after = undisturbed[:2] if step == "captions" else undisturbed[1:]
    (tmp_path / "vidal.json").write_bytes(before)
    done, new = json.loads(after), set(json.loads(after)["clip0"]) - set(json.loads(before)["clip0"])
    useful = 48 * (9 if step == "captions" else 2)
    with serving(server := Server(delay=0.05)) as where:
        words = [step, *flags, *where, "--batch-size=1"]
        for _ in range(10):
            until = len(server.bodies) + rng.randrange(1, useful // 15)
            running = kill_step(runner, *words, when=lambda until=until: len(server.bodies) >= until)
            assert running, "there was work left"
            for key, entry in fields(tmp_path).items():
                assert entry.items() <= done[key].items()
                assert new <= entry.keys() or not new & entry.keys()
        end_step(runner, *words)
    assert (tmp_path / "vidal.json").read_bytes() == after
    assert counts(tmp_path, step)[1:] == (0, {})
    assert useful <= len(server.bodies) <= useful + 10 * 2 * 3 * useful // 48, "a batch under way, and two that wait"
    assert not list((tmp_path / "generate" / step).glob("*.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_wrong_key_stops_every_runner_with_one_sentence(runner, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key := "sk-very-secret")
    with serving(Server(lambda body, _: (401, {}, json.dumps({"message": f"bad {key}"}).encode()))) as where:
        output = end_step(runner, "captions", *write_frames(tmp_path, 8), *where, "--batch-size=1", status=2)
    assert "error: cannot use --endpoint (Error code: 401 - bad [key]): check it" in output
    assert "Traceback" not in output
    assert key not in output


@pytest.mark.slow
def test_a_full_disk_stops_a_step_that_a_second_run_completes(tmp_path):
    root = tmp_path / "disk"
    with disk(root, 2**21) as resize, serving(server := Server(lambda body, _: says(answer_to(body) * 35))) as where:
        flags = [*write_frames(root, 12), "--workers=0", "--batch-size=1"]
        resize(shutil.disk_usage(root).used + 7 * 4096)
        with pytest.raises(UserError, match=r"No space left on device: '.*vidal.json'|cannot write .*jsonl: No space"):
            main(["captions", *flags, *where])
        kept, asked = sum("ofa" in entry for entry in fields(root).values()), len(server.bodies)
        resize(2**21)
        main(["captions", *flags, *where])
        made, *failed = counts(root, "captions")
        assert failed == [0, {}]
        assert kept <= 12 - made < asked // 9 < 12
        assert len(server.bodies) == asked + 9 * made
        assert all(len(entry["ofa"]) == 8 for entry in fields(root).values())
        assert not list((root / "generate/captions").glob("*.jsonl"))
