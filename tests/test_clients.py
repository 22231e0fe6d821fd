"""What other people's code does with the original package: its modules, transforms, loaders, towers and attributes."""

import copy
import importlib
import inspect
import io
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import av
import decord
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from languagebind.audio.processing_audio import AudioTransform, get_audio_transform, torchaudio_loader
from languagebind.depth.processing_depth import get_depth_transform, load_and_transform_depth
from languagebind.image.processing_image import get_image_transform, load_and_transform_image
from languagebind.thermal.processing_thermal import get_thermal_transform, load_and_transform_thermal
from languagebind.video.configuration_video import CLIPVisionConfig
from languagebind.video.modeling_video import CLIPEncoderLayer, CLIPVisionTransformer
from languagebind.video.processing_video import get_video_transform, load_and_transform_video
from PIL import Image, ImageOps
from torch import nn
from torchaudio.compliance import kaldi
from torchaudio.functional import resample
from torchvision import transforms as tv

import languagebind
from languagebind import (
    DecodeError,
    LanguageBindAudio,
    LanguageBindImage,
    LanguageBindImageConfig,
    LanguageBindImageTower,
    LanguageBindVideo,
    LanguageBindVideoTower,
)
from languagebind.config import UserError
from languagebind.hub.config import CONFIGS
from languagebind.hub.processing import PROCESSORS

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def close(tensor, other, atol=1e-5):
    torch.testing.assert_close(tensor, other, atol=atol, rtol=0)


