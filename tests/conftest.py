import json
import os

# Before PyTorch is imported: threads of several processes that wait for the same cores slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a wrong name would wait for the network

import numpy as np
import pytest
import torch
from colours import world  # noqa: F401 - a fixture
from helpers import SHARED, write_shards
from PIL import Image


def pytest_collection_modifyitems(items):
    """Run the longest tests first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_memory.py", "test_engines.py"))


@pytest.fixture(scope="session")
def golden():
    """The original's outputs for real clips; skips where they are not at hand."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"the original's outputs are not at {SHARED / 'golden'}")
    return SHARED


@pytest.fixture(scope="session")
def depth_shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [24, 24, 24, 24])


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A checkpoint of each class as it is published: its own config, weights, and tokenizer files."""
    from languagebind.hub.config import CONFIGS
    from languagebind.hub.processing import TOKENIZERS
    from languagebind.hub.published import MODELS
    from languagebind.text import bundled_vocabulary

    root, vocabulary = tmp_path_factory.mktemp("toys"), bundled_vocabulary()
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "hidden_act": "gelu", "image_size": 56, "patch_size": 14, "lora_r": 0}  # fmt: skip
    own = {
        "video": {"add_time_attn": True, "num_frames": 8},
        "audio": {"num_mel_bins": 28, "target_length": 98, "audio_mean": -4.2677393, "audio_std": 4.5689974},
        "depth": {"max_depth": 10},
    }
    tower = None
    for name, kind in CONFIGS.items():
        torch.manual_seed(len(name))
        config = kind(text_config=text, vision_config=sizes | own.get(name, {}), projection_dim=16)
        model = MODELS[name](config)
        if tower is None:
            tower = model
        model.text_model.load_state_dict(tower.text_model.state_dict())
        model.text_projection.load_state_dict(tower.text_projection.state_dict())
        model.save_pretrained(root / name)
        TOKENIZERS[name](vocab=vocabulary[0], merges=vocabulary[1], model_max_length=77).save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Two files of each modality."""
    import soundfile
    from av import open as open_video
    from av.video.frame import VideoFrame

    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    found = {name: [] for name in ("video", "audio", "depth", "thermal", "image")}
    for i in range(2):
        picture = Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8))
        for name in ("image", "thermal"):
            picture.save(folder / f"{name}{i}.jpg")
            found[name].append(str(folder / f"{name}{i}.jpg"))
        Image.fromarray(rng.integers(500, 9000, (60, 80)).astype(np.uint16)).save(folder / f"depth{i}.png")
        found["depth"].append(str(folder / f"depth{i}.png"))
        soundfile.write(folder / f"{i}.wav", rng.normal(size=24000) / 10, 16000)
        found["audio"].append(str(folder / f"{i}.wav"))
        with open_video(str(folder / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 80, 60, "yuv420p"
            for _ in range(12):
                frame = VideoFrame.from_ndarray(rng.integers(0, 255, (60, 80, 3), np.uint8))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        found["video"].append(str(folder / f"{i}.mp4"))
    return found


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A small CLIP as open_clip saves it."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    sizes = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": {}}))
    torch.save(open_clip.CLIP(**sizes).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder
