"""Audio: every container and rate to the same spectrogram, and no spectrogram of half a file."""

import io
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from helpers import ROOT

from languagebind.data.packing import PackOptions, pack
from languagebind.data.sources import Sample
from languagebind.modalities import DecodeError
from languagebind.modalities._fbank import log_mel, split_frames
from languagebind.modalities.audio import Audio

RATE = 16_000
SOUNDFILE_FORMS = {
    "wav": ("WAV", "PCM_16"),
    "wav 8": ("WAV", "PCM_U8"),
    "wav 24": ("WAV", "PCM_24"),
    "wav float": ("WAV", "FLOAT"),
    "wav 64": ("RF64", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
}
AV_FORMS = {"m4a": ("mp4", "aac"), "mka": ("matroska", "aac"), "webm": ("webm", "libopus"), "aac": ("adts", "aac"),
            "ac3": ("ac3", "ac3"), "wv": ("wv", "wavpack"), "tta": ("tta", "tta"), "avi": ("avi", "pcm_s16le"),
            "caf": ("caf", "alac"), "mp3 in wav": ("wav", "libmp3lame"), "ac3 in wav": ("wav", "ac3"),
            "ts": ("mpegts", "aac")}  # fmt: skip


def chirp(seconds: float = 3.0, rate: int = RATE) -> np.ndarray:
    """Noise over a tone that rises from 300 Hz: (samples,) float32."""
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.03, len(t))
    return (0.3 * np.sin(2 * np.pi * (300 * t + 200 * t**2)) + noise).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE, form: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


class Pipe:
    """A file that can only be written to, from its start to its end."""

    def __init__(self):
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += bytes(data)
        return len(data)


def encode_av(
    path: Path | Pipe, form: str, codec: str, samples: np.ndarray, rate: int = 48_000, **options: str
) -> bytes:
    with av.open(path if isinstance(path, Pipe) else str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.rate = rate
        container.mux([*stream.encode(frame), *stream.encode()])
    return path.data if isinstance(path, Pipe) else path.read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    path, loud = tmp_path_factory.mktemp("sound") / "file", chirp(rate=48_000)
    files = {name: wav(loud, 48_000, *form) for name, form in SOUNDFILE_FORMS.items()}
    files |= {name: encode_av(path, *form, loud) for name, form in AV_FORMS.items()}
    # Without the Xing header: libsndfile would guess the length and cut the sound short
    files["bare mp3"] = encode_av(path, "mp3", "libmp3lame", loud, write_xing="0")
    return files


@pytest.mark.parametrize("name", [*SOUNDFILE_FORMS, *AV_FORMS, "bare mp3"])
def test_every_container_gives_the_sound(files, tmp_path, name):
    audio = Audio()
    path = tmp_path / "sound.file"
    path.write_bytes(files[name])
    waveform, rate = audio.decode(path)
    assert (len(waveform), rate) == (1, 48_000)
    assert abs(waveform.shape[1] - 3 * rate) < 0.06 * rate  # lossy coders pad with up to two of their frames
    expected = audio.preprocess((chirp(rate=48_000), 48_000))
    assert (audio.preprocess(path) - expected).abs().mean() < (
        0.01 if name.startswith(("wav", "flac", "aiff")) else 0.2
    )


@pytest.mark.parametrize(("rate", "count"), [(8_000, 4948), (22_050, 700), (44_100, 3001), (44_100, 31_311)])
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_short_ogg_files_end_where_their_last_page_says(rate, count, subtype):
    rate = 48_000 if subtype == "OPUS" else rate
    count = max(count, rate // 20)
    waveform, found = Audio().decode(wav(chirp(1.0, rate)[:count], rate, "OGG", subtype))
    assert (waveform.shape, found) == ((1, count), rate)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 44_101, 48_000, 96_000, 192_000])
def test_every_rate_is_resampled(rate):
    low = Audio(num_mel_bins=32)  # the bands that 8 kHz can hold are compared
    tone = [np.sin(2 * np.pi * 440 * np.arange(2 * r) / r).astype(np.float32) for r in (rate, RATE)]
    x, expected = low.preprocess((tone[0], rate)), low.preprocess((tone[1], RATE))
    loud = expected[:, :, :, :190] > 0.3
    assert loud.any()
    assert (x[:, :, :, :190] - expected[:, :, :, :190])[loud].abs().mean() < 0.02


