"""Render the recordings of a scene by each sensor: pictures and waveforms as arrays.

Video shows colour and material, depth distance, infrared temperature; all show shape, size, position and motion.
"""

from collections.abc import Callable

import numpy as np

from ..vidal import NUM_FRAMES
from .scenes import Scene

NUM_VIDEO_FRAMES = 2 * NUM_FRAMES  # VIDAL's stills are every second frame
FRAMES_PER_SECOND = 8
SAMPLE_RATE = 16_000  # Hz
NUM_AUDIO_SAMPLES = 41_200  # 256 windows of 25 ms, 10 ms apart

WALL_METRES = 9.5
ROOM_CELSIUS = 20.0
COLDEST, HOTTEST = -40.0, 110.0  # degrees Celsius; the infrared camera's range

_RGB = {
    "red": (210, 25, 25),
    "orange": (245, 140, 10),
    "yellow": (245, 230, 30),
    "green": (20, 160, 40),
    "blue": (25, 60, 215),
    "pink": (250, 110, 190),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
_RADIUS = {"small": 0.38, "large": 0.58}  # in half picture widths, at two metres


def video_frames(scene: Scene, size: int) -> np.ndarray:
    """Return the RGB frames (T, H, W, 3), uint8."""
    rng = np.random.default_rng([scene.seed, 0])
    u, v, cover = _object(scene, size, NUM_VIDEO_FRAMES)
    rows = np.linspace(-1, 1, size, dtype=np.float32)[:, None, None]
    wall = rng.uniform(90, 165) + rng.uniform(-15, 15, 3) + rows * rng.uniform(-20, 20)
    surface = np.array(_RGB[scene.colour], np.float32) * _material(scene.material, u, v)[..., None]
    picture = wall + cover[..., None] * (surface - wall)
    picture += rng.normal(0, 3, (size, size, 1))  # one pattern for all frames, which H.264 compresses well
    return np.clip(picture, 0, 255).astype(np.uint8)


def depth_frames(scene: Scene, size: int) -> np.ndarray:
    """Return the depth frames (T, H, W), uint16, in millimetres."""
    rng = np.random.default_rng([scene.seed, 1])
    u, v, cover = _object(scene, size, NUM_FRAMES)
    columns = np.linspace(-1, 1, size, dtype=np.float32)
    wall = WALL_METRES + rng.uniform(-0.3, 0.3) * columns
    front = scene.metres + 0.15 * np.minimum(u * u + v * v, 1)  # the side that faces the camera bulges
    metres = np.where(cover > 0.5, front, wall)
    metres = metres * (1 + rng.normal(0, 0.004, (len(metres), size, 1)))  # equal along a row, which PNG compresses well
    return np.round(metres * 1000).astype(np.uint16)


def infrared_frames(scene: Scene, size: int) -> np.ndarray:
    """Return the infrared frames (T, H, W), uint8: 0 for the camera's coldest temperature, 255 for the hottest."""
    rng = np.random.default_rng([scene.seed, 2])
    _, _, cover = _object(scene, size, NUM_FRAMES)
    columns = np.linspace(-1, 1, size, dtype=np.float32)
    room = ROOM_CELSIUS + rng.uniform(-2, 2) + rng.uniform(-2, 2) * columns
    celsius = room + cover * (scene.celsius - room)
    celsius = celsius + rng.normal(0, 0.8, celsius.shape)
    return np.clip(np.round((celsius - COLDEST) / (HOTTEST - COLDEST) * 255), 0, 255).astype(np.uint8)


def mask(scene: Scene, size: int, index: int) -> np.ndarray:
    """Return the mask (1, H, W), uint8, of the middle frame: the class `index` on the object, 255 (void) elsewhere."""
    cover = _object(scene, size, NUM_FRAMES)[2][NUM_FRAMES // 2]
    return np.where(cover > 0.5, index, 255).astype(np.uint8)[None]


def _object(scene: Scene, size: int, num_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pixel coordinates u, v from the object's centre in radii, and coverage from 0 to 1, all (T, H, W)."""
    x, y = scene.place(np.arange(num_frames, dtype=np.float32) / num_frames)
    # The camera zooms in on distant objects: in true perspective they would be too small to see.
    radius = _RADIUS[scene.size] * (2 / scene.metres) ** 0.15
    pixels = np.linspace(-1, 1, size, dtype=np.float32)
    u = (pixels[None, None, :] - x[:, None, None].astype(np.float32)) / radius
    v = (pixels[None, :, None] - y[:, None, None].astype(np.float32)) / radius
    tilt = np.float32(((scene.seed // 97) % 101 / 101 - 0.5) * 0.4)  # radians
    cos, sin = np.cos(tilt), np.sin(tilt)
    u, v = cos * u - sin * v, sin * u + cos * v
    pixel = 2 / size / radius
    return u, v, np.clip((1 - _OUTLINES[scene.shape](u, v)) / pixel + 0.5, 0, 1)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    turn = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + turn / 2) % turn - turn / 2)  # from the nearest point's axis
    return np.hypot(u, v) * (np.cos(angle) * 0.75 + np.sin(angle) * 1.45) / 0.85


# For each shape, a function that is 1 on the outline and less than 1 inside.
_OUTLINES = {
    "ball": lambda u, v: np.hypot(u, v),
    "cube": lambda u, v: np.maximum(np.abs(u), np.abs(v)) / 0.85,
    "pyramid": lambda u, v: np.maximum(v / 0.75, np.abs(u) * 1.0 - v * 0.55 + 0.42),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) / 0.28,
    "star": _star,
    "cross": lambda u, v: np.minimum(np.maximum(np.abs(u), np.abs(v) / 0.3), np.maximum(np.abs(u) / 0.3, np.abs(v))),
    "pole": lambda u, v: np.maximum(np.abs(u) / 0.22, np.abs(v) / 1.3),
    "heart": lambda u, v: np.hypot(u, (v + 0.1) * 1.1 + 0.55 * np.sqrt(np.abs(u) + 1e-6) - 0.2) / 0.85,
}


def _material(material: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the brightness of the surface. Plastic is even, wood has grain, metal has a bright streak."""
    if material == "wooden":
        return (0.8 + 0.2 * np.sin(14 * v + 2 * np.sin(3 * u))).astype(np.float32)
    if material == "metal":
        return (0.75 + 0.6 * np.exp(-(((u + v) / 0.25) ** 2))).astype(np.float32)
    return np.ones_like(u)


def waveform(scene: Scene) -> np.ndarray:
    """Return the waveform (samples,), int16."""
    rng = np.random.default_rng([scene.seed, 3])
    time = np.arange(NUM_AUDIO_SAMPLES) / SAMPLE_RATE
    sound = _SOUNDS[scene.sound](time, rng) * _envelope(scene.rhythm, time, rng)
    sound = sound / np.sqrt(np.mean(sound**2) + 1e-9)
    level = {"quiet": 0.01, "loud": 0.12}[scene.loudness] * rng.uniform(0.8, 1.25)
    sound = level * sound + 0.0005 * rng.standard_normal(len(time))
    return np.clip(sound * 32767, -32768, 32767).astype(np.int16)


def _envelope(rhythm: str, time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the loudness over time: constant, on about twice or seven times per second, or on once."""
    if rhythm == "steady":
        return np.ones_like(time)
    if rhythm == "once":
        start = rng.uniform(0.3, 1.6)
        return _smooth((time > start) & (time < start + rng.uniform(0.35, 0.5)))
    rate = rng.uniform(1.5, 2.0) if rhythm == "slow" else rng.uniform(6, 8)  # times per second
    return _smooth((rate * time + rng.uniform()) % 1 < 0.5)


def _smooth(samples: np.ndarray, width: int = 161) -> np.ndarray:
    """Smooth samples. By default, the sound takes 5 ms to start and to stop, so that there is no click."""
    window = np.hanning(width)
    return np.convolve(samples.astype(np.float64), window / window.sum(), mode="same")


def _harmonics(time: np.ndarray, hertz: float, strengths: list[float], ratios: list[float] | None = None) -> np.ndarray:
    ratios = ratios or [float(number) for number in range(1, len(strengths) + 1)]
    waves = (s * np.sin(2 * np.pi * hertz * r * time) for s, r in zip(strengths, ratios, strict=True))
    return sum(waves, start=np.zeros_like(time))


def _siren(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    middle, rate = rng.uniform(850, 1050), rng.uniform(1.2, 1.6)
    hertz = middle + 400 * np.sin(2 * np.pi * (rate * time + rng.uniform()))
    return np.sin(2 * np.pi * np.cumsum(hertz) / SAMPLE_RATE)


def _drum(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return rapid beats of low-frequency noise."""
    return _smooth(rng.standard_normal(len(time)), 64) * np.exp(-8 * ((rng.uniform(14, 18) * time) % 1))


def _chirp(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return quick sweeps from 2 up to 5 kHz."""
    part = (rng.uniform(10, 13) * time + rng.uniform()) % 1
    return np.sin(2 * np.pi * np.cumsum(2000 + 3000 * part) / SAMPLE_RATE)


_SOUNDS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "whistle": lambda time, rng: _harmonics(time, rng.uniform(1800, 2600), [1.0]),
    "hum": lambda time, rng: _harmonics(time, rng.uniform(90, 130), [1.0, 0.4, 0.1]),
    "buzz": lambda time, rng: 2 * ((rng.uniform(180, 260) * time) % 1) - 1,
    "hiss": lambda time, rng: np.diff(rng.standard_normal(len(time) + 1)),
    "siren": _siren,
    "bell": lambda time, rng: _harmonics(
        time, rng.uniform(450, 600), [1, 0.8, 0.7, 0.5, 0.4], [1, 2.76, 4.1, 5.4, 8.93]
    ),
    "drum": _drum,
    "chirp": _chirp,
}
