"""Signals of a scheduler that wants the machine back."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupts:
    """While it is open, SIGTERM and SIGUSR1 ask the run to save and stop, in place of killing it.

    Attributes:
        received: the name of the last signal; None: there was none.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
