"""Captions and polish: by a server that misbehaves, by `transformers serve`, and by models in this process."""

import base64
import io
import json
import random
import re
import shutil
import tarfile
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from helpers import free_port, start, wait_for
from PIL import Image

from languagebind.config import UserError
from languagebind.data.making import main as make_shards
from languagebind.data.vidal import read_annotation
from languagebind.generate.__main__ import main
from languagebind.generate.captions import PROMPTS
from languagebind.generate.chat import Answer, judged

POLISHED = ("polish_mplug", "sound_mplug")


class Server:
    """A server with OpenAI's interface. It answers with the grey levels of the pictures, unless `fault` replies."""

    def __init__(self, fault=lambda number, body: None):
        self.fault, self.bodies, self.keys, self.times = fault, [], [], []
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.hanging = threading.Event()

    def reply(self, body, key):
        """Return the status, headers and content of a reply."""
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
            number = len(self.bodies)
        time.sleep(0.01)
        found = self.fault(number, body)
        with self.lock:
            self.now -= 1
        return found or says(answer_to(body))

    def asked(self):
        """How often each question was asked."""
        return Counter(json.dumps(body["messages"]) for body in self.bodies)


def content_of(body):
    return body["messages"][0]["content"]


def answer_to(body):
    content = content_of(body)
    if isinstance(content, str):
        return f"about {re.sub('[^a-z0-9]+', ' ', content.lower())[-60:]}"
    levels = [level(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]
    return "Grey of " + ", ".join(map(str, levels))


def level(uri):
    """The grey level of a picture, to the next ten."""
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return round(np.array(Image.open(io.BytesIO(base64.b64decode(data)))).mean() / 10) * 10


def says(text, reason="stop", **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **more}, "finish_reason": reason}
    reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, {}, json.dumps(reply).encode()


@contextmanager
def serving(server):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, content = server.reply(body, self.headers["Authorization"])
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": len(content)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, http.handle_error = True, lambda *_: None  # clients hang up on a server that hangs
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        server.hanging.set()
        http.shutdown()
        http.server_close()


def write_frames(root, entries):
    """VIDAL's layout with frames alone: frame k of entry i has the grey level 10 (i + k) + 20."""
    fields = {}
    for i in range(entries):
        folder = root / f"clips_resize256_skip15/clip{i}_resize256_folder"
        folder.mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (32 + i, 32), (10 * (i + k) + 20,) * 3).save(folder / f"{k}.jpg", quality=95)
        fields[f"clip{i}"] = {"folder": "clips", "raw": f"Ball No. {i}! #shorts #red"}
    (root / "vidal.json").write_text(json.dumps(fields))
    return [f"--annotation={root / 'vidal.json'}", f"--root={root}", "--workers=0"]


def levels(i):
    return [10 * (i + k) + 20 for k in range(8)]


def fields(root):
    return dict(read_annotation(root / "vidal.json"))


def report(root, step):
    found = json.loads((root / "generate" / step / "report.json").read_bytes())
    assert found.pop("there before") == found["entries"] - found["made"] - found["failed"]
    return found | {"failures": {reason: each["count"] for reason, each in found["failures"].items()}}