def test_channels_are_mixed_or_the_first_is_taken():
    left, right = chirp(), np.zeros(3 * RATE, np.float32)
    both = np.stack([left, right])
    for audio, expected in ((Audio(), left / 2), (Audio(channels="first"), left - left.mean() / 2)):
        torch.testing.assert_close(
            audio.preprocess((both, RATE)), Audio().preprocess((expected, RATE)), atol=1e-4, rtol=0
        )
    assert torch.equal(Audio().preprocess((both, RATE)), Audio().preprocess(wav(both.T, subtype="FLOAT")))


def test_waveform_forms_agree():
    samples = (chirp() * 32767).astype(np.int16)
    expected = Audio().preprocess(wav(samples))
    floats = samples / np.float32(32768)
    read_only = floats.copy()
    read_only.flags.writeable = False
    forms = [
        samples,
        floats,
        floats.astype(np.float64),
        samples[None],
        floats[:, None],
        floats.astype(">f4"),
        read_only,
    ]
    for value in [*forms, torch.from_numpy(floats), samples.astype(np.int32) * 65536]:
        assert torch.equal(Audio().preprocess((value, RATE)), expected)


def test_short_clips_are_tiled():
    x = Audio().preprocess((chirp(1.0), RATE))  # 98 frames
    assert torch.equal(x[0], x[1])
    assert torch.equal(x[0], x[2])
    assert torch.equal(x[..., 98:], x[..., :-98])


def test_a_clip_of_exactly_one_crop_is_kept_whole():
    samples = chirp(11)[: 400 + 1035 * 160]
    x = Audio().preprocess((samples, RATE))
    assert torch.equal(x, Audio().preprocess((samples, RATE), torch.Generator().manual_seed(0)))
    assert torch.equal(x[0], x[2])


@pytest.mark.parametrize(("frames", "starts"), [(400, [0, 101, 201]), (101, [0, 1, 0]), (102, [0, 1, 2])])
def test_long_clips_give_the_first_crop_of_each_third(frames, starts):
    audio = Audio(target_length=100)
    samples = chirp(5)[: 400 + (frames - 1) * 160]
    everything = Audio(target_length=frames).preprocess((samples, RATE))[0]  # (1, mel, frames)
    x = audio.preprocess((samples, RATE))
    for channel, start in enumerate(starts):
        assert torch.equal(x[channel], everything[..., start : start + 100])


def test_random_crops_stay_in_their_third():
    audio = Audio(target_length=10)
    rng = torch.Generator().manual_seed(0)
    draws = np.array([audio._starts(90, rng) for _ in range(200)])
    for third in range(3):
        assert (draws[:, third].min(), draws[:, third].max()) == (30 * third, 30 * third + 29)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["wav", "wav float", "wav 64", "flac", "ogg", "opus", "mp3", "aiff", "m4a"])
def test_a_cut_file_is_refused(files, name, share):
    with pytest.raises(DecodeError):
        Audio().decode(files[name][: int(len(files[name]) * share)])


