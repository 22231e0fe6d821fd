"""Protocols that read and compare samples: ours, and those of others, for their published results.

A dataset's `paper: {inputs: <rule>, similarity: cosine | dot}` describes the protocol of the original LanguageBind
code, and `--protocol paper` selects it; `clip4clip: {frames: 12, words: 32}` describes CLIP4Clip's. Both differ from
their originals in one rule: ties count against the model under every protocol.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from ...config import UserError
from ...modalities import DecodeError, Modality, modality_name
from ...modalities._images import MEAN, PREPROCESSING, STD, ImageModality
from ...modalities._video_backends import open_capture

SIMILARITIES = {"cosine": "cosine", "dot": "dot product of features that are not normalised"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLING_RATE, SEGMENTS, CROPS = 8, 5, 3
VIEW_SCALE = 100  # multiplies the cosines in the softmax of each view
Interval = tuple[float, float]


class Paper(TypedDict, total=False):
    """The original's rules for a dataset. A missing key means that the original does the same as we do."""

    inputs: Literal["modality", "seconds", "seconds_of_duration", "views", "picture"]
    similarity: Literal["cosine", "dot"]


class Clip4Clip(TypedDict):
    """CLIP4Clip's rules for a dataset."""

    frames: Annotated[int, Field(ge=1)]  # of a clip, at most
    words: Annotated[int, Field(ge=3)]  # tokens of a text, with its start and end, at most


class Reader:
    """Reads a sample as its modality does. The subclasses follow other rules. All readers can be pickled."""

    views: int = 1
    pooled: ClassVar[bool] = False  # True: average the views' features; False: compare each view with the classes
    clip: Interval | None = None
    details: Mapping[str, Any] = {}  # further facts about the rule that a result records

    def __init__(self, modality: Modality):
        self.modality = modality

    def read(self, source: Any) -> Tensor:
        """Return the views (V, C, T, H, W) of a sample. `source` comes from `Sample.load`. Raises `DecodeError`."""
        return self.modality.preprocess(source)[None]


class VideoReader(Reader):
    """Reads one part of a video, `clip` (start, end) in seconds, as the modality reads a whole video."""

    modality: Any  # a modality with `frame_indices`, like Video

    def __init__(self, modality: Modality, clip: Interval | None = None):
        if not hasattr(modality, "frame_indices"):
            raise UserError(f"the dataset's protocol is for videos, not for {modality_name(modality)}")
        self.modality, self.clip = modality, clip
        if type(self) is not VideoReader and modality.input_shape[1] != self.modality.num_frames:
            rules = "--clips, --crops and --protocol paper"
            raise UserError(f"{type(modality).__name__} has clips and crops of its own: leave out {rules}")

    def read(self, source: Any) -> Tensor:
        return self.modality.transform(self.frames(source))[None]

    def frames(self, source: Any, choose: Callable[[int], np.ndarray] | None = None) -> Tensor:
        """Return frames (N, 3, H, W) of `clip`. `choose` maps the number of frames in it to the indices to read."""
        return self.modality.read_part(source, *(self.clip or (0, None)), choose)


class Clips(VideoReader):
    """Reads S clips of a video and several crops of each clip along the longer side. Their features are averaged.

    Clip s has the frames floor((t + (s + 0.5) / S) * N / T), t < T, of N frames. Together the clips have S * T evenly
    spaced frames, each in the middle of its segment.
    """

    pooled = True

    def __init__(self, modality: Modality, clip: Interval | None, clips: int, crops: int):
        super().__init__(modality, clip)
        self.clips, self.crops, self.views = clips, crops, clips * crops
        average = "of the views' unit-norm features, at unit norm again"
        self.details = {"clips": clips, "crops": crops, "average": average}

    def read(self, source: Any) -> Tensor:
        frames = self.frames(source, self.indices)  # (S * T, 3, H, W)
        room = abs(frames.shape[2] - frames.shape[3])
        places = [0.5] if self.crops == 1 else np.linspace(0, 1, self.crops)
        squares = _squares(frames, [round(room * place) for place in places])
        clips = [clip for square in squares for clip in square.split(self.modality.num_frames)]
        return torch.stack([self.modality.transform(clip) for clip in clips])

    def indices(self, count: int) -> np.ndarray:
        """Return the indices (S, T) of the clips' frames in a video of `count` frames."""
        offsets = (np.arange(self.clips)[:, None] + 0.5) / self.clips
        num_frames = self.modality.num_frames
        return ((np.arange(num_frames) + offsets) * count / num_frames).astype(int)


