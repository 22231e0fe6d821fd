"""Dense features of files, and class maps of pictures, for `Encoders`."""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense import Mode, score_maps
from ..modalities import READING, with_options

SIZES = ("image_size", "target_length")  # options of inputs that may differ from training


class DenseEncoders:
    """The methods of `Encoders` for features of patches. For `mode` see `dense.py`; qq suits texts best."""

    @torch.no_grad()
    def encode_dense(self: Any, batch_size: int = 16, mode: Mode = "qq", **inputs: Any) -> Tensor | dict[str, Tensor]:
        """Return features (N, T, h, w, D) of patches for one list, or by modality for several: unit norm, float32.

        They are comparable with texts' features. For audio, T is 1, h is frequency and w is time. `inputs` are as in
        `encode`; `image_size`, or `target_length` for audio, sets another size than in training.
        """
        options = {name: inputs.pop(name) for name in (*READING, *SIZES) if name in inputs}
        if not inputs or "text" in inputs:
            raise ValueError(f"pass encode_dense() one list per modality: {', '.join(self.modalities)}")
        found = {}
        for name, items in inputs.items():
            encode = partial(self.model(name).encode_dense, mode=mode)
            found[name] = torch.cat([*self._inputs(name, split_list(name, items, batch_size), 0, options, encode)])
        return found if len(found) > 1 else next(iter(found.values()))

    @torch.no_grad()
    def segment(
        self: Any, text: Sequence[str | Sequence[str]], templates: Sequence[str] = ("{c}",), size: int | None = None,
        mode: Mode = "qq", **inputs: Any,
    ) -> list[Tensor]:  # fmt: skip
        """Return each pixel's class, an index into `text`: a map (H, W), int64, for each input; (T, H, W) for clips.

        Args:
            text: a name for each class, or a list of names, whose features are averaged.
            templates: prompts with {c} for the name of a class.
            size: short side of the resized input, in pixels; by default that of training, see `score_maps`.
            inputs: one list, as in `encode`, and options of reading.
        """
        reading = {name: inputs.pop(name) for name in READING if name in inputs}
        if len(inputs) != 1:
            raise ValueError(f"pass segment() text and one list of a modality: {', '.join(self.modalities)}")
        ((name, items),) = inputs.items()
        model, modality = self.model(name), with_options(self.encoders[name][1], reading)
        names = [[each] if isinstance(each, str) else each for each in text]
        prompts = [[template.replace("{c}", each) for each in own for template in templates] for own in names]
        features = self.encode(text=chain(*prompts), of=name).split([len(own) for own in prompts])
        classes = F.normalize(torch.stack([own.mean(dim=0) for own in features]), dim=-1)  # (K, D)

        def score(windows: Tensor) -> Tensor:
            return model.encode_dense(windows.to(classes.device), mode) @ classes.T

        raws = (modality.load(item) for (item,) in split_list(name, items, 1))
        maps = (score_maps(score, modality, raw, size).argmax(dim=1) for raw in raws)
        return [each[0] if len(each) == 1 else each for each in maps]


def split_list(name: str, items: Any, size: int) -> list[list[Any]]:
    """Return a list in parts of `size` items. Raises `TypeError` for a single item."""
    if isinstance(items, (str, bytes, os.PathLike)) or not isinstance(items, Iterable):
        raise TypeError(f"pass encode() a list, {name}=[...], not a single {type(items).__name__}")
    items = list(items)
    return [items[start : start + size] for start in range(0, len(items), size)]
