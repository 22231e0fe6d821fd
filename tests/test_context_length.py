"""Texts of more, and of fewer, tokens than CLIP's 77: towers, training, cache and loading."""

import json

import open_clip
import pytest
import torch
from helpers import MINILM, losses, stripes_config, train_flags, write_shards
from tiny_towers import SIGLIP_TEXT, write_tower
from torch.nn import functional as F

from languagebind import LanguageBindDepthProcessor, get_tokenizer, load, load_model
from languagebind.config import UserError
from languagebind.data.embed_text import main as embed_text
from languagebind.hub.export import main as export
from languagebind.text import TextConfig, build_text, text_tokens
from languagebind.weights import open_clip_model
from training.main import main

NAME = "tiny-long-clip-of-the-tests"
LONG = "one more word " * 30  # 90 tokens
CAPTIONS = [LONG + end for end in ("left", "right", "near", "far")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """open_clip's model of 248 tokens; files of it, in Long-CLIP's layout, and of 77 tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    (folder / f"{NAME}.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    model = open_clip.create_model(NAME, force_context_length=248).eval()
    torch.nn.init.normal_(model.positional_embedding, std=0.1)
    state = model.state_dict()
    torch.save(state, folder / "248.pt")
    first, later = state["positional_embedding"].clone(), state["positional_embedding"].clone()
    first[20:], later[:20] = 7, 7  # what it does not read
    torch.save({**state, "positional_embedding": first, "positional_embedding_res": later}, folder / "long.pt")
    torch.save(open_clip.create_model(NAME).state_dict(), folder / "77.pt")
    return model, folder


@pytest.mark.parametrize("file", ["248.pt", "long.pt"])
def test_features_of_long_texts_are_open_clips(clip, file):
    own, folder = clip
    text_model, projection, size = build_text(TextConfig(NAME, str(folder / file), context_length=248))
    tokens = text_model.tokenizer([*CAPTIONS, "short"])
    with torch.no_grad():
        ours = projection(text_model(**tokens))
        theirs = own.encode_text(open_clip.get_tokenizer(NAME, context_length=248)([*CAPTIONS, "short"]))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert size == 24
    assert text_model.sizes.context_length == 248
    assert tokens["input_ids"].shape[1] == 93


def test_a_file_of_a_text_tower_beside_timms_is_read_without_open_clip(tmp_path, caplog):
    own = write_tower(tmp_path / "pe", "pe")
    sizes = json.loads((tmp_path / "pe" / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-pe-of-the-tests.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(tmp_path / "tiny-pe-of-the-tests.json")
    file = tmp_path / "pe" / "open_clip_pytorch_model.bin"
    text_model, projection, _ = build_text(TextConfig("tiny-pe-of-the-tests", str(file)))
    tokens = text_model.tokenizer(["a dog", "two cats"])
    with torch.no_grad():
        theirs = own.encode_text(open_clip.get_tokenizer("tiny-pe-of-the-tests")(["a dog", "two cats"]))
        torch.testing.assert_close(projection(text_model(**tokens)), theirs, atol=1e-5, rtol=1e-5)
    state = torch.load(file)
    torch.save(state | {"text.positional_embedding": torch.zeros(48, 32)}, tmp_path / "48.pt")
    open_clip_model(f"local-dir:{tmp_path / 'pe'}", "own")
    assert "Ignoring" not in caplog.text  # the weights that stand in the folder
    with pytest.raises(UserError, match="is for texts of 48 tokens, not 32; set --context-length 48"):
        build_text(TextConfig("tiny-pe-of-the-tests", str(tmp_path / "48.pt")))


def test_models_share_a_text_tower_only_with_its_tokenizer(clip, tmp_path):
    shards = write_shards(tmp_path / "shards", [16])
    tower = [f"--text-tower={NAME}", f"--text-pretrained={clip[1] / '77.pt'}", "--workers=0"]
    main(train_flags(shards, tmp_path, *tower, "--name=whole"))
    main(train_flags(shards, tmp_path, *tower, "--name=short", "--context-length=5"))
    whole, _ = load_model(tmp_path / "whole")
    assert load_model(tmp_path / "whole", like=[whole])[0].text_model is whole.text_model
    export([f"--checkpoint={tmp_path / 'short'}", f"--output={tmp_path / 'out'}"])
    for source in (tmp_path / "short", tmp_path / "out"):
        other, _ = load_model(source, like=[whole])
        assert other.text_model is not whole.text_model
        assert other.tokenize([LONG])["input_ids"].shape == get_tokenizer(source)([LONG]).shape == (1, 5)
        processor = LanguageBindDepthProcessor.from_pretrained(source)
        assert processor.tokenizer.model_max_length == len(processor(text=LONG)["input_ids"]) == 5


def test_another_length_than_that_of_the_weights_is_refused(clip, tmp_path):
    _, folder = clip
    for file, length, message in (
        ("248.pt", None, "is for texts of 248 tokens, not 77; set --context-length 248"),
        ("248.pt", 100, "for texts of 248 tokens, not 100"),
        ("77.pt", 248, "for texts of 77 tokens, not 248"),
    ):
        with pytest.raises(UserError, match=message):
            build_text(TextConfig(NAME, str(folder / file), context_length=length))
    write_tower(tmp_path / "siglip", "siglip", SIGLIP_TEXT)
    with pytest.raises(UserError, match="reads exactly 64 tokens; leave out --context-length"):
        build_text(TextConfig(f"local-dir:{tmp_path / 'siglip'}", context_length=100))
    with pytest.raises(UserError, match="reads at most 512 tokens"):
        build_text(TextConfig(MINILM, context_length=513))


def test_a_sentence_encoder_reads_more_than_its_usual_256_tokens():
    texts = ["word " * 300 + end for end in ("left", "right")]
    for length, same in ((None, True), (400, False)):
        text_model, _, _ = build_text(TextConfig(MINILM, context_length=length))
        with torch.no_grad():
            a, b = text_model.eval()(**text_model.tokenizer(texts))
        assert torch.equal(a, b) is same
        assert text_model.tokenizer.count_cut(texts) == 2 * same


@pytest.mark.parametrize("tower", ["clip", MINILM])
def test_cut_texts_are_counted_exactly(clip, tower):
    config = TextConfig(*((NAME, str(clip[1] / "77.pt")) if tower == "clip" else (MINILM,)), context_length=9)
    tokenizer = build_text(config)[0].tokenizer
    wider = text_tokens(TextConfig(config.text_tower, config.text_pretrained, context_length=70))
    texts = ["", *("a dog " * count for count in range(1, 8)), "a dog " * 3 + "a", "Ünïcode! 😱 " * 2]
    lengths = [(row != wider([""])[0, -1]).sum().item() for row in wider(texts)]  # of all of a text
    assert tokenizer.count_cut(texts) == sum(length > 9 for length in lengths)
    assert {8, 9, 10} <= set(lengths)  # a text that just fits, and one that just does not


def test_captions_that_differ_late_train_in_all_ways(clip, tmp_path):
    shards = write_shards(tmp_path / "shards", [16], captions=CAPTIONS)
    tower = [f"--text-tower={NAME}", f"--text-pretrained={clip[1] / '248.pt'}", "--context-length=248"]
    flags = [*tower, "--workers=0", "--warmup=1"]
    main(train_flags(shards, tmp_path, *flags, "--name=live"))
    embed_text([f"--train-data={shards}", "--caption-source=raw", *tower])
    main(train_flags(shards, tmp_path, *flags, "--name=cached", "--text-features=cached"))
    assert losses(tmp_path, "cached") == pytest.approx(losses(tmp_path, "live"), abs=2e-3)
    own, _ = clip
    with torch.no_grad():
        theirs = own.encode_text(open_clip.get_tokenizer(NAME, context_length=248)(CAPTIONS))
    found = load(tmp_path / "live").encode(text=CAPTIONS)
    torch.testing.assert_close(found, F.normalize(theirs, dim=-1), atol=1e-5, rtol=1e-5)


def test_evaluation_says_how_many_texts_are_cut(clip, tmp_path):
    shards = write_shards(tmp_path / "shards", [16], captions=["a box", *CAPTIONS[1:]])
    tower = [f"--text-tower={NAME}", f"--text-pretrained={clip[1] / '77.pt'}"]
    validation = f"--val-config={stripes_config(tmp_path, shards)}"
    main(train_flags(shards, tmp_path, *tower, "--workers=0", "--batch-size=16", "--context-length=5", validation,
                     "--name=short"))  # fmt: skip
    labels = load(tmp_path / "short")  # the run's own tokens
    assert labels.model("text").tokenize(CAPTIONS)["input_ids"].shape == (4, 5)
    said = (tmp_path / "short" / "out.log").read_text()
    assert "4 of 4 texts have more tokens than are read, and are cut" in said
