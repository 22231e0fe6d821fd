"""A moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .base import divided_like


class Ema:
    """`average = decay * average + (1 - decay) * weight` after each step; in its first steps it forgets faster.

    Args:
        parameters: those that train, by name.
        decay: in (0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay, self.steps = dict(parameters), decay, 0
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step's weights in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))  # or the random start would stay for long
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(parameter.detach(), 1 - decay)

    def load(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Go on from the whole averages of a checkpoint."""
        self.steps = steps
        for name, value in averages.items():
            self.averages[name].copy_(divided_like(self.parameters[name], value.to(self.averages[name].device)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the weights."""
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
