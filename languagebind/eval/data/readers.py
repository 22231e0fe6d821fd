"""How samples are read and compared: our way, or the original's where it differs, to reproduce published figures.

A dataset's `paper: {inputs: <rule>, similarity: cosine | dot}` names what the original did with it; `--protocol paper`
asks for that. The original's tie rules are not kept: ties count against the model under either protocol.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...config import UserError
from ...modalities import DecodeError, Modality, modality_name
from ...modalities._images import MEAN, STD
from ...modalities._video_backends import open_capture, read_frames

SIMILARITIES = {"cosine": "cosine", "dot": "dot product of features that are not normalised"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLING_RATE, SEGMENTS, CROPS = 8, 5, 3
OF_VIDEOS = ("frame_indices", "videos")
VIEW_SCALE = 100  # of the cosines that each view's softmax is over


class Reader:
    """A sample as its modality reads it; of a video, the part in `clip`, (start, end) in seconds.

    The readers below do as the original did. Each can go to another process.

    Raises:
        UserError: the rule does not fit the modality.
    """

    views: int = 1
    # Whether a sample's feature is the mean of its views'; else each view is compared with the classes
    pooled: ClassVar[bool] = False
    # A method that the modality needs, and what those are that have it
    needs: ClassVar[tuple[str, str]] = ("preprocess", "files")

    def __init__(self, modality: Modality, clip: tuple[float, float] | None = None):
        method, what = OF_VIDEOS if clip else self.needs
        if not hasattr(modality, method):
            raise UserError(f"the dataset's protocol is of {what}, not of {modality_name(modality)}")
        self.modality, self.clip = modality, clip

    def read(self, source: Any) -> Tensor:
        """What `Sample.load` gives -> (V, C, T, H, W) views.

        Raises:
            DecodeError: it cannot be used.
        """
        if self.clip is None:
            return self.modality.preprocess(source)[None]
        start, end, count = self.part(source)
        indices = start + self.modality.frame_indices(end - start)
        return self.modality.transform(read_frames(source, indices, count, self.modality.video_backend))[None]

    def part(self, source: Any) -> tuple[int, int, int]:
        """The first frame of a video's part in `clip`, the one after its last, and how many frames the video has."""
        count, rate, _ = self.modality.inspect(source)
        if self.clip is None:
            return 0, count, count
        # As fractions: 1.1 * 10.0 is more than 11
        start, end = (math.ceil(Fraction(str(second)) * rate) for second in self.clip)
        end = min(end, count)
        if end <= start:
            raise DecodeError(source, f"no frame of {count} lies from {self.clip[0]:g} s to {self.clip[1]:g} s")
        return start, end, count

    def describe(self) -> dict[str, Any]:
        """For the result's protocol."""
        return {"views": self.views} | ({"clip": list(self.clip)} if self.clip else {})


class Clips(Reader):
    """Several clips of a video, and several crops of each along the longer side; their features are averaged.

    Of S clips, clip s has frame floor((t + (s + 0.5) / S) * N / T) of N for each t < T: together they are S * T frames
    evenly spaced, each in the middle of its stretch.
    """

    needs = OF_VIDEOS
    pooled = True

    def __init__(self, modality: Modality, clip: tuple[float, float] | None, clips: int, crops: int):
        super().__init__(modality, clip)
        self.clips, self.crops, self.views = clips, crops, clips * crops

    def read(self, source: Any) -> Tensor:
        start, end, count = self.part(source)
        indices = start + clip_indices(end - start, self.modality.num_frames, self.clips)
        frames = read_frames(source, indices.flatten(), count, self.modality.video_backend)  # (S * T, 3, H, W)
        height, width = frames.shape[2:]
        side, room = min(height, width), abs(height - width)
        places = [0.5] if self.crops == 1 else np.linspace(0, 1, self.crops)
        starts = [round(room * place) for place in places]
        squares = [frames[:, :, s : s + side] if height >= width else frames[..., s : s + side] for s in starts]
        clips = [clip for square in squares for clip in square.split(self.modality.num_frames)]
        return torch.stack([self.modality.transform(clip) for clip in clips])

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "clips": self.clips,
            "crops": self.crops,
            "average": "of the views' unit-norm features, at unit norm again",
        }


