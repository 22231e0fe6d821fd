"""Keep a moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .base import divide


class Ema:
    """A moving average of the weights, `decay * average + (1 - decay) * weight`, with a smaller decay at first."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay, self.steps = dict(parameters), decay, 0
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the averages."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))  # or the initial weights would dominate for long
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(parameter.detach(), 1 - decay)

    def load(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Continue from the averages of a checkpoint."""
        self.steps = steps
        for name, value in averages.items():
            self.averages[name].copy_(divide(value.to(self.averages[name].device), self.parameters[name]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averages as weights inside the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            weight: Tensor = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name] = weight
