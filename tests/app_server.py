"""The page's server in a process of its own."""

import signal
from pathlib import Path

import httpx
from helpers import free_port, start, wait_for

MODELS = {"audio": "audio", "depth": "depth", "image": "image", "infrared": "thermal", "video": "video"}


class PageServer:
    """The server with its address and its folder of uploads, which should be gone when it ends."""

    def __init__(self, *words: str):
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.process = start("-m", "languagebind.app", *words, f"--port={port}")

    def __enter__(self) -> "PageServer":
        wait_for(self._up)
        (path,) = httpx.post(f"{self.address}/gradio_api/upload", files={"files": ("a.txt", b"a")}).json()
        self.uploads = Path(path).parents[1]
        assert self.uploads.parent.name.startswith("languagebind-app-")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.output, _ = self.process.communicate(timeout=30)
        assert not self.uploads.parent.exists()

    def _up(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[0]
        try:
            return httpx.get(f"{self.address}/login_check").status_code < 500
        except httpx.TransportError:
            return False