class Seconds(Reader):
    """Frames from the first to the last whole second but one, by OpenCV's seeking; bicubic resizing of PIL pictures."""

    needs = OF_VIDEOS
    up_to_duration: ClassVar[bool] = False

    def read(self, source: Any) -> Tensor:
        import cv2
        from PIL.Image import fromarray

        duration = self.modality.inspect(source, count=False)[2]
        clip = (0, math.ceil(duration)) if self.up_to_duration else self.clip
        fit = _pil_transform(self.modality.image_size)
        x = torch.zeros(self.modality.input_shape)
        with open_capture(source) as capture:
            count, rate = (int(capture.get(what)) for what in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
            if count < 1 or rate < 1:
                raise DecodeError(source, f"{count} frames at {rate} a second by its header, the protocol needs both")
            for k, index in enumerate(second_indices(count, rate, self.modality.num_frames, clip).tolist()):
                capture.set(cv2.CAP_PROP_POS_FRAMES, index)
                found, frame = capture.read()
                if not found:  # what follows stays zero
                    if k == 0:
                        raise DecodeError(source, f"frame {index} of {count} cannot be read")
                    break
                x[:, k] = fit(fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
        return x[None]

    def describe(self) -> dict[str, Any]:
        end = "the file's duration" if self.up_to_duration else "its end"
        return super().describe() | {
            "frames_rule": f"evenly from the start to one second before {end}, at the frame rate rounded down, by"
            " OpenCV; zeros from the first frame that cannot be read",
            "resize": "PIL bicubic",
            "pixel_statistics": [list(MEAN), list(STD)],
        }


class SecondsOfDuration(Seconds):
    """The same, where the annotation gave the duration as the end."""

    up_to_duration = True


class Views(Reader):
    """5 clips of every 8th frame, 3 crops of each along the longer side; ImageNet's statistics."""

    needs = OF_VIDEOS
    views = SEGMENTS * CROPS

    def read(self, source: Any) -> Tensor:
        import cv2

        if self.clip is not None:
            raise UserError("the dataset's clip and the views of its protocol exclude each other")
        count, _, _ = self.modality.inspect(source)
        frames = read_frames(
            source, segment_indices(count, self.modality.num_frames).flatten(), count, self.modality.video_backend
        )  # (S * T, 3, H, W)
        size = self.modality.image_size
        height, width = (int(size * side / min(frames.shape[2:])) for side in frames.shape[2:])
        pictures = frames.permute(0, 2, 3, 1).contiguous().numpy()
        if min(frames.shape[2:]) != size:
            pictures = np.stack([cv2.resize(p, (width, height), interpolation=cv2.INTER_LINEAR) for p in pictures])
        x = torch.from_numpy(pictures).permute(3, 0, 1, 2).unflatten(1, (SEGMENTS, -1))  # (3, S, T, H, W)
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        step = (max(height, width) - size) / (CROPS - 1)
        starts = [int(c * step) for c in range(CROPS)]
        crops = [x[..., s : s + size, :] if height >= width else x[..., s : s + size] for s in starts]
        return torch.stack([(crop[:, s].float() / 255 - mean) / std for s in range(SEGMENTS) for crop in crops])

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "frames_rule": f"{SEGMENTS} evenly spaced runs of every {SAMPLING_RATE}th frame, the last one repeated",
            "crops": f"{CROPS} along the longer side",
            "resize": "OpenCV bilinear",
            "pixel_statistics": [list(IMAGENET_MEAN), list(IMAGENET_STD)],
            "average": f"of the views' softmax of {VIEW_SCALE} * cosine",
        }


class Picture(Reader):
    """PIL's bicubic resizing, which smooths, and a centre crop; EXIF orientation is not applied."""

    needs = ("open_picture", "pictures")

    def read(self, source: Any) -> Tensor:
        if self.modality.input_shape[1] != 1:
            raise UserError("the dataset's protocol is of pictures, not of videos")
        image = self.modality.open_picture(source, upright=False).convert("RGB")
        return _pil_transform(self.modality.image_size)(image)[None, :, None]

    def describe(self) -> dict[str, Any]:
        resize = "PIL bicubic, without EXIF orientation"
        return super().describe() | {"resize": resize, "pixel_statistics": [list(MEAN), list(STD)]}


INPUTS: dict[str, type[Reader]] = {
    "modality": Reader,
    "seconds": Seconds,
    "seconds_of_duration": SecondsOfDuration,
    "views": Views,
    "picture": Picture,
}


@dataclass(frozen=True)
class EvalProtocol:
    """How samples are read, and what their similarity to texts is."""

    name: str
    reader: Reader
    similarity: str = "cosine"

    @property
    def unit(self) -> bool:
        """Whether features are scaled to unit norm."""
        return self.similarity == "cosine"

    def describe(self) -> dict[str, Any]:
        return {"protocol": self.name, "similarity": SIMILARITIES[self.similarity]} | self.reader.describe()

    def class_scores(self, features: Tensor, classifier: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (M, K) of features (M, D), or (M, V, D) of views, and the logits behind the predictions' confidence.

        Args:
            classifier: (K, D), unit norm.
            logit_scale: log-space; the views have a scale of their own.
        """
        if features.ndim == 2:
            scores = features @ classifier.T
            return scores, logit_scale.detach().to(scores.device, torch.float32).exp() * scores
        # A view at a time: all views of all samples against a thousand classes would not fit
        views = ((VIEW_SCALE * view @ classifier.T).double().softmax(dim=1) for view in features.unbind(dim=1))
        scores = (sum(views) / self.reader.views).float()
        return scores, scores.log()


def choose_protocol(
    name: str,
    paper: Mapping[str, str] | None,
    clip: tuple[float, float] | None,
    modality: Modality,
    clips: int = 1,
    crops: int = 1,
) -> EvalProtocol:
    """`ours`, or the `paper` rules of a dataset.

    Raises:
        UserError: the rules do not fit the modality, or the paper's are to be mixed with clips and crops.
    """
    rules = paper if name == "paper" and paper else {}
    if clips * crops > 1:
        if name == "paper":
            raise UserError("clips and crops are of our protocol: the paper's has views of its own")
        return EvalProtocol(name, Clips(modality, clip, clips, crops))
    reader = INPUTS[rules.get("inputs", "modality")](modality, clip)
    return EvalProtocol(name, reader, rules.get("similarity", "cosine"))


def clip_indices(count: int, num_frames: int, clips: int) -> np.ndarray:
    """(S, T) of a video of `count` frames: S clips, each over the whole of it."""
    offsets = (np.arange(clips)[:, None] + 0.5) / clips
    return ((np.arange(num_frames) + offsets) * count / num_frames).astype(int)


def second_indices(count: int, rate: int, num_frames: int, clip: tuple[float, float] | None) -> np.ndarray:
    """The frames of `count` that the original took, by whole seconds of `rate` frames.

    The last second is left out, except of a video that has no other.
    """
    total = -(-count // rate)
    start, end = (0, total) if clip is None else (int(clip[0]), min(int(clip[1]), total))
    return np.linspace(start * rate, (end - 1) * rate, num_frames, dtype=int)


def segment_indices(count: int, num_frames: int) -> np.ndarray:
    """(S, T) of a video of `count` frames: every 8th one, of which each segment has T in a row."""
    sampled = list(range(0, count, SAMPLING_RATE))
    sampled += sampled[-1:] * (num_frames - len(sampled))
    step = max((len(sampled) - num_frames) / (SEGMENTS - 1), 0)
    return np.array([sampled[int(s * step) : int(s * step) + num_frames] for s in range(SEGMENTS)])


def _pil_transform(size: int):
    """A PIL picture to (3, size, size): the same steps as open_clip's, by torchvision's rules for PIL pictures."""
    from torchvision import transforms

    resize = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose(
        [resize, transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