@pytest.mark.parametrize("name", ["mka", "webm"])
def test_half_a_matroska_file_is_refused(files, name):
    with pytest.raises(DecodeError):
        Audio(max_seconds=60).decode(files[name][: len(files[name]) // 2])


@pytest.mark.parametrize("name", ["flac", "mp3", "m4a"])
def test_a_tail_of_zeros_is_refused(files, name):
    half = len(files[name]) // 2
    with pytest.raises(DecodeError):
        Audio().decode(files[name][:half] + bytes(len(files[name]) - half))


@pytest.mark.parametrize("form", ["wav", "rf64", "flac", "caf", "au"])
def test_sound_from_a_pipe_is_read_to_its_end(form):
    """Its header was written before its length was known."""
    samples = (chirp() * 32767).astype(np.int16)
    codec = {"flac": "flac", "wav": "pcm_s16le", "rf64": "pcm_s16le"}.get(form, "pcm_s16be")
    options = {"rf64": "always"} if form == "rf64" else {}
    data = encode_av(Pipe(), form.replace("rf64", "wav"), codec, samples / np.float32(32768), RATE, **options)
    waveform, rate = Audio().decode(data)
    assert rate == RATE
    assert abs(waveform[0].numpy() * 32768 - samples).max() <= 1  # FFmpeg may round floats the other way


@pytest.mark.parametrize(
    ("whole", "size"), [(0, 0), (36, 0), (0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000), (0xFFFFFFFF, 0xFFFFFFFF)]
)
def test_wav_sizes_that_stand_for_an_unknown_length(whole, size):
    file = wav(chirp())
    expected, data = Audio().decode(file)[0], file.index(b"data")
    for magic in (b"RIFF", b"RF64", b"BW64") if size else (b"RIFF",):  # of a recorder that was switched off, sox, ...
        header = magic + struct.pack("<I", whole) + file[8 : data + 4] + struct.pack("<I", size)
        assert torch.equal(Audio().decode(header + file[data + 8 :])[0], expected)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the ffmpeg command is not installed")
@pytest.mark.parametrize("kind", ["mp2", "mka", "au", "w64", "tta", "dts", "caf", "wv", "ac3"])
def test_rarer_kinds_of_sound_are_packed(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    form = ["-strict", "-2"] if kind == "dts" else []
    (tmp_path / "first.wav").write_bytes(wav(chirp(), RATE))
    command = ["ffmpeg", "-v", "error", "-y", "-i", tmp_path / "first.wav", "-ar", "48000", *form, path]
    subprocess.run(command, check=True)
    packed = pack(Sample("a", {"audio": [[path]]}, {"caption": "a rising tone"}), PackOptions())
    assert isinstance(packed, tuple), packed
    assert packed[1] == {kind: path.read_bytes()}
    samples, rate = Audio().decode(packed[1][kind])
    assert abs(samples.shape[1] / rate - len(chirp()) / RATE) < 0.06


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the ffmpeg command is not installed")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mov", "-c:a pcm_s16le"), ("a.mov", "-c:a pcm_s24be"), ("a.mov", "-c:a pcm_mulaw"),
        ("a.mov", "-f lavfi -i testsrc=s=32x32:d=3 -c:v mpeg4 -c:a pcm_s16le -ss 1"),
        ("a.wav", "-ar 8000 -c:a libgsm_ms"),
        ("a.mka", "-c:a flac -output_ts_offset 5"),
        ("a.mkv", "-i second.wav -map 0 -map 1 -c:a flac -disposition:0 0 -disposition:1 default"),
        ("a.mkv", "-i second.wav -map 0 -map 1 -c:a flac -disposition:0 0 -disposition:1 0"),
    ],
)  # fmt: skip
def test_samples_are_those_of_ffmpeg(tmp_path, name, options):
    """The sound of cameras and telephones, a late beginning, and the second of two tracks."""
    (tmp_path / "first.wav").write_bytes(wav(chirp(), RATE))
    (tmp_path / "second.wav").write_bytes(wav(np.stack([chirp()[::-1], chirp()], 1), RATE))
    command = ["ffmpeg", "-v", "error", "-y", "-i", "first.wav"]
    subprocess.run([*command, *options.split(), name], cwd=tmp_path, check=True)
    raw = subprocess.run(["ffmpeg", "-v", "error", "-i", name, "-f", "f32le", "-"], cwd=tmp_path, capture_output=True)
    samples, _ = Audio().decode(tmp_path / name)
    expected = np.frombuffer(raw.stdout, np.float32).reshape(-1, len(samples)).T
    assert len(samples) == (2 if "second" in options else 1)
    np.testing.assert_allclose(samples.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "opus"])