def plain(**values):
    """A config that is no more than a namespace."""
    return SimpleNamespace(vision_config=SimpleNamespace(**values))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A video of 30 frames at 10 per second; frame i is grey, 8 * i."""
    path = tmp_path_factory.mktemp("numbered") / "grey.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 70, 60, "bgr0"
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((60, 70, 3), 8 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def numbers(clip):
    """Which frames of `numbered` a preprocessed clip (3, T, H, W) holds."""
    return (255 / 8 * (clip[0].mean(dim=(1, 2)) * STD[0] + MEAN[0])).round().int().tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_modules_of_the_original(name):
    for kind, names in {
        "configuration": [f"LanguageBind{name.title()}Config", "CLIPTextConfig", "CLIPVisionConfig"],
        "modeling": [f"LanguageBind{name.title()}", "CLIPVisionTransformer", "CLIPEncoderLayer"],
        "tokenization": [f"LanguageBind{name.title()}Tokenizer"],
        "processing": [f"LanguageBind{name.title()}Processor", "OPENAI_DATASET_MEAN", "OPENAI_DATASET_STD"],
    }.items():
        module = importlib.import_module(f"languagebind.{name}.{kind}_{name}")
        assert getattr(getattr(languagebind, name), f"{kind}_{name}") is module
        assert importlib.util.find_spec(module.__name__) is not None
        assert set(names) < set(module.__all__)
        for found in names:
            assert getattr(module, found) is getattr(languagebind, found, getattr(module, found))
    assert list(inspect.signature(getattr(module, f"get_{name}_transform")).parameters) == ["config"]
    load = inspect.signature(getattr(module, f"load_and_transform_{name}")).parameters
    assert list(load)[:2] == [f"{name}_path", "transform"]
    if name == "video":
        defaults = {key: parameter.default for key, parameter in list(load.items())[2:]}
        assert defaults == {
            "video_decode_backend": "opencv",
            "clip_start_sec": 0.0,
            "clip_end_sec": None,
            "num_frames": 8,
        }
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec(f"from languagebind.{name}.processing_{name} import Nothing")
    with pytest.raises(ModuleNotFoundError, match=f"languagebind.{name}.nothing"):
        importlib.import_module(f"languagebind.{name}.nothing")


def test_the_modules_are_found_in_a_package_within_another_and_import_nothing_early(tmp_path):
    (tmp_path / "Vendored").mkdir()
    (tmp_path / "Vendored" / "languagebind").symlink_to(ROOT / "languagebind")
    code = (
        "import sys, Vendored.languagebind.audio.processing_audio\n"
        "from Vendored.languagebind import video, image\n"
        "module = video.processing_video\n"
        "assert 'torch' not in sys.modules and 'languagebind' not in sys.modules\n"
        "from Vendored.languagebind.image.tokenization_image import LanguageBindImageTokenizer\n"
        "print(LanguageBindImageTokenizer.__module__, module.load_and_transform_video.__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["Vendored.languagebind.hub.processing", "Vendored.languagebind.hub.transforms"], done


def test_pictures_are_transformed_as_by_the_original():
    rng = np.random.default_rng(1)
    steps = [tv.ToTensor(), tv.Resize(224, tv.InterpolationMode.BICUBIC, antialias=False), tv.CenterCrop(224)]
    original = tv.Compose([*steps, tv.Normalize(MEAN, STD)])
    pictures = [rng.integers(0, 256, (190, 333, 3), np.uint8), rng.random((301, 250, 3), np.float32)]
    for config in (plain(), CONFIGS["image"](vision_config={"image_size": 224})):
        for picture in [*pictures, Image.fromarray(pictures[0])]:
            close(get_image_transform(config)(picture), original(picture), 1e-6)
        for picture in (pictures[0], Image.fromarray(pictures[0])):
            close(get_thermal_transform(config)(picture), original(picture), 1e-6)


@pytest.mark.parametrize("max_depth", [10, 4.5, 0])
def test_depth_maps_are_transformed_as_by_the_original(max_depth, tmp_path):
    millimetres = np.random.default_rng(2).integers(0, 12000, (250, 300)).astype(np.uint16)
    metres = (millimetres.astype(np.float32) / 1000).clip(min=0.01)
    scaled = metres.clip(max=max_depth) / max_depth if max_depth else metres / metres.max()
    steps = [tv.Resize(224, tv.InterpolationMode.BICUBIC, antialias=False), tv.CenterCrop(224), tv.Normalize(MEAN, STD)]
    expected = tv.Compose(steps)(torch.from_numpy(scaled).expand(3, -1, -1))
    transform = get_depth_transform(plain(max_depth=max_depth))
    close(transform(millimetres.astype("float32")), expected, 1e-6)
    Image.fromarray(millimetres).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", millimetres.astype(np.float32) / 1000)
    for name in ("a.png", "a.npy"):
        assert torch.equal(load_and_transform_depth(str(tmp_path / name), transform), transform(millimetres))
    # A transform of somebody else's gets millimetres, as from OpenCV
    close(
        load_and_transform_depth(tmp_path / "a.png", torch.from_numpy).float(), torch.from_numpy(millimetres).float(), 1
    )


def test_clips_are_transformed_as_by_the_original():
    rng = np.random.default_rng(3)

    def original(clip):
        x = (clip / 255 - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)
        height, width = x.shape[2:]
        short = min(height, width)
        x = F.interpolate(x, size=(224 * height // short, 224 * width // short), mode="bilinear", align_corners=False)
        return tv.CenterCrop(224)(x)

    transform = get_video_transform(plain(video_decode_backend="decord", num_frames=8))
    clips = [rng.integers(0, 256, (3, 8, 100, 171), np.uint8), (255 * rng.random((3, 3, 300, 260))).astype(np.float32)]
    for clip in map(torch.from_numpy, clips):
        close(transform(clip), original(clip), 2e-6)
        assert torch.equal(transform(clip.numpy()), transform(clip))
        assert torch.equal(transform(clip.double()), transform(clip.float()))
    many = torch.from_numpy(rng.integers(0, 256, (3, 20, 60, 70), np.uint8))
    found = get_video_transform(plain(video_decode_backend="pytorchvideo", num_frames=4))(
        {"video": many, "audio": None}
    )
    close(found["video"], original(many[:, [0, 6, 12, 19]]), 2e-6)
    for wrong in (many.permute(1, 2, 3, 0), many[:, 0]):
        with pytest.raises(DecodeError, match=r"expected frames \(C, T, H, W\)"):
            transform(wrong)


def test_sounds_are_transformed_as_by_the_original():
    options = {"audio_sample_rate": 16000, "num_mel_bins": 28, "target_length": 150,
               "audio_mean": -4.2677393, "audio_std": 4.5689974}  # fmt: skip

    def original(wave, rate, length):
        wave = resample(wave, rate, 16000) if rate != 16000 else wave
        mel = kaldi.fbank(
            wave - wave.mean(), htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning",
            num_mel_bins=28, dither=0.0, frame_length=25, frame_shift=10,
        ).repeat(9, 1)[:length]  # fmt: skip
        return ((mel + 4.2677393) / (2 * 4.5689974)).T.expand(3, -1, -1)

    transform = AudioTransform(SimpleNamespace(**options))
    assert (transform.sample_rate, transform.num_mel_bins, transform.target_length) == (16000, 28, 150)
    generator = torch.Generator().manual_seed(0)
    for shape, rate in (((1, 9000), 16000), ((2, 20000), 44100), ((2, 9000), 16000)):
        wave = torch.randn(shape, generator=generator) / 10
        before = wave.clone()
        close(transform((wave, rate)), original(wave, rate, 150), 1e-4)
        assert torch.equal(wave, before)  # the original subtracted the mean in place
        close(get_audio_transform(plain(**options))((wave.numpy(), rate)), original(wave, rate, 150), 1e-4)
    transform.target_length = 70
    close(transform((wave[:, :4000], 16000)), original(wave[:, :4000], 16000, 70), 1e-4)


@pytest.mark.parametrize("backend", ["decord", "opencv", "pyav", "torchcodec"])
def test_every_argument_of_the_video_loader_acts(numbered, backend):
    transform = get_video_transform(plain(num_frames=8))
    options = {"video_decode_backend": backend}
    assert numbers(load_and_transform_video(numbered, transform, **options)) == [0, 4, 8, 12, 16, 20, 24, 29]
    assert numbers(load_and_transform_video(numbered, transform, num_frames=3, **options)) == [0, 14, 29]
    # From 1.1 s on and before 2.1 s: frames 11 to 20
    times = {"clip_start_sec": 1.1, "clip_end_sec": torch.tensor(2.1, dtype=torch.float64)}
    assert numbers(load_and_transform_video(numbered, transform, num_frames=4, **times, **options)) == [11, 14, 17, 20]
    late = load_and_transform_video(numbered, transform, clip_start_sec=2.75, num_frames=2, **options)
    assert numbers(late) == [28, 29]


def test_the_video_loader_names_mistakes(numbered, files):
    transform = get_video_transform(plain(num_frames=8))
    for call in (
        lambda: load_and_transform_video(numbered, transform, video_decode_backend="ffmpeg"),
        lambda: get_video_transform(plain(video_decode_backend="ffmpeg")),
        lambda: PROCESSORS["video"](plain(video_decode_backend="ffmpeg")),
    ):
        with pytest.raises(UserError, match=r"unknown video_decode_backend 'ffmpeg': choose from .*decord"):
            call()
    for start, end in ((4, 5), (2, 1), (4, None)):
        with pytest.raises(DecodeError, match=rf"grey.mkv: no frame of 30 lies from {start} s to"):
            load_and_transform_video(numbered, transform, clip_start_sec=start, clip_end_sec=end)
    with pytest.raises(DecodeError, match="expected one file, not several frames"):
        load_and_transform_video(files["image"], transform, clip_start_sec=1)


def test_loaders_hand_other_transforms_what_the_original_opened(files, numbered):
    assert load_and_transform_image(files["image"][0], lambda picture: picture.size) == (80, 60)
    assert load_and_transform_thermal(files["thermal"][0], tv.ToTensor()).shape == (3, 60, 80)
    wave, rate = torchaudio_loader(files["audio"][0])
    assert (wave.shape, wave.dtype, rate) == ((1, 24000), torch.float32, 16000)
    clip = load_and_transform_video(numbered, lambda clip: clip, num_frames=3)
    assert clip[:, :, 0, 0].tolist() == [[0, 112, 232]] * 3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_transform_may_take_the_place_of_the_processors(toys, files, name):
    processor = PROCESSORS[name].from_pretrained(toys / name)
    before, transform = processor(files[name])["pixel_values"], processor.transform
    processor.transform = lambda opened: transform(opened) + 1
    assert torch.equal(processor(files[name])["pixel_values"], before + 1)
    assert torch.equal(processor.image_processor(files[name][1], transform), before[1])


def test_processors_of_videos(numbered, toys, files):
    processor = PROCESSORS["video"].from_pretrained(toys / "video")
    whole = processor(numbered)["pixel_values"]
    assert numbers(whole[0]) == [0, 4, 8, 12, 16, 20, 24, 29]
    part = {"clip_start_sec": 1.0, "clip_end_sec": 2.0, "num_frames": None}
    found = processor.image_processor(numbered, processor.transform, video_decode_backend="pytorchvideo", **part)
    assert numbers(found["video"]) == [10, 11, 12, 13, 15, 16, 17, 19]
    for num_frames, expected in ((10, [0, 3, 6, 9, 12, 16, 19, 22, 25, 29]), (3, [0, 14, 29])):
        processor.config.vision_config.num_frames = num_frames
        for backend in ("opencv", "pytorchvideo"):
            processor.config.vision_config.video_decode_backend = backend
            assert numbers(processor([numbered, numbered])["pixel_values"][1]) == expected
    # A list of pictures is one clip, and a list of such lists, or of arrays (T, H, W, 3), is a batch
    frames = [Image.fromarray(np.full((60, 70, 3), 8 * i, np.uint8)) for i in range(5)]
    arrays = [np.asarray(frame) for frame in frames]
    for clip in (frames, tuple(arrays), [frames], [arrays, arrays], np.stack(arrays), [np.stack(arrays)]):
        assert numbers(processor(clip)["pixel_values"][0]) == [0, 2, 4]
    close(processor(np.stack(arrays) / np.float32(255))["pixel_values"], processor(frames)["pixel_values"], 1e-5)
    assert numbers(load_and_transform_video(arrays, processor.transform, num_frames=2)) == [0, 4]
    assert processor([files["image"]])["pixel_values"].shape == (1, 3, 3, 56, 56)  # pictures by path


def test_frames_of_decord_and_its_torch_bridge(numbered):
    reader = decord.VideoReader(numbered)
    processor = PROCESSORS["video"](plain(num_frames=3, image_size=64))
    assert numbers(processor(reader.get_batch(range(7)))["pixel_values"][0]) == [0, 3, 6]
    assert get_image_transform(plain())(reader[3]).shape == (3, 224, 224)
    decord.bridge.set_bridge("torch")
    try:
        clip = reader.get_batch(range(2, 4)).permute(3, 0, 1, 2)
        assert numbers(processor.transform(clip)) == [2, 3]
        video = languagebind.modality_class("video")(num_frames=3, video_backend="decord")
        assert numbers(video.preprocess(numbered)) == [0, 14, 29]
    finally:
        decord.bridge.reset_bridge()


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_namespaces(toys, files, name):
    config = CONFIGS[name].from_pretrained(toys / name)
    values = {
        key: value for key, value in config.vision_config.to_dict().items() if key in CLIPVisionConfig.__annotations__
    }
    processor = PROCESSORS[name](config=plain(**values))
    assert torch.equal(processor(files[name])["pixel_values"], PROCESSORS[name](config)(files[name])["pixel_values"])
    if name != "audio":
        assert processor.crop_size == {"height": 56, "width": 56}
        assert (processor.size, processor.image_mean, processor.image_std) == ({"shortest_edge": 56}, MEAN, STD)


ARGS = Namespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")


def test_what_video_llava_calls(toys, files):
    """The calls of its builder.py, llava_arch.py and mm_utils.py."""
    image = LanguageBindImageTower(str(toys / "image"), args=ARGS, cache_dir="./cache_dir", delay_load=True)
    video = LanguageBindVideoTower(video_tower=str(toys / "video"), args=ARGS, cache_dir="./cache_dir", delay_load=True)
    assert (image.image_tower_name, video.video_tower_name) == (str(toys / "image"), str(toys / "video"))
    assert not image.is_loaded
    assert max(getattr(None, "hidden_size", -1), getattr(video, "hidden_size", -1)) == image.hidden_size == 32
    assert not list(image.parameters())
    for tower in (image, video):
        tower.load_model()
        tower.to(device="cpu", dtype=torch.float16)
        assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert video.config.num_frames == 8
    processor, picture = image.image_processor, Image.open(files["image"][0])
    grey = tuple(int(x * 255) for x in processor.image_mean)
    padded = ImageOps.pad(picture, (80, 80), color=grey)
    x = processor.preprocess(padded, return_tensors="pt")["pixel_values"][0]
    close(x[:, 0].mean(dim=1), torch.zeros(3), 0.02)  # the padding
    images = torch.stack([x, processor([picture], return_tensors="pt")["pixel_values"][0]])
    clips = [video.video_processor(file, return_tensors="pt")["pixel_values"][0] for file in files["video"]]
    projector = nn.Linear(image.hidden_size, 8)
    features = projector(image(images))
    assert features.shape == (2, image.num_patches, 8)
    assert projector(video(torch.stack(clips))).shape == (2, 8, video.num_patches + 1, 8)
    assert torch.equal(torch.cat(image(list(images.half()))), image(images.half()))
    assert image.dummy_feature.dtype == torch.float16


def test_states_of_towers_have_video_llavas_names(toys):
    tower = LanguageBindImageTower(image_tower=toys / "image", args=ARGS)
    encoder = languagebind.LanguageBindImage.from_pretrained(toys / "image").vision_model
    expected = {f"image_tower.{name}": value for name, value in encoder.state_dict().items()}
    state = tower.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, state[name]) for name, value in expected.items())
    with torch.no_grad():
        tower.image_tower.post_layernorm.bias.add_(1)
    tower.load_state_dict(expected | {"image_tower.embeddings.position_ids": torch.arange(17)[None]})
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in expected.items())
    assert next(iter(LanguageBindVideoTower(toys / "video", ARGS).state_dict())).startswith("video_tower.")
    for call in (lambda: LanguageBindImageTower(video_tower="x", args=ARGS), lambda: LanguageBindImageTower(args=ARGS)):
        with pytest.raises(TypeError, match="expected the argument image_tower"):
            call()


def test_frames_in_four_dimensions_have_a_feature_each(toys):
    model = LanguageBindVideo.from_pretrained(toys / "video")
    clips = torch.randn(3, 3, 8, 56, 56)
    frames = clips.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        features = model.get_image_features(frames)
        assert features.shape == (24, 16)
        close(features.view(3, 8, 16).mean(dim=1), model.get_image_features(clips))
        assert features.view(3, 8, 16).std(dim=1).min() > 1e-3
        bind = languagebind.LanguageBind({"video": str(toys / "video")}, use_temp=False)
        close(bind({"video": {"pixel_values": frames}})["video"], F.normalize(features, dim=-1))
    with pytest.raises(ValueError, match="12 frames are not whole clips of 8 frames"):
        model.get_image_features(frames[:12])


def test_the_attributes_of_embeddings(toys):
    for name, size in (("audio", [28, 98]), ("video", 56), ("depth", 56)):
        model = getattr(languagebind, f"LanguageBind{name.title()}").from_pretrained(toys / name)
        embeddings = model.vision_model.embeddings
        assert (embeddings.image_size, embeddings.num_patches) == (size, 14 if name == "audio" else 16)
        assert torch.equal(embeddings.position_ids, torch.arange(embeddings.num_patches + 1)[None])

    def rectangular(self, pixel_values):
        """What a client puts in place of CLIP's own method, which refuses pictures that are not square."""
        count, _, height, width = pixel_values.shape
        assert [height, width] == [28, 98]
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(count, 1, -1), patches], dim=1)
        return x + self.position_embedding(self.position_ids)

    model = LanguageBindAudio.from_pretrained(toys / "audio")
    sounds = torch.randn(2, 3, 28, 98)
    with torch.no_grad():
        before = model.get_image_features(sounds)
        model.vision_model.embeddings.forward = types.MethodType(rectangular, model.vision_model.embeddings)
        close(model.get_image_features(sounds), before)


