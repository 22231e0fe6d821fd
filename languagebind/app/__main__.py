"""Open the page: languagebind app [MODEL ...] [--port 7860]; without models, it is that of the demo's runs."""

import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..config import UserError, parse, run

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
    examples: Path | None = None
    """folder of examples: files of each modality in a folder of its name, with texts for them, one a line, in texts.txt
    (by default the demo's runs have examples of the sample world, and other models have none)"""
    device: str | None = None
    """PyTorch device; None: the first GPU, or else the CPU"""
    max_upload_mb: int = 200
    """largest file that is taken, in megabytes"""


def demo_runs(folder: Path = DEMO) -> list[str]:
    """Return the runs of the demo. Raises `UserError` if there are none."""
    runs = sorted(str(path.parent) for path in folder.glob("*/checkpoints"))
    if not runs:
        raise UserError(f"there are no runs below {folder}: run bash scripts/demo.sh, or name models")
    return runs


def read_users(path: Path) -> list[tuple[str, str]]:
    """Return the names and passwords in a file. Raises `UserError` if a line has no colon, or none has one."""
    try:
        rows = [line.partition(":") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read --auth {path}: {error.strerror}") from error
    if not rows or not all(user and password for user, _, password in rows):
        raise UserError(f"--auth {path} should have lines USER:PASSWORD")
    return [(user, password) for user, _, password in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Load the models and serve the page until it is stopped."""
    options = parse(AppOptions, argv, prog="languagebind app")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    sources, users = options.models or demo_runs(), read_users(options.auth) if options.auth else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then, too
    with tempfile.TemporaryDirectory(prefix="languagebind-app-") as folder:
        # Before Gradio is imported: no analytics, and a folder for uploads that nobody else uses
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": os.path.join(folder, "uploads")}
        page, settings = make_page(sources, options, Path(folder) / "examples")
        try:
            _, url, _ = page.launch(
                server_name=options.host, server_port=options.port, auth=users, prevent_thread_lock=True, **settings
            )
        except OSError as error:
            raise UserError(f"cannot listen at {options.host}:{options.port}: choose another --port") from error
        print(f"the page is at {url} (stop it with Ctrl-C)", flush=True)
        page.block_thread()


def make_page(sources: Sequence[str], options: AppOptions, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the page of some models, and the settings of its server. Examples are rendered into `folder`."""
    from ..distributed import own_device
    from ..index import Index
    from . import page
    from .examples import knows_world, read_examples, world_examples
    from .functions import load_models

    models = load_models(sources, device=own_device(options.device))
    examples, names = [], models.encoders.modalities
    if options.examples:
        examples = read_examples(options.examples, names)
    elif all(map(knows_world, sources)):
        examples = world_examples(folder, names)
    settings = {
        "max_file_size": f"{options.max_upload_mb}mb", "share": False, "run_history": False, "enable_monitoring": False,
        "footer_links": ["api"], "quiet": True, **page.STYLE,
    }  # fmt: skip
    index = Index(options.index, models.encoders) if options.index else None
    note = f"Files may have {options.max_upload_mb} MB; they are deleted within 70 minutes."
    return page.build(models, examples, index, note), settings


if __name__ == "__main__":
    run(main)