def of_clip(body):
    return len(content_of(body)) > 2


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """What a server that refuses one request in five has written, captions and then polish, and the server."""
    root = tmp_path_factory.mktemp("busy")
    flags = write_frames(root, 6)
    faults = [(429, {"Retry-After": "0.1"}, b"slower"), (500, {}, b"<html>oops")]
    server = Server(lambda number, body: faults[number // 5 % 2] if number % 5 == 0 else None)
    with serving(server) as url:
        for step in ("captions", "polish"):
            main([step, *flags, f"--endpoint={url}", "--api-model=m", "--concurrency=4", "--batch-size=4"])
    return root, server, flags


def test_captions_are_of_their_own_pictures(busy):
    root, *_ = busy
    for i, entry in enumerate(fields(root).values()):
        assert entry["ofa"] == [f"Grey of {value}" for value in levels(i)]
        assert entry["mplug"] == "Grey of " + ", ".join(map(str, levels(i)))


def test_requests_that_a_busy_server_refuses_are_sent_again(busy):
    root, server, _ = busy
    useful = 6 * 9 + 6 * 2
    assert len(server.bodies) - len(server.bodies) // 5 == useful, "each question has one answer"
    again = sum(count - 1 for count in server.asked().values())
    assert again == len(server.bodies) // 5
    for step in ("captions", "polish"):
        assert report(root, step) == {"entries": 6, "made": 6, "failed": 0, "failures": {}}
    assert 1 < server.most <= 4


def test_requests_say_what_the_record_says(busy):
    root, server, _ = busy
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("m", 0.0, 0, 200)
    prompts = {content[-1]["text"] for content in map(content_of, server.bodies) if isinstance(content, list)}
    assert prompts == {(PROMPTS / f"{name}.txt").read_text().strip() for name in ("frame", "clip")}
    record = json.loads((root / "generate/captions/record.json").read_bytes())
    assert record["model"] == "m"
    assert len(record["prompt frame"]) == 64
    assert "127.0.0.1" not in json.dumps(record)


def test_polish_reads_title_and_captions(busy):
    root, server, _ = busy
    entry = fields(root)["clip2"]
    texts = [
        body["messages"][0]["content"] for body in server.bodies if isinstance(body["messages"][0]["content"], str)
    ]
    (sound, *_), (polish, *_) = (
        [text for text in texts if "ball no. 2!, red" in text and ("heard" in text) is heard] for heard in (True, False)
    )
    lines = "\n".join(f"{k + 1}. Grey of {value}" for k, value in enumerate(levels(2)))
    for text in (sound, polish):
        assert lines in text
        assert entry["mplug"] in text
    assert entry["polish_mplug"] != entry["sound_mplug"]


def test_a_second_run_asks_for_what_is_missing_alone(busy, tmp_path):
    root, _, _ = busy
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    flags = [f"--annotation={tmp_path / 'vidal.json'}", f"--root={tmp_path}", "--workers=0"]
    before = fields(tmp_path)
    damaged = json.loads(json.dumps(before))
    del damaged["clip1"]["mplug"], damaged["clip3"]["ofa"], damaged["clip4"]["sound_mplug"]
    (tmp_path / "vidal.json").write_text(json.dumps(damaged))
    with serving(server := Server()) as url:
        for step, asked in (("captions", 1 + 8), ("polish", 9 + 1)):
            main([step, *flags, f"--endpoint={url}", "--api-model=m"])
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


def test_processes_write_the_same(busy, tmp_path):
    root, *_ = busy
    flags = write_frames(tmp_path, 6)[:2]
    with serving(Server()) as url:
        main(["captions", *flags, f"--endpoint={url}", "--api-model=m", "--workers=2", "--batch-size=2"])
    assert fields(tmp_path) == {
        key: {name: text for name, text in entry.items() if name not in POLISHED} for key, entry in fields(root).items()
    }


# ------------------------------------------------------------------------------------------------- what goes wrong


def answers_of(clip):
    """A fault that gives the clip captions of entries other answers: {entry: reply}; frames have their own."""
    return lambda number, body: clip.get(first_level(body)) if of_clip(body) else None


def first_level(body):
    return (level(content_of(body)[0]["image_url"]["url"]) - 20) // 10


def test_answers_that_cannot_be_used_are_asked_for_again_and_counted(tmp_path):
    flags = write_frames(tmp_path, 8)
    bad = {
        0: says(" \n"), 1: says("I'm sorry, but I can't help with that."), 2: says("word " * 200),
        3: says("A red ball that", reason="length"), 4: says(None, refusal="No."), 5: says(None),
        6: (400, {}, b'{"error": {"message": "picture too large"}}'),
    }  # fmt: skip
    with serving(server := Server(answers_of(bad))) as url:
        main(["captions", *flags, f"--endpoint={url}", "--api-model=m"])
    failures = {"empty answer": 2, "refusal": 2, "long answer": 1, "answer cut off": 1, "refused request": 1}
    assert report(tmp_path, "captions") == {"entries": 8, "made": 1, "failed": 7, "failures": failures}
    assert [key for key, entry in fields(tmp_path).items() if "ofa" in entry or "mplug" in entry] == ["clip7"]
    asked = [(first_level(body), body["seed"], body["temperature"]) for body in server.bodies if of_clip(body)]
    expected = [(i, n, 0.7 if n else 0.0) for i in range(6) for n in range(3)] + [(6, 0, 0.0), (7, 0, 0.0)]
    assert sorted(asked) == expected
    with serving(server := Server()) as url:  # a new address, and a model in a better mood
        main(["captions", *flags, f"--endpoint={url}", "--api-model=m"])
    assert len(server.bodies) == 7 * 9
    assert report(tmp_path, "captions") == {"entries": 8, "made": 7, "failed": 0, "failures": {}}


def test_a_better_second_answer_is_taken(tmp_path):
    flags = write_frames(tmp_path, 1)
    worse = Server(lambda number, body: says("N/A") if body["seed"] == 5 else says('<think>so\n"hm"</think>"A  ball."'))
    with serving(worse) as url:
        main(["captions", *flags, f"--endpoint={url}", "--api-model=m", "--seed=5"])
    assert fields(tmp_path)["clip0"]["ofa"] == ["A ball."] * 8
    assert len(worse.bodies) == 18


def test_a_server_that_hangs_or_talks_nonsense_costs_that_entry_alone(tmp_path):
    flags = write_frames(tmp_path, 4)
    server = Server()

    def fault(number, body):
        if of_clip(body) and first_level(body) == 1:
            server.hanging.wait(20)
        if of_clip(body) and first_level(body) == 2:
            return 200, {"Content-Type": "text/html"}, b"<html>welcome"
        if of_clip(body) and first_level(body) == 3:
            return 503, {}, b"{}"
        return None

    server.fault = fault
    with serving(server) as url:
        main(["captions", *flags, f"--endpoint={url}", "--api-model=m", "--timeout=0.5", "--tries=2"])
    assert report(tmp_path, "captions") == {"entries": 4, "made": 1, "failed": 3, "failures": {"no answer": 3}}
    asked = Counter(first_level(body) for body in server.bodies if of_clip(body))
    assert asked == {0: 1, 1: 2, 2: 1, 3: 2}


def test_a_server_that_is_away_stops_the_step(tmp_path):
    flags = [*write_frames(tmp_path, 2), "--api-model=m", "--tries=2"]
    with pytest.raises(UserError, match=r"nothing answers at http://127.0.0.1:\d+/v1 .*refused.*: start the server"):
        main(["captions", *flags, f"--endpoint=http://127.0.0.1:{free_port()}/v1"])
    unknown = Server(lambda number, body: (404, {}, b'{"error": "no model m"}'))
    message = r"refuses requests .*no model m.*check --endpoint, --api-model and OPENAI_API_KEY"
    with serving(unknown) as url, pytest.raises(UserError, match=message):
        main(["captions", *flags, f"--endpoint={url}"])
    assert not any("ofa" in entry for entry in fields(tmp_path).values())


def test_the_key_is_sent_and_kept_nowhere(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", key := "sk-very-secret")
    flags = [*write_frames(tmp_path, 2), "--api-model=m"]
    echo = json.dumps({"error": {"message": f"bad request of {key}"}}).encode()
    with serving(server := Server(answers_of({1: (400, {}, echo)}))) as url:
        main(["captions", *flags, f"--endpoint={url}"])
    assert set(server.keys) == {f"Bearer {key}"}
    assert "bad request of [key]" in (tmp_path / "generate/captions/report.json").read_text()
    with serving(Server(lambda number, body: (401, {}, echo))) as url, pytest.raises(UserError) as error:
        main(["captions", *flags, f"--endpoint={url}"])
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(key.encode() in data for data in kept)
    assert key not in str(error.value) + "".join(capfd.readouterr())


def test_requests_per_minute(tmp_path):
    flags = write_frames(tmp_path, 1)
    with serving(server := Server()) as url:
        main(["captions", *flags, f"--endpoint={url}", "--api-model=m", "--requests-per-minute=1200"])
    gaps = np.diff(server.times)
    assert len(gaps) == 8
    assert min(gaps) > 0.03, "50 ms, but for the jitter of the network"


def test_entries_without_frames_or_captions_are_counted(tmp_path):
    flags = write_frames(tmp_path, 3)
    shutil.rmtree(tmp_path / "clips_resize256_skip15/clip0_resize256_folder")
    (tmp_path / "clips_resize256_skip15/clip1_resize256_folder/5.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    with serving(server := Server()) as url:
        for step in ("captions", "polish"):
            main([step, *flags, f"--endpoint={url}", "--api-model=m"])
    assert report(tmp_path, "captions")["failures"] == {"no frames": 1, "unreadable frames": 1}
    assert report(tmp_path, "polish")["failures"] == {"no captions": 2}
    assert len(server.bodies) == 9 + 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "pass --endpoint URL and --api-model NAME, or --model NAME alone"),
        (["--endpoint=http://x/v1"], "pass --endpoint URL and --api-model NAME"),
        (["--endpoint=http://x/v1", "--api-model=m", "--model=n"], "or --model NAME alone"),
        (["--endpoint=http://x/v1", "--api-model=m", "--extra=[1]"], "--extra should be a JSON object, got [1]"),
        (["--model=/nowhere/at/all"], "/nowhere/at/all"),
        (["--endpoint=http://x/v1", "--api-model=m", "--prompts=/none"], "cannot read the prompt /none/polish.txt"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        main(["polish", *write_frames(tmp_path, 1), *flags])
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in printed + str(error.value)


def test_own_prompts(tmp_path):
    flags = [*write_frames(tmp_path, 1), "--api-model=m", f"--prompts={tmp_path}"]
    (tmp_path / "frame.txt").write_text("What is it? It costs $$5.\n")
    (tmp_path / "clip.txt").write_text("Which $title?")
    with serving(server := Server()) as url:
        with pytest.raises(UserError, match=r"clip.txt: nothing can be filled in, and \$\$ is a dollar sign, but not"):
            main(["captions", *flags, f"--endpoint={url}"])
        (tmp_path / "clip.txt").write_text("What happens?")
        main(["captions", *flags, f"--endpoint={url}", '--extra={"top_k": 1, "max_tokens": 9}'])
        texts = Counter(body["messages"][0]["content"][-1]["text"] for body in server.bodies)
        assert texts == {"What is it? It costs $5.": 8, "What happens?": 1}
        assert {(body["top_k"], body["max_tokens"]) for body in server.bodies} == {(1, 9)}
        (tmp_path / "frame.txt").write_text("What else?")
        with pytest.raises(UserError, match="captions was made with prompt frame"):
            main(["captions", *flags, f"--endpoint={url}", '--extra={"top_k": 1, "max_tokens": 9}'])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I cannot clearly see the picture.", "refusal"),
        ("Sorry, I am unable to.", "refusal"),
        ("As an AI language model, I", "refusal"),
        ("none", "empty answer"),
        ("<think>A ball?</think>", "empty answer"),
        ("I can see a sorry dog that cannot help itself.", None),
        ("Unable to stand, a foal falls.", None),
    ],
)
def test_refusals(text, expected):
    assert judged(Answer(text), 100).fault == expected


# -------------------------------------------------------------------------------------- models with random weights

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<image>",
    "user",
    "assistant",
    "a",
    "ball",
    "box",
    "red",
    "blue",
    "rolls",
    "falls",
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endif %}{% endfor %} assistant "
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A LLaVA and a Llama with random weights, which end after a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,  # fmt: skip
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    root = tmp_path_factory.mktemp("models")
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                        pad_token="<pad>", additional_special_tokens=["<image>"])  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    text = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=4096, **sizes, **ids)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **sizes)
    seeing = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4, **ids)
    torch.manual_seed(3)
    llama = LlamaForCausalLM(text)
    llava = LlavaForConditionalGeneration(seeing)
    for model, name in ((llama, "llama"), (llava, "llava")):
        with torch.no_grad():
            model.get_output_embeddings().weight[:5] *= 0.01  # special words are not said
        model.generation_config.update(exponential_decay_length_penalty=(3, 1e4), **ids)
        model.generation_config.do_sample = False
        model.save_pretrained(root / name)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=TEMPLATE)  # fmt: skip
    processor.save_pretrained(root / "llava")
    tokenizer.save_pretrained(root / "llama")
    return root


