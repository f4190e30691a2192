"""A provider that repeats what it was sent, its key too, in whatever it answers: in errors and in broken streams."""

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAYS = ("said", "refused", "failed", "garbage", "broken", "error_event", "no_json", "cut")
"""How it may answer: the last message begins with the word."""


class _Talkative(BaseHTTPRequestHandler):
    answer = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        told = f"{self.answer} {self.headers['authorization']} {body}"
        way = str(json.loads(body)["messages"][-1]["content"]).split()[0]
        chunk = {"index": 0, "delta": {"content": told}, "finish_reason": None}
        event = {"id": "1", "object": "chat.completion.chunk", "model": "m", "choices": [chunk]}
        last = {**event, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        error = json.dumps({"error": {"message": told, "type": told, "code": told, "param": told}})
        said = f"data: {json.dumps(event)}\n\n"
        whole = f"{said}data: {json.dumps(last)}\n\ndata: [DONE]\n\n"
        plain, stream = "application/json", "text/event-stream"
        status, kind, text = {
            "said": (200, stream, whole),
            "refused": (400, plain, error),
            "failed": (500, plain, error),
            "garbage": (200, stream, f"data: {told}\n\n"),
            "broken": (200, stream, said),
            "error_event": (200, stream, f"{said}event: error\ndata: {error}\n\n"),
            "no_json": (200, plain, told),
            "cut": (200, stream, said),
        }[way]
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data) + (100 if way == "cut" else 0)))
        self.send_header("x-told", self.answer)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, format: str, *_: Any) -> None: ...  # noqa: A002 - as the base class names it


@contextmanager
def talkative_provider(answer: str) -> Generator[str]:
    """Such a provider, whose answers hold this too: its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Talkative", (_Talkative,), {"answer": answer}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()
