"""A server with OpenAI's interface, whose answers depend on the request alone, unless it is told to misbehave."""

import base64
import io
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


class Server:
    """It answers with the grey levels of the pictures, unless `fault` replies. `fault` may wait, too."""

    def __init__(self, fault=lambda body, number: None, delay=0.01):
        self.fault, self.delay = fault, delay
        self.bodies, self.keys, self.times = [], set(), []
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def reply(self, body, key):
        """Return the status, headers and content of a reply."""
        with self.lock:
            self.bodies.append(body)
            self.keys.add(key)
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
            number = len(self.bodies)
        fault = self.fault(body, number)
        time.sleep(self.delay)
        with self.lock:
            self.now -= 1
        return fault or says(answer_to(body))


def content_of(body):
    return body["messages"][0]["content"]


def answer_to(body):
    """An answer that depends on the request alone."""
    content = content_of(body)
    if isinstance(content, str):
        return f"about {re.sub('[^a-z0-9]+', ' ', content.lower())[-60:]}"
    return "Grey of " + ", ".join(map(str, map(level, content[:-1])))


def level(part):
    """The grey level of a picture, to the next ten."""
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    return round(np.array(Image.open(io.BytesIO(base64.b64decode(data)))).mean() / 10) * 10


def says(text, reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, {}, json.dumps(reply).encode()


@contextmanager
def serving(server):
    """Yield the flags that name a running server."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, content = server.reply(body, self.headers["Authorization"])
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": len(content)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, http.handle_error = True, lambda *_: None  # clients hang up on a server that hangs
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield [f"--endpoint=http://127.0.0.1:{http.server_port}/v1", "--api-model=m"]
    finally:
        http.shutdown()
        http.server_close()