class Seconds(VideoReader):
    """Takes evenly spaced frames from the start to one second before the end by OpenCV's seeking, resized by PIL.

    With `up_to_duration`, the end is the file's duration rounded up, as in the original's annotations.
    """

    def __init__(self, modality: Modality, clip: Interval | None, up_to_duration: bool):
        super().__init__(modality, clip)
        self.up_to_duration = up_to_duration
        end = "the file's duration" if up_to_duration else "its end"
        self.details = {
            "frames_rule": f"evenly from the start to one second before {end}, at the frame rate rounded down, by"
            " OpenCV; zeros from the first frame that cannot be read",
            "resize": "PIL bicubic",
            "pixel_statistics": [list(MEAN), list(STD)],
        }

    def read(self, source: Any) -> Tensor:
        import cv2
        from PIL.Image import fromarray

        duration = self.modality.header_seconds(source)
        clip = (0, math.ceil(duration)) if self.up_to_duration else self.clip
        fit = _pil_transform(self.modality.image_size)
        x = torch.zeros(self.modality.input_shape)
        with open_capture(source) as capture:
            count, rate = (int(capture.get(what)) for what in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
            if count < 1 or rate < 1:
                raise DecodeError(source, f"the header says {count} frames at {rate} per second; neither may be 0")
            seconds = -(-count // rate)
            start, end = (0, seconds) if clip is None else (int(clip[0]), min(int(clip[1]), seconds))
            indices = np.linspace(start * rate, (end - 1) * rate, self.modality.num_frames, dtype=int)
            for k, index in enumerate(indices.tolist()):
                capture.set(cv2.CAP_PROP_POS_FRAMES, index)
                found, frame = capture.read()
                if not found:  # The remaining frames stay zero, as in the original
                    if k == 0:
                        raise DecodeError(source, f"frame {index} of {count} cannot be read")
                    break
                x[:, k] = fit(fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
        return x[None]


class Views(VideoReader):
    """Takes 5 clips of every 8th frame and 3 crops of each along the longer side, with ImageNet's pixel statistics."""

    views = SEGMENTS * CROPS
    details: Mapping[str, Any] = {
        "frames_rule": f"{SEGMENTS} evenly spaced runs of every {SAMPLING_RATE}th frame, the last one repeated",
        "crops": f"{CROPS} along the longer side",
        "resize": "OpenCV bilinear",
        "pixel_statistics": [list(IMAGENET_MEAN), list(IMAGENET_STD)],
        "average": f"of the views' softmax of {VIEW_SCALE} * cosine",
    }

    def read(self, source: Any) -> Tensor:
        import cv2

        frames = self.frames(source, self.indices)  # (S * T, 3, H, W)
        size, short = self.modality.image_size, min(frames.shape[2:])
        height, width = (int(size * side / short) for side in frames.shape[2:])
        pictures = frames.permute(0, 2, 3, 1).contiguous().numpy()  # (S * T, H, W, 3)
        pictures = np.stack([cv2.resize(p, (width, height), interpolation=cv2.INTER_LINEAR) for p in pictures])
        step = (max(height, width) - size) / (CROPS - 1)
        squares = _squares(torch.from_numpy(pictures).permute(0, 3, 1, 2), [int(c * step) for c in range(CROPS)])
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        crops = [square.unflatten(0, (SEGMENTS, -1)).transpose(1, 2) for square in squares]  # each (S, 3, T, H, W)
        return torch.stack([(crop[s].float() / 255 - mean) / std for s in range(SEGMENTS) for crop in crops])

    def indices(self, count: int) -> np.ndarray:
        """Return the indices (S, T) in a video of `count` frames: runs of T among every 8th frame, one per segment."""
        num_frames = self.modality.num_frames
        sampled = list(range(0, count, SAMPLING_RATE))
        sampled += sampled[-1:] * (num_frames - len(sampled))
        step = max((len(sampled) - num_frames) / (SEGMENTS - 1), 0)
        return np.array([sampled[int(s * step) : int(s * step) + num_frames] for s in range(SEGMENTS)])


class Picture(Reader):
    """Resizes with PIL's smoothing filter and crops the centre, without applying the EXIF orientation."""

    modality: ImageModality
    details: Mapping[str, Any] = {
        "resize": "PIL bicubic, without EXIF orientation",
        "pixel_statistics": [list(MEAN), list(STD)],
    }

    def __init__(self, modality: Modality):
        if not isinstance(modality, ImageModality) or modality.input_shape[:2] != (3, 1):
            raise UserError(f"the dataset's protocol is for pictures, not for {modality_name(modality)}")
        super().__init__(modality)

    def read(self, source: Any) -> Tensor:
        image = self.modality.open_picture(source, upright=False).convert("RGB")
        return _pil_transform(self.modality.image_size)(image)[None, :, None]


@dataclass(frozen=True)
class EvalProtocol:
    """The rules for reading samples and comparing them with texts."""

    name: str
    reader: Reader
    similarity: str = "cosine"
    words: int | None = None  # tokens of a text, at most; by default as many as the tower reads
    by_sample: bool = False  # a sample's captions are one item of the gallery, with the score of the best

    @property
    def unit(self) -> bool:
        """True if features are scaled to unit norm."""
        return self.similarity == "cosine"

    def describe(self) -> dict[str, Any]:
        """Return the settings of the protocol that a result records."""
        found = {"protocol": self.name, "similarity": SIMILARITIES[self.similarity], "views": self.reader.views}
        clip = {"clip": list(self.reader.clip)} if self.reader.clip else {}
        return found | clip | dict(self.reader.modality.details) | dict(self.reader.details)

    def class_scores(self, features: Tensor, classifier: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores (M, K), and the logits (M, K) whose softmax is the confidence of the predictions.

        Features are (M, D), or (M, V, D) for views. The classifier (K, D) has unit norm. `logit_scale` is in log space.
        """
        if features.ndim == 2:
            scores = features @ classifier.T
            return scores, logit_scale.detach().to(scores.device, torch.float32).exp() * scores
        # One view at a time, because all views of all samples against a thousand classes would not fit in memory
        views = ((VIEW_SCALE * view @ classifier.T).double().softmax(dim=1) for view in features.unbind(dim=1))
        scores = (sum(views, torch.tensor(0.0)) / self.reader.views).float()
        return scores, scores.log()


def choose_protocol(
    name: str, paper: Paper | None, clip: Interval | None, modality: Modality, clips: int = 1, crops: int = 1
) -> EvalProtocol:
    """Return our protocol, or a dataset's `paper` protocol. Raises `UserError` if the rules do not fit the modality."""
    rules = paper if name == "paper" and paper else Paper()
    inputs = rules.get("inputs", "modality")
    own = [key for key in PREPROCESSING if getattr(modality, key, None) != getattr(type(modality), key, None)]
    if own and inputs != "modality":
        raise UserError(f"the paper's protocol reads pictures as CLIP does, but this model sets {own[0]}: use ours")
    reader = VideoReader(modality, clip) if clip else Reader(modality)
    if clips * crops > 1:
        reader = Clips(modality, clip, clips, crops)
    elif inputs in ("seconds", "seconds_of_duration"):
        reader = Seconds(modality, clip, up_to_duration=inputs == "seconds_of_duration")
    elif inputs == "views":
        reader = Views(modality)
    elif inputs == "picture":
        reader = Picture(modality)
    return EvalProtocol(name, reader, rules.get("similarity", "cosine"))


def clip4clip_protocol(rules: Clip4Clip, clip: Interval | None, modality: Modality) -> EvalProtocol:
    """Return CLIP4Clip's protocol. Raises `UserError` if the modality is not video, or has another number of frames."""
    reader = VideoReader(modality, clip)
    wanted, own = rules["frames"], modality.input_shape[1]
    if own != wanted:
        raise UserError(f"CLIP4Clip's protocol needs a temporal head and --num-frames {wanted}; this model has {own}")
    reader.modality = replace(reader.modality, frames_per_second=1.0)
    reader.details = {
        "frames_rule": "one a second; evenly spaced ones of longer clips; shorter ones are not filled up",
        "words": rules["words"],
        "gallery": "a sample's captions are one item, by the best of them",
    }
    return EvalProtocol("clip4clip", reader, words=rules["words"], by_sample=True)


def _squares(frames: Tensor, starts: list[int]) -> list[Tensor]:
    """Return squares cut out of frames (N, C, H, W), one for each start along the longer side."""
    height, width = frames.shape[2:]
    side = min(height, width)
    return [frames[:, :, s : s + side] if height >= width else frames[..., s : s + side] for s in starts]


def _pil_transform(size: int) -> Callable[[Any], Tensor]:
    """Return open_clip's transform: it resizes a PIL image as torchvision does and returns (3, size, size)."""
    from torchvision import transforms

    resize = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
    crop, normalize = transforms.CenterCrop(size), transforms.Normalize(MEAN, STD)
    return transforms.Compose([resize, crop, transforms.ToTensor(), normalize])
