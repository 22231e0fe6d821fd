"""What loader workers make of samples: inputs in batches, or why a sample cannot be read."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ..modalities import DecodeError
from .data.readers import Reader
from .data.samples import Sample
from .models import Unmoved


class Inputs(Dataset):
    """(index, (V, C, T, H, W)), or (index, files) for a model that takes these, or (index, reason) of an unreadable
    sample: errors are values across processes."""

    def __init__(self, samples: Sequence[Sample], reader: Reader, as_files: bool = False):
        self.samples, self.reader, self.as_files = samples, reader, as_files

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        sample = self.samples[index]
        try:
            source = sample.load(self.reader.modality.input_shape[1])
            if self.as_files:
                return index, source
            with _one_thread():
                return index, self.reader.read(source)
        except DecodeError as error:
            return index, f"{sample.key}: {error.reason}"


def collate(items: list[tuple[int, Any]]) -> tuple[list[int], Tensor | Unmoved | None, dict[int, str]]:
    """Positions of the samples that could be read, these samples (B, V, C, T, H, W), what is wrong with the others."""
    good = [(index, value) for index, value in items if not isinstance(value, str)]
    bad = {index: value for index, value in items if isinstance(value, str)}
    positions, values = [index for index, _ in good], [value for _, value in good]
    if values and not isinstance(values[0], Tensor):
        return positions, Unmoved(values), bad
    return positions, torch.stack(values) if values else None, bad


@contextmanager
def _one_thread():
    """Loader workers have one thread; sums are rounded otherwise with more, and results must not depend on workers."""
    threads = torch.get_num_threads()
    if get_worker_info() is not None or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
