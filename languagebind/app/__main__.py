"""Open the page: languagebind app [MODEL ...] [--port 7860]; without models, it is that of the demo's runs."""

import ctypes
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..config import UserError, at_least, parse, run
from ..files import text_lines

DEMO = Path("logs/demo")


@dataclass(frozen=True)
class AppOptions:
    """Open a page on which files are compared with texts and with each other."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """runs, checkpoints, folders in the published layout, or hub ids, one a modality; none: the demo's runs"""
    port: int = 7860
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 lets other machines in: use --auth, too"""
    auth: Path | None = None
    """file of lines USER:PASSWORD, which the page then asks for"""
    index: Path | None = None
    """folder that `languagebind index` made, to search in"""
    device: str | None = None
    """PyTorch device; None: the first GPU, or else the CPU"""
    max_upload_mb: int = 200
    """largest file that is taken, in megabytes"""

    def __post_init__(self):
        at_least(1, port=self.port, max_upload_mb=self.max_upload_mb)


def read_users(path: Path) -> list[tuple[str, str]]:
    """Return the names and passwords in a file. Raises `UserError` unless each line is USER:PASSWORD."""
    lines = text_lines(path.read_bytes()) if path.is_file() else []
    users = [line.partition(":")[::2] for line in lines if line]
    if not users or not all(user and password for user, password in users):
        raise UserError(f"--auth {path} should be a file of lines USER:PASSWORD")
    return users


def return_freed_memory() -> None:
    """Let glibc return freed blocks of 1 MB and more at once, and serve smaller ones from two heaps for all threads.

    Otherwise it keeps them in a heap for each thread, and these grow with the number of requests.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # musl has none
        mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
        mallopt(-8, 2)  # M_ARENA_MAX


def main(argv: Sequence[str] | None = None) -> None:
    """Load the models and serve the page until it is stopped."""
    options = parse(AppOptions, argv, prog="languagebind app")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    users = read_users(options.auth) if options.auth else None
    sources = options.models or sorted(str(path.parent) for path in DEMO.glob("*/checkpoints"))
    if not sources:
        raise UserError(f"there are no runs below {DEMO}: run bash scripts/demo.sh, or name models")
    try:
        socket.create_server((options.host, options.port)).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {options.host}, port {options.port} ({error}): choose others") from error
    return_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then, too
    with tempfile.TemporaryDirectory(prefix="languagebind-app-", ignore_cleanup_errors=True) as folder:
        # Before Gradio is imported: no analytics, and a folder for uploads that nobody else uses
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": os.path.join(folder, "uploads")}
        from ..data.world.make import render_examples
        from ..distributed import own_device
        from ..index import Index
        from .functions import load_models
        from .page import STYLE, build

        models = load_models(sources, device=own_device(options.device))
        examples = render_examples(Path(folder) / "examples", models.of_world)
        index = Index(options.index, models.encoders) if options.index else None
        most = f"{options.max_upload_mb} MB"
        page = build(models, examples, index, f"Files may have {most}; they are deleted within 70 minutes.")
        _, url, _ = page.launch(
            server_name=options.host, server_port=options.port, auth=users, max_file_size=most,
            share=False, run_history=False, enable_monitoring=False, footer_links=["api"], quiet=True,
            state_session_capacity=64, prevent_thread_lock=True, **STYLE,
        )  # fmt: skip
        print(f"the page is at {url} (stop it with Ctrl-C)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    run(main)
