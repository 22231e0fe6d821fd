"""Transforms and loaders with the names, arguments and numbers of the original LanguageBind code.

A loader opens a path, http(s) address or bytes, or takes what is in memory, and passes it to any transform.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import Compose

from ..config import UserError
from ..modalities import DecodeError, Modality, is_source, modality_class
from ..modalities._images import as_tensor
from ..modalities._sources import fetch
from ..modalities._video_backends import BACKENDS
from .config import modality_of

IMAGE, VIDEO, DEPTH, AUDIO = (cast(Any, modality_class(name))() for name in ("image", "video", "depth", "audio"))
torchaudio_loader = AUDIO.load  # from a file to its waveform (channels, samples), float32, and its sample rate
# Published configs name decord, which is not installed everywhere. Our decoders give the same frames.
DECODERS = {name: name for name in BACKENDS} | dict.fromkeys(("auto", "decord", "pytorchvideo"), "auto")


def get_image_transform(config: Any) -> Compose:
    """Return the transform of PIL images. A config is a model's, or any object with a `vision_config`."""
    return Compose([partial(preprocess, modality_of("image", config.vision_config))])


def get_thermal_transform(config: Any) -> Compose:
    return Compose([partial(preprocess, modality_of("infrared", config.vision_config))])


def get_depth_transform(config: Any) -> Compose:
    """Return the transform of depth maps in millimetres."""
    return Compose([partial(transform_millimetres, modality_of("depth", config.vision_config))])


def get_video_transform(config: Any) -> Compose:
    """Return the transform of frames (C, T, H, W) of 0..255, or of a dictionary with such frames under `video`."""
    _decoder(getattr(config.vision_config, "video_decode_backend", "decord"))
    return Compose([partial(transform_clip, config.vision_config)])


def get_audio_transform(config: Any) -> "AudioTransform":
    return AudioTransform(config.vision_config)


class AudioTransform(Compose):
    """The transform of (waveform, rate) pairs. Its attributes are the options of `Audio`, and may be changed."""

    def __init__(self, args: Any):
        super().__init__([])  # its one step is the call
        self.__dict__.update(asdict(modality_of("audio", args)))

    def __call__(self, sound: Any) -> Tensor:
        options = {field.name: getattr(self, field.name) for field in fields(AUDIO)}
        return preprocess(replace(AUDIO, **options), sound)


def load_and_transform_image(image_path: Any, transform: Callable) -> Any:
    return transform(IMAGE.open_picture(fetch(image_path)) if is_source(image_path) else image_path)


def load_and_transform_thermal(thermal_path: Any, transform: Callable) -> Any:
    return load_and_transform_image(thermal_path, transform)


def load_and_transform_depth(depth_path: Any, transform: Callable) -> Any:
    metres = DEPTH.load(depth_path).double()  # in float32, the factor would change the last bits
    return transform((metres * 1000).numpy())


def load_and_transform_audio(audio_path: Any, transform: Callable) -> Any:
    return transform(torchaudio_loader(audio_path))


def load_and_transform_video(
    video_path: Any, transform: Callable, video_decode_backend: str = "opencv", clip_start_sec: float = 0.0,
    clip_end_sec: float | None = None, num_frames: int | None = 8,
) -> Any:  # fmt: skip
    """Transform `num_frames` frames (C, T, H, W), spread evenly over a video or the part between two times, or all.

    `video_path` may also be the frames of one clip: files, PIL images or an array. All decoders give the same frames,
    but with pytorchvideo the transform gets and returns a dictionary with the frames under `video`.
    """
    video: Any = replace(VIDEO, num_frames=num_frames or 1, video_backend=_decoder(video_decode_backend))
    if clip_start_sec or clip_end_sec is not None or num_frames is None:
        choose = np.arange if num_frames is None else None
        clip = video.read_part(fetch(video_path), clip_start_sec or 0.0, clip_end_sec, choose)
    else:
        clip = video.load(video_path)
    clip = (clip.double() * 255 if clip.is_floating_point() else clip).transpose(0, 1)
    return transform({"video": clip} if video_decode_backend == "pytorchvideo" else clip)


def preprocess(modality: Modality, item: Any) -> Tensor:
    """Preprocess a file or in-memory object to (C, T, H, W), or (C, H, W) for one frame."""
    x = modality.preprocess(item)
    return x[:, 0] if x.shape[1] == 1 else x


def transform_clip(config: Any, clip: Any) -> Any:
    """Preprocess all frames of a clip (C, T, H, W) of 0..255; of a clip in a dictionary, `num_frames` frames."""
    modality: Any = modality_of("video", config)
    if isinstance(clip, Mapping):
        frames = clip["video"]
        chosen = modality.frame_indices(frames.shape[1]) if frames.shape[1] > modality.num_frames else slice(None)
        return {**clip, "video": transform_clip(config, frames[:, chosen])}
    frames = as_tensor(clip)
    if frames.ndim != 4 or frames.shape[0] not in (1, 3):
        raise DecodeError(clip, "expected frames (C, T, H, W) with values from 0 to 255")
    frames = frames if frames.dtype == torch.uint8 else (frames.double() / 255).float()
    return modality.fit(frames.transpose(0, 1), None)


def transform_millimetres(modality: Modality, depth: Any) -> Tensor:
    """Preprocess a depth map whose floating-point values are millimetres, as OpenCV reads a depth PNG."""
    depth = depth if is_source(depth) else as_tensor(depth)
    if isinstance(depth, Tensor) and depth.is_floating_point():
        depth = depth / 1000
    return preprocess(modality, depth)


def _decoder(name: str) -> str:
    if name not in DECODERS:
        raise UserError(f"unknown video_decode_backend {name!r}: choose from {', '.join(DECODERS)}")
    return DECODERS[name]
