"""A client of one stream on a thread of its own: what it received, and how it ended."""

import json
import threading
import time
from typing import Any

import httpx

from stack import wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


class Reader(threading.Thread):
    """Reads one stream to its end, however that comes."""

    def __init__(self, base_url: str, token: str, *, model: str | None = None, **sim: Any) -> None:
        super().__init__(daemon=True)
        self._url = base_url + "/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._body = {"messages": QUESTION, "stream": True, "sim": sim, **({"model": model} if model else {})}
        self.status: int | None = None
        self.headers: httpx.Headers = httpx.Headers()
        self.request_id = ""
        self.chunks = 0
        self.code: str | None = None
        """Of the answer's error or of the terminal event."""
        self.error: dict[str, Any] = {}
        self.done = False
        """`[DONE]` came."""
        self.began_s = self.ended_s = 0.0

    def begun(self) -> "Reader":
        """Start, and wait for its first text."""
        self.start()
        wait_until(lambda: self.chunks or self.ended_s, what="the stream's first text")
        assert self.chunks, f"{self.status} {self.code}"
        return self

    def ended(self, within_s: float = 60.0) -> "Reader":
        """Wait for its end."""
        self.join(within_s)
        assert not self.is_alive(), f"the stream did not end within {within_s} s"
        return self

    def asked(self) -> "Reader":
        """The whole of it, here and now."""
        self.run()
        return self

    @property
    def took_s(self) -> float:
        """From the request to the end."""
        return self.ended_s - self.began_s

    def run(self) -> None:
        self.began_s = time.monotonic()
        try:
            with (
                httpx.Client(timeout=60, trust_env=False) as client,
                client.stream("POST", self._url, headers=self._headers, json=self._body) as answer,
            ):
                self.status, self.headers = answer.status_code, answer.headers
                self.request_id = answer.headers.get("x-request-id", "")
                if answer.status_code != 200:
                    answer.read()
                    self._fail(answer.json()["error"])
                    return
                for line in answer.iter_lines():
                    self._see(line)
        except httpx.TransportError:
            pass
        finally:
            self.ended_s = time.monotonic()

    def _see(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith('data: {"error"'):
            self._fail(json.loads(line.removeprefix("data: "))["error"])
        else:
            self.chunks += '"content":"' in line and '"content":""' not in line

    def _fail(self, error: dict[str, Any]) -> None:
        self.error, self.code = error, error["code"]