def test_gradient_checkpointing_recomputes_the_blocks(toys):
    def step(model):
        calls = []
        for block in [*model.vision_model.encoder.layers, *model.text_model.encoder.layers]:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(0)
        model(torch.randint(1, 49000, (2, 9)), torch.randn(2, 3, 8, 56, 56), return_loss=True).loss.backward()
        return len(calls), {name: parameter.grad for name, parameter in model.named_parameters()}

    plain_model, model = (LanguageBindVideo.from_pretrained(toys / "video").train() for _ in range(2))
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert model.vision_model.encoder.gradient_checkpointing
    (once, expected), (twice, found) = step(plain_model), step(model)
    assert (once, twice) == (4, 8)
    for name, gradient in expected.items():
        close(found[name], gradient, 1e-6)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_the_attributes_of_models_and_configs(toys):
    model = LanguageBindVideo.from_pretrained(toys / "video")
    assert (model.projection_dim, model.vision_embed_dim, model.text_embed_dim) == (16, 32, 32)
    assert model.get_input_embeddings() is model.text_model.embeddings.token_embedding
    assert isinstance(model.vision_model, CLIPVisionTransformer)
    assert isinstance(model.vision_model.encoder.layers[0], CLIPEncoderLayer)
    config = type(model.config).from_text_vision_configs(
        model.config.text_config, model.config.vision_config, projection_dim=16
    )
    again = LanguageBindVideo(config)
    again.load_state_dict(model.state_dict())
    config = CLIPVisionConfig.from_pretrained(toys / "video")  # the vision part of the file
    clips = torch.randn(1, 3, 8, 56, 56)
    tower = CLIPVisionTransformer(config)
    tower.load_state_dict(model.vision_model.state_dict())
    close(tower(clips)[1], model.vision_model(clips)[1])


