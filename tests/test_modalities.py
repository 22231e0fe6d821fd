"""What holds for every modality: the original's tensors, the contract, options, and nothing imported too early."""

import dataclasses
import io
import subprocess
import sys
import textwrap

import av
import numpy as np
import pytest
import soundfile
import torch
from helpers import ROOT
from PIL import Image

import languagebind.modalities
from languagebind.config import UserError
from languagebind.modalities import DecodeError, modality_class, modality_name, modality_names

MODALITIES = ["audio", "depth", "image", "infrared", "video"]


def png(array: np.ndarray, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    return file.getvalue()


def clip() -> bytes:
    """Twelve noisy frames of 64x48, H.264 in MP4."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(12):
            picture = rng.integers(256, size=(48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A usable file of each modality, with enough in it that a crop or a flip shows."""
    rng, sound = np.random.default_rng(0), io.BytesIO()
    soundfile.write(sound, rng.normal(0, 0.1, 16000 * 12), 16000, format="WAV")
    return {
        "audio": sound.getvalue(),
        "depth": png(rng.integers(500, 9000, size=(60, 90), dtype=np.uint16)),
        "image": png(rng.integers(256, size=(60, 90, 3), dtype=np.uint8)),
        "infrared": png(rng.integers(256, size=(60, 90), dtype=np.uint8)),
        "video": clip(),
    }


def make(name: str, **options):
    return modality_class(name)(**options)


def test_the_five_modalities_are_there():
    assert modality_names() == MODALITIES
    assert [modality_name(make(name)) for name in MODALITIES] == MODALITIES


@pytest.mark.parametrize(
    ("name", "file", "key", "mean_difference", "max_difference"),
    [
        ("image", "image/{}.jpg", "image_{}", 1e-5, 1e-4),
        ("infrared", "thermal/{}.jpg", "thermal_{}", 1e-5, 1e-4),
        ("depth", "depth/{}.png", "depth_{}", 1e-5, 1e-4),
        ("audio", "audio/{}.wav", "audio_{}", 1e-4, 1e-3),
        ("video", "video/{}.mp4", "video_{}", 2e-3, 2e-2),
    ],
)
@pytest.mark.parametrize("sample", [0, 1])
def test_tensors_match_the_original(golden, name, file, key, mean_difference, max_difference, sample):
    expected = torch.from_numpy(np.load(golden / "golden/preprocess.npz")[key.format(sample)]).float()
    expected = expected if expected.ndim == 4 else expected[:, None]  # (C, T, H, W)
    difference = (make(name).preprocess(golden / "media" / file.format(sample)) - expected).abs()
    assert difference.mean() <= mean_difference
    assert difference.max() <= max_difference


@pytest.mark.parametrize("channels", ["mix", "first"])
def test_three_seconds_of_sound_are_tiled_as_in_the_original(golden, channels):
    samples, rate = soundfile.read(golden / "media/audio/0.wav", dtype="float32")
    expected = torch.from_numpy(np.load(golden / "golden/preprocess.npz")["audio_short_0"])[:, None]
    x = make("audio", channels=channels).preprocess((samples[: 3 * rate], rate))
    torch.testing.assert_close(x, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", MODALITIES)
def test_path_and_bytes_agree_and_evaluation_repeats_every_bit(files, tmp_path, name):
    modality = make(name)
    path = tmp_path / "sample"
    path.write_bytes(files[name])
    x = modality.preprocess(files[name])
    assert tuple(x.shape) == modality.input_shape
    assert x.dtype == torch.float32
    torch.manual_seed(1)
    assert torch.equal(x, modality.preprocess(path))
    assert torch.equal(x, modality.preprocess(str(path)))


@pytest.mark.parametrize("name", MODALITIES)
def test_only_the_generator_decides_an_augmentation(files, name):
    switches = {"random_crop": True} if name == "audio" else {"random_crop": True, "hflip": 0.5}
    modality = make(name, **switches)
    raw, before = modality.decode(files[name]), torch.get_rng_state()
    draws = [modality.transform(raw, torch.Generator().manual_seed(seed)) for seed in (0, 1, 2, 3, 0)]
    assert torch.equal(draws[0], draws[4])
    assert not all(torch.equal(draws[0], x) for x in draws[1:4])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(modality.transform(raw), make(name).preprocess(files[name]))


@pytest.mark.parametrize("name", MODALITIES)
def test_switched_off_augmentation_leaves_evaluation(files, name):
    off = {"random_crop": False} if name == "audio" else {"random_crop": False, "hflip": 0.0}
    modality = make(name, **off)
    trained = modality.preprocess(files[name], torch.Generator().manual_seed(0))
    assert torch.equal(trained, modality.preprocess(files[name]))


@pytest.mark.parametrize("name", ["depth", "image", "infrared"])
def test_still_pictures_are_not_augmented_by_default(files, name):
    trained = make(name).preprocess(files[name], torch.Generator().manual_seed(0))
    assert torch.equal(trained, make(name).preprocess(files[name]))


@pytest.mark.parametrize("name", ["depth", "image", "infrared", "video"])
def test_a_certain_flip_mirrors(files, name):
    modality = make(name, hflip=1.0, random_crop=False)
    flipped = modality.preprocess(files[name], torch.Generator())
    assert torch.equal(flipped.flip(-1), modality.preprocess(files[name]))


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize(
    "content", [b"", b"\0", bytes(5000), b"not media at all\n" * 99], ids=["empty", "0", "0s", "text"]
)
def test_junk_is_refused_by_name(tmp_path, name, content):
    path = tmp_path / "junk.file"
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"junk\.file: \w+"):
        make(name).preprocess(path)
    with pytest.raises(DecodeError, match=f"<{len(content)} bytes>: "):
        make(name).preprocess(content)


@pytest.mark.parametrize("name", MODALITIES)
def test_a_git_lfs_pointer_is_named_as_one(tmp_path, name):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2127000\n".encode()
    (tmp_path / "a.media").write_bytes(text)
    for source in (tmp_path / "a.media", text):
        with pytest.raises(DecodeError, match="Git LFS pointer"):
            make(name).preprocess(source)


@pytest.mark.parametrize("name", MODALITIES)
def test_what_is_no_file_is_refused(tmp_path, name):
    for path in (tmp_path, tmp_path / "missing", "nul\0character"):
        with pytest.raises(DecodeError, match=r".+: .+"):
            make(name).preprocess(path)


@pytest.mark.parametrize("name", MODALITIES)
def test_another_modality_s_file_is_refused(files, name):
    compatible = {"image", "infrared"} if name in ("image", "infrared") else {name}
    # A depth PNG is a valid 16-bit picture; 8-bit pictures are no depth
    for other in set(MODALITIES) - compatible - {"depth"}:
        with pytest.raises(DecodeError):
            make(name).preprocess(files[other])


@pytest.mark.parametrize("name", MODALITIES)
def test_half_a_file_is_refused(files, name):
    half = files[name][: len(files[name]) // 2]
    with pytest.raises(DecodeError):
        make(name).preprocess(half)


@pytest.mark.parametrize("name", MODALITIES)
def test_a_huge_file_is_not_read(tmp_path, name):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2**36)  # 64 GiB that take no space
    with pytest.raises(DecodeError, match="sparse"):
        make(name).preprocess(path)


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize(
    "value", [None, 3, {"a": 1}, [], [None], np.zeros(0), np.array(["x"]), torch.zeros(2, 2, 2, 2, 2)], ids=str
)
def test_odd_values_in_memory_are_refused(name, value):
    with pytest.raises(DecodeError):
        make(name).preprocess(value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image", {"image_size": 0}),
        ("image", {"hflip": 1.5}),
        ("image", {"max_pixels": 0}),
        ("depth", {"max_depth": -1.0}),
        ("infrared", {"infrared_range": "all"}),
        ("infrared", {"infrared_range": (80, 0)}),
        ("infrared", {"infrared_range": (0, float("nan"))}),
        ("video", {"num_frames": 0}),
        ("video", {"max_seconds": 0.0}),
        ("video", {"video_backend": "vlc"}),
        ("audio", {"num_mel_bins": 0}),
        ("audio", {"target_length": -1}),
        ("audio", {"sample_rate": 0}),
        ("audio", {"sample_rate": 99}),
        ("audio", {"audio_std": 0.0}),
        ("audio", {"channels": "left"}),
    ],
)
def test_bad_options_name_their_flag(name, options):
    flag = next(iter(options)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{flag} is .*(set|choose) "):
        make(name, **options)


def test_an_infrared_range_is_two_words_or_two_numbers():
    from languagebind.config import from_dict, parse, to_dict

    kind = modality_class("infrared")
    for flags, expected in (("full", "full"), ("0 80", (0.0, 80.0)), ("-20.5 1e3", (-20.5, 1000.0))):
        options = parse(kind, ["--infrared-range", *flags.split()])
        assert options.infrared_range == expected
        assert from_dict(kind, to_dict(options)) == options


@pytest.mark.parametrize("name", MODALITIES)
def test_options_are_frozen_fields_with_help(name):
    from languagebind.config import parse

    cls = modality_class(name)
    assert parse(cls, []) == cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), dataclasses.fields(cls)[0].name, 1)