def write_noise(root, entries):
    """As `write_frames`, of pictures that differ more."""
    flags, rng = write_frames(root, entries), np.random.default_rng(0)
    for path in sorted(root.rglob("*.jpg")):
        Image.fromarray(rng.integers(0, 255, (28, 28, 3), np.uint8)).save(path)
    return flags


def test_models_in_this_process(models, tmp_path):
    from transformers import pipeline

    flags = write_noise(tmp_path, 2)
    main(["captions", *flags, f"--model={models / 'llava'}", "--max-tokens=40", "--device=cpu"])
    main(["polish", *flags, f"--model={models / 'llama'}", "--max-tokens=40", "--device=cpu"])
    seeing = pipeline("image-text-to-text", str(models / "llava"), device="cpu")
    prompt = {"type": "text", "text": (PROMPTS / "frame.txt").read_text().strip()}
    found = fields(tmp_path)
    for key, entry in found.items():
        for k, caption in enumerate(entry["ofa"]):
            path = tmp_path / f"clips_resize256_skip15/{key}_resize256_folder/{k}.jpg"
            chat = [{"role": "user", "content": [{"type": "image", "url": str(path)}, prompt]}]
            (answer,) = seeing(text=chat, max_new_tokens=40, return_full_text=False)
            assert caption == answer["generated_text"].strip()
    assert all(entry["polish_mplug"] and entry["sound_mplug"] for entry in found.values())
    record = json.loads((tmp_path / "generate/captions/record.json").read_bytes())
    assert list(record["weights_sha256"]) == ["model.safetensors"]