def test_hooks_of_clients_read_the_first_of_a_tuple(toys):
    model, seen = LanguageBindImage.from_pretrained(toys / "image"), []
    layers = model.vision_model.encoder.layers
    layers[0].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    layers[0].self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    x = torch.randn(2, *layers[0].layer_norm1.weight.shape).unsqueeze(1)
    (alone,) = layers[0](x, None, None)
    assert [y.shape for y in (*seen, *model.vision_model.encoder(x))] == [x.shape] * 3
    torch.testing.assert_close(alone, seen[1])


def test_a_subclass_keeps_the_published_weights_and_initialises_its_own(toys):
    class Config(LanguageBindImageConfig):
        pass

    class Classifier(LanguageBindImage):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.head = torch.nn.Linear(config.projection_dim, 3)

    torch.manual_seed(0)
    model, plain = Classifier.from_pretrained(toys / "image"), LanguageBindImage.from_pretrained(toys / "image")
    assert isinstance(model.config, Config)
    assert model.name_or_path == model.config.name_or_path == str(toys / "image")
    assert 0 < model.head.weight.abs().max() <= model.config.projection_dim**-0.5  # PyTorch's range
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())


def test_open_files_are_read(toys, files):
    for name in ("image", "depth", "audio", "video"):
        processor = PROCESSORS[name].from_pretrained(toys / name)
        path = Path(files[name][0])
        expected = processor(str(path))["pixel_values"]
        with path.open("rb") as file:
            assert torch.equal(processor([file])["pixel_values"], expected)
        assert torch.equal(processor(io.BytesIO(path.read_bytes()))["pixel_values"], expected)


def test_the_transform_of_sounds_can_be_printed_and_copied(toys):
    transform = PROCESSORS["audio"].from_pretrained(toys / "audio").transform
    assert "AudioTransform" in repr(transform)
    other, sound = copy.copy(transform), (torch.sin(torch.arange(40_000) / 9)[None], 16000)
    other.audio_mean = transform.audio_mean + 1
    assert not torch.equal(other(sound), transform(sound))


def test_an_image_processor_in_place_of_ours_gets_the_options_of_the_config(toys):
    processor = PROCESSORS["video"].from_pretrained(toys / "video")
    processor.config.vision_config.num_frames = 2
    seen = {}
    processor.image_processor = lambda item, transform, **options: seen.update(options) or torch.zeros(3)
    processor("a.mp4")
    assert seen == {"video_decode_backend": processor.config.vision_config.video_decode_backend, "num_frames": 2}
