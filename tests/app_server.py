"""The page's server in a process of its own."""

import signal
from pathlib import Path

import httpx
import pytest
from helpers import free_port, start, wait_for

MODELS = {"audio": "audio", "depth": "depth", "image": "image", "infrared": "thermal", "video": "video"}


class PageServer:
    """The server with its address and its folder of uploads, which should be gone when it ends."""

    def __init__(self, temporary: Path, *words: str):
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(temporary))
            self.process = start("-m", "languagebind.app", *words, f"--port={port}")
        self.temporary = temporary

    def __enter__(self) -> "PageServer":
        wait_for(self._up)
        (folder,) = self.temporary.glob("languagebind-app-*")
        self.uploads = folder / "uploads"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=30)
        assert "Traceback" not in output
        assert not self.uploads.parent.exists()

    def _up(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[0]
        try:
            return httpx.get(f"{self.address}/login_check").status_code < 500
        except httpx.TransportError:
            return False