def test_answers_that_a_model_in_this_process_does_not_end(models, tmp_path):
    flags = write_noise(tmp_path, 1)
    main(["captions", *flags, f"--model={models / 'llava'}", "--max-tokens=2"])
    assert report(tmp_path, "captions")["failures"] == {"answer cut off": 1}


def test_a_model_that_does_not_read_pictures(models, tmp_path):
    with pytest.raises(UserError, match=r"--model .*llama does not read pictures"):
        main(["captions", *write_noise(tmp_path, 1), f"--model={models / 'llama'}"])


@pytest.mark.slow
def test_kills_cost_the_batches_under_way_alone(tmp_path):
    flags, rng = write_frames(tmp_path, 16)[:2], random.Random(0)
    server = Server(lambda number, body: time.sleep(0.03))
    with serving(server) as url:
        words = ["captions", *flags, f"--endpoint={url}", "--api-model=m", "--batch-size=2", "--workers=1"]
        for _ in range(5):
            until = len(server.bodies) + rng.randrange(1, 40)
            process = start("-m", "languagebind.generate", *words)
            wait_for(lambda until=until: len(server.bodies) > until)
            process.kill()
            process.communicate()
        main(words)
    assert [entry["ofa"][0] for entry in fields(tmp_path).values()] == [f"Grey of {levels(i)[0]}" for i in range(16)]
    assert 16 * 9 < len(server.bodies) <= 16 * 9 + 5 * 3 * 2 * 9, "a batch under way, and two that wait for it"
    assert not list((tmp_path / "generate/captions").glob("*.jsonl"))


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
        name = f"--api-model={models / 'llava'}"
        sources = [["--model", str(models / "llava")], [f"--endpoint=http://127.0.0.1:{port}/v1", name]]
        for root, source in zip(roots, sources, strict=True):
            flags = write_noise(root, 3)
            for step in ("captions", "polish"):
                main([step, *flags, *source, "--max-tokens=40", "--concurrency=1"])
                assert report(root, step) == {"entries": 3, "made": 3, "failed": 0, "failures": {}}
    finally:
        process.kill()
        process.communicate()
    assert fields(roots[0]) == fields(roots[1])
