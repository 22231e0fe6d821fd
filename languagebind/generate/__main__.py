"""Make VIDAL's modalities and captions from videos and titles, one step after the other:

    python -m languagebind.generate annotate --videos clips/ --titles titles.csv --annotation vidal.json --root /data
    python -m languagebind.generate frames --annotation vidal.json --root /data

Each step makes what is missing: run it again to continue after a stop, or after more videos. `STEP --help` lists the
options. Under torchrun each rank does its share; `--engine ray` uses the actors of a Ray cluster.
"""

import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from functools import partial
from typing import Any

from ..config import UserError, parse, run
from . import annotation, captions, chat, depth, frames, infrared
from .filter import Filter, FilterOptions
from .runners import RunOptions, run_step

STEPS: dict[str, tuple[Any, Any]] = {  # the class of each step, and its options
    "frames": (frames.Frames, frames.FrameOptions),
    "sound": (frames.Sound, frames.SoundOptions),
    "depth": (depth.Depth, depth.DepthOptions),
    "infrared": (infrared.Infrared, infrared.InfraredOptions),
    "captions": (captions.Captions, chat.ChatOptions),
    "polish": (captions.Polish, chat.ChatOptions),
    "filter": (Filter, FilterOptions),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the step that the first argument names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    names = f"annotate, {', '.join(STEPS)}, report"
    if name in STEPS:
        kind, own = STEPS[name]
        options: Any = parse(make_dataclass("Options", [("run", RunOptions), ("step", own)]), rest, f"generate {name}")
        run_step(partial(kind, options.run.root, options.step), options.run)
    elif name == "annotate":
        annotation.main(rest)
    elif name == "report":
        from . import report  # with matplotlib and scikit-learn, which no worker needs

        report.main(rest, STEPS)
    elif name in ("-h", "--help"):
        print(f"{__doc__}\nsteps: {names}")
    else:
        raise UserError(f"no step {name!r}: choose from {names}")


if __name__ == "__main__":
    run(main)