def test_joined_files_are_read_to_the_end(files, form):
    """As `cat a b > c` makes them, or a recording of web radio; the header of the first knows its own length alone."""
    one, other = files[form], wav(chirp(1.5, 48_000)[::-1].copy(), 48_000, *SOUNDFILE_FORMS[form])
    expected = torch.cat([Audio().decode(file)[0] for file in (one, other, one)], dim=1)
    assert torch.equal(Audio().decode(one + other + one)[0], expected)
    with pytest.raises(DecodeError):
        Audio().decode(one + other[: len(other) // 2])
    with pytest.raises(DecodeError, match="change within the file"):
        Audio().decode(one + wav(chirp(rate=RATE), RATE, *SOUNDFILE_FORMS[form]))
    with pytest.raises(DecodeError, match="exceed"):
        Audio(max_seconds=4).decode(one + one)


@pytest.mark.parametrize("first", ["mp3", "bare mp3"])
@pytest.mark.parametrize("second", ["mp3", "bare mp3"])
@pytest.mark.parametrize("between", [b"", bytes(500), b"TAG" + bytes(125), b"ID3\4\0\0\0\0\1\0" + b"x" * 128])
def test_joined_mp3_are_read_to_the_end(files, first, second, between):
    data, frame = files[first] + between + files[second], 1152 / 48_000
    waveform, rate = Audio().decode(data)
    assert abs(waveform.shape[1] / rate - 6) < 5 * frame  # coders pad at both ends
    end, expected = (Audio(target_length=250).preprocess((x[:, -130_000:], rate))  # the beginning says nothing
                     for x in (waveform, Audio().decode(files[second])[0]))  # fmt: skip
    assert (end - expected).abs().mean() < 0.1


@pytest.mark.parametrize("form", ["flac", "mp3", "bare mp3", "ogg", "wav"])
def test_zeros_around_a_file_do_not_matter(files, form):
    expected = Audio().decode(files[form])[0]
    for zeros in (9, 100_000):
        assert torch.equal(Audio().decode(bytes(zeros) + files[form])[0], expected)
        assert torch.equal(Audio().decode(files[form] + bytes(zeros))[0], expected)


def test_a_part_of_a_flac_that_was_copied_is_read(files, tmp_path):
    """As `ffmpeg -ss 1 -t 1 -c copy` cuts it: the header has the length of the whole, the frames keep their numbers."""
    with av.open(io.BytesIO(files["flac"])) as whole, av.open(str(tmp_path / "part.flac"), "w") as part:
        stream = part.add_stream_from_template(whole.streams.audio[0])
        packets = [packet for packet in whole.demux(audio=0) if packet.size]
        kept = packets[10:20]
        start, end = kept[0].pts, kept[-1].pts + kept[-1].duration
        for packet in kept:
            packet.stream = stream
            part.mux(packet)
    data = (tmp_path / "part.flac").read_bytes()
    total = data.index(b"fLaC") + 8 + 13  # STREAMINFO: the length of the whole, as FFmpeg keeps it
    data = data[:total] + files["flac"][total : total + 21] + data[total + 21 :]
    assert torch.equal(Audio().decode(data)[0], Audio().decode(files["flac"])[0][:, start:end])
    with pytest.raises(DecodeError):
        Audio().decode(data[:-9])


@pytest.mark.parametrize("form", ["flac", "ogg", "opus", "wv", "tta"])
def test_a_damaged_file_is_refused(files, form):
    for share in (0.4, 0.8):
        data = bytearray(files[form])
        data[int(len(data) * share)] ^= 0xFF
        with pytest.raises(DecodeError):
            Audio().decode(bytes(data))


@pytest.mark.parametrize("form", ["ogg", "opus"])
def test_an_ogg_file_may_lack_the_mark_of_its_last_page(files, form):
    expected = Audio().decode(files[form])[0]
    pages = files[form][: files[form].rindex(b"OggS")]
    waveform = Audio().decode(pages)[0]
    assert waveform.shape[1] > 0.3 * expected.shape[1]
    assert torch.equal(waveform, expected[:, : waveform.shape[1]])
    with pytest.raises(DecodeError, match="truncated"):
        Audio().decode(pages[:-9])


def test_a_wav_that_promises_hours_is_refused_at_once():
    file = bytearray(wav(chirp(1.0)))
    data = file.index(b"data") + 4
    for promise in (len(file), 16_000 * 2 * 3600 * 5, 0xFFFFFFFF):
        file[data : data + 4] = struct.pack("<I", promise)
        with pytest.raises(DecodeError, match="promises"):
            Audio().decode(bytes(file))


def test_hours_in_a_small_file_are_not_decoded():
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as writer:
        for _ in range(90):
            writer.write(np.zeros(8_000 * 60, np.int16))
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match=r"exceeds? --max-seconds 600"):
        Audio().decode(file.getvalue())
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


@pytest.mark.parametrize("name", ["wav", "m4a"])
def test_the_length_limit_is_an_option(files, name):
    Audio(max_seconds=3.5).decode(files[name])
    with pytest.raises(DecodeError, match=r"exceeds? --max-seconds 2\.5"):
        Audio(max_seconds=2.5).decode(files[name])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ((np.zeros(399, np.float32), RATE), "shorter than one frame"),
        ((np.zeros((2, 0), np.float32), RATE), "shorter than one frame"),
        ((np.full(9000, np.nan, np.float32), RATE), "NaN"),
        ((np.array([0.1] * 9000 + [np.inf]), RATE), "NaN"),
        ((np.zeros(9000, np.uint8), RATE), "expected floats"),
        ((np.zeros(9000, object), RATE), "not supported"),
        ((np.zeros((1, 1, 9000)), RATE), "pair with a waveform that is an array"),
        (([0.0] * 9000, RATE), "pair with a waveform that is an array"),
        ((np.zeros(9000), 0), "rate"),
        ((np.zeros(9000), -16000), "rate"),
        ((np.zeros(9000), 2**31 - 1), "rate"),
        ((np.zeros(9000), None), "rate"),
        (np.zeros(9000), "pair"),
    ],
)
def test_what_is_no_sound_is_refused(value, reason):
    with pytest.raises(DecodeError, match=reason):
        Audio().preprocess(value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(bad):
    samples = chirp(1.0)
    samples[500] = bad
    with pytest.raises(DecodeError, match="NaN or infinity"):
        Audio().decode(wav(samples, subtype="FLOAT"))


def test_files_too_short_are_refused():
    for samples in (0, 1, 399):
        with pytest.raises(DecodeError):
            Audio().decode(wav(np.zeros(samples)))
    assert Audio().preprocess(wav(np.zeros(400))).isfinite().all()  # silence is a sound


def test_a_film_without_sound_is_refused(tmp_path):
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(DecodeError, match="no audio stream"):
        Audio().decode(tmp_path / "film.mp4")


def test_sizes_follow_the_options():
    assert Audio(num_mel_bins=126, target_length=1036).preprocess((chirp(), RATE)).shape == (3, 1, 126, 1036)
    assert Audio(num_mel_bins=64, target_length=200, sample_rate=8_000).preprocess((chirp(), RATE)).shape == (
        3,
        1,
        64,
        200,
    )


def sounds(samples: int, rate: int) -> dict[str, torch.Tensor]:
    """Waveforms of one length; beside the tone's band are ones that hold rounding errors alone."""
    rng, t = torch.Generator().manual_seed(samples), torch.arange(samples) / rate
    noise = torch.randn(samples, generator=rng)
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * t)
    return {"noise": 0.1 * noise, "faint": 1e-4 * noise, "silence": 0 * noise, "tone": tone, "offset": tone + 0.2}