def test_decoders_wait_until_they_are_needed():
    code = """
        import sys
        from languagebind.modalities import modality_class
        for name in ("depth", "image", "infrared", "audio", "video"):
            modality_class(name)()
        print([m for m in ("decord", "torchcodec", "av", "cv2", "torchaudio", "soundfile", "PIL") if m in sys.modules])
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_new_file_is_a_new_modality(tmp_path, monkeypatch):
    (tmp_path / "gyro.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        import torch
        from languagebind.modalities import Modality, read

        @dataclass(frozen=True)
        class Gyro(Modality):
            extensions = ("gyro",)
            axes: int = 6

            @property
            def input_shape(self):
                return (1, 1, self.axes, 4)

            def decode(self, source):
                return torch.frombuffer(bytearray(read(source)), dtype=torch.uint8)

            def from_memory(self, value):
                return value

            def transform(self, raw, rng=None):
                return raw.float().view(self.input_shape)
        """)
    )
    monkeypatch.setattr(languagebind.modalities, "__path__", [*languagebind.modalities.__path__, str(tmp_path)])
    assert modality_names() == sorted([*MODALITIES, "gyro"])
    gyro = make("gyro", axes=2)
    assert modality_name(gyro) == "gyro"
    assert gyro.preprocess(bytes(range(8))).flatten().tolist() == list(range(8))
    picture, meaning = gyro.picture(gyro.decode(bytes(range(8))))  # without a method of its own
    assert (picture.dtype, len(picture)) == (torch.uint8, 3)
    assert "(black) to" in meaning
    with pytest.raises(ValueError, match=r"unknown modality 'smell'.*gyro"):
        modality_class("smell")


@pytest.mark.parametrize("name", MODALITIES)
def test_a_picture_for_people(name, files):
    modality = make(name)
    picture, meaning = modality.picture(modality.decode(files[name]))
    assert (picture.dtype, picture.ndim, len(picture)) == (torch.uint8, 3, 3)
    assert picture.float().std() > 20
    assert bool(meaning) == (name in ("audio", "depth", "video"))  # the colours of the others are what they seem


def test_a_picture_says_what_its_colours_mean():
    depth, meaning = make("depth").picture(torch.tensor([[0.0, 1.0], [4.5, 20.0]]))
    assert depth.flatten(1).T.tolist() == [[0, 0, 0], [68, 1, 84], [43, 116, 142], [253, 231, 37]]
    assert meaning == "1.00 m (dark) to 10.00 m (bright); black: not measured"
    assert make("depth").picture(torch.zeros(2, 2))[1] == "no distance was measured"
    infrared, meaning = make("infrared").picture(torch.tensor([[[7000.0, 7400.0]]]))
    assert (infrared[:, 0].T.tolist(), meaning) == ([[0] * 3, [255] * 3], "7000 (black) to 7400 (white)")
    clip = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert make("video", num_frames=3).picture(clip)[0].unique().tolist() == [1]
