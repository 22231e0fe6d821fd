"""The command `languagebind`, also `python -m languagebind`."""

import importlib
import sys
from collections.abc import Sequence
from functools import partial

from . import __version__
from .config import UserError, run

# Of each command, the module whose `main` it calls, and a line of help
COMMANDS = {
    "eval": ("eval.__main__", "evaluate models on datasets: zero-shot classification, retrieval and segmentation"),
    "pairs": ("eval.pairs", "evaluate between modalities, such as depth and infrared"),
    "probe": ("eval.probe", "fit a linear classifier to a model's features, and evaluate it"),
    "report": ("eval.report.__main__", "make an HTML page of results"),
    "prepare": ("eval.prepare.__main__", "convert the download of a dataset into the data that eval reads"),
    "make-shards": ("data.making", "pack files and captions into shards for training"),
    "check-shards": ("data.checking", "check shards and print their contents"),
    "embed-text": ("data.embed_text", "write the text features of captions beside the shards"),
    "embed-anchor": ("partner", "write a partner's features of another modality beside the shards"),
    "export": ("hub.export", "write a checkpoint in the published layout, or for ONNX and torch.export"),
    "index": ("index", "index a folder of media, and search it by text or by a file"),
    "app": ("app.__main__", "open a page on which files are compared with texts and with each other"),
    "configs": ("configs", "list the recipes, models, datasets and comparisons that flags take by name"),
}
EXTRAS = {"app": "app", "index": "app"}  # of commands with packages of their own
USAGE = "usage: languagebind COMMAND [--help] ..., or languagebind --version\n\n"
USAGE += "".join(f"  {command:14}{about}\n" for command, (_, about) in COMMANDS.items())
USAGE += "\nTo train, run `python -m training.main`; under torchrun it uses several GPUs."


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first argument names with the other arguments, and return its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        try:
            return importlib.import_module(f".{COMMANDS[name][0]}", __package__).main(rest)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get(name, "eval")
            raise UserError(f"{name} needs the package {error.name}: pip install 'languagebind[{extra}]'") from error
    if name not in ("-h", "--help", "--version"):
        raise UserError(f"no command {name!r}: choose from {', '.join(COMMANDS)}")
    print(f"languagebind {__version__}" if name == "--version" else USAGE)
    return None


command = partial(run, main)  # the console entry

if __name__ == "__main__":
    command()
