"""Learning rate schedules: pure functions of the step."""

import math
from collections.abc import Callable


def make_schedule(kind: str, warmup: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at each step, counted from 0.

    Args:
        kind: `cosine` falls to 0 at `total_steps`; `const` stays.
        warmup: steps over which the factor rises to 1.
    """

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    after_warmup = {"cosine": cosine, "const": lambda step: 1.0}[kind]
    return lambda step: (step + 1) / warmup if step < warmup else after_warmup(step)