@pytest.mark.parametrize("rate", [8_000, RATE, 22_050])
@pytest.mark.parametrize("bins", [112, 126, 128])
@pytest.mark.parametrize("samples", [600, 5_007, 50_000])
def test_the_filter_bank_is_kaldis(rate, bins, samples):
    from torchaudio.compliance.kaldi import fbank

    options = {"window_type": "hanning", "htk_compat": True, "use_energy": False, "dither": 0.0}
    waveforms = sounds(samples, rate)
    for waveform in waveforms.values():
        expected = fbank(waveform[None], sample_frequency=rate, num_mel_bins=bins, **options)
        mel = log_mel(split_frames(waveform, rate), rate, bins)
        torch.testing.assert_close(mel, expected, atol=1e-5, rtol=0)
    frames = split_frames(torch.stack(list(waveforms.values())), rate)  # (5, frames, window)
    together = log_mel(frames.flatten(0, 1), rate, bins)
    torch.testing.assert_close(together[-len(expected) :], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seconds", [2.5, 3.5, 6.0])
def test_crops_that_overlap_or_lie_apart_are_those_of_the_whole_clip(seconds):
    audio, samples = Audio(target_length=100), chirp(seconds)
    frames = split_frames(torch.from_numpy(samples - samples.mean()), RATE)
    whole = ((log_mel(frames, RATE, 112) - audio.audio_mean) / (2 * audio.audio_std)).T
    x = audio.preprocess((samples, RATE), torch.Generator().manual_seed(1))
    starts = audio._starts(len(frames) - 99, torch.Generator().manual_seed(1))
    for channel, start in enumerate(starts):
        torch.testing.assert_close(x[channel, 0], whole[:, start : start + 100], atol=1e-5, rtol=0)


def test_the_number_of_threads_changes_nothing():
    threads, spectrograms = torch.get_num_threads(), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        spectrograms.append(Audio().preprocess((chirp(6.0), RATE)))
    torch.set_num_threads(threads)
    assert torch.equal(spectrograms[0], spectrograms[1])
    assert torch.equal(spectrograms[0], spectrograms[2])


def test_sound_of_the_right_rate_needs_no_torchaudio():
    code = f"""if True:
        import sys, numpy
        from languagebind.modalities.audio import Audio
        Audio().preprocess((numpy.zeros({RATE}, "float32"), {RATE}))
        print("torchaudio" in sys.modules)
        Audio().preprocess((numpy.zeros({RATE}, "float32"), 8000))
        print("torchaudio" in sys.modules)
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
