"""A lean HTTP/2 client (prior knowledge): many streams on a connection, frames walked by hand.

The client shares two cores with what is measured, so it must be cheap: `h2` would take as much per frame as a proxy
does. Windows are opened to their maximum at the start, so no WINDOW_UPDATE is needed during a run.
"""

import asyncio
import struct
from typing import cast

from bench.answers import Answer, BrokenAnswer
from hpack import Decoder, Encoder

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_WINDOW_MAX = 2**31 - 1
_WINDOW_DEFAULT = 65_535
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


class H2Client(asyncio.Protocol):
    """One connection. `request` may be called as often as the server allows streams."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._answers: dict[int, Answer] = {}
        self._next_id = 1
        self._rest = b""
        self._send_window = _WINDOW_DEFAULT

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open the windows."""
        self._transport = cast("asyncio.Transport", transport)
        settings = struct.pack(">HIHI", 2, 0, 4, _WINDOW_MAX)  # no push; a stream's window
        window = (_WINDOW_MAX - _WINDOW_DEFAULT).to_bytes(4, "big")
        self._transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, window))

    def request(
        self,
        authority: str,
        path: str,
        headers: list[tuple[str, str]],
        body: bytes,
        *,
        answer: Answer | None = None,
    ) -> Answer:
        """Send a POST. `answer`: one that watches for more than most do."""
        self._send_window -= len(body)
        if self._send_window < 0:
            raise BrokenAnswer("the server's window is used up: more connections are needed")
        stream_id, self._next_id = self._next_id, self._next_id + 2
        answer = self._answers[stream_id] = answer or Answer()
        head = [(":method", "POST"), (":scheme", "http"), (":authority", authority), (":path", path), *headers]
        block = self._encoder.encode(head)
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, stream_id, block) + _frame(_DATA, _END_STREAM, stream_id, body)
        )
        return answer

    def data_received(self, data: bytes) -> None:
        """Walk the frames."""
        if self._rest:
            data = self._rest + data
        position, size = 0, len(data)
        while position + 9 <= size:
            end = position + 9 + (data[position] << 16 | data[position + 1] << 8 | data[position + 2])
            if end > size:
                break
            stream_id = int.from_bytes(data[position + 5 : position + 9], "big")
            flags = data[position + 4]
            if data[position + 3] == _DATA:
                answer = self._answers[stream_id]
                answer.feed(data[position + 9 : end])
                if flags & _END_STREAM:
                    del self._answers[stream_id]
                    answer.end()
            else:
                self._other_frame(data[position + 3], flags, stream_id, data[position + 9 : end])
            position = end
        self._rest = data[position:]

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes."""
        for answer in self._answers.values():
            answer.fail(exc or BrokenAnswer("the connection was closed"))

    def close(self) -> None:
        """Leave."""
        self._transport.close()

    def _other_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == _HEADERS:
            if not flags & _END_HEADERS:
                raise BrokenAnswer("a head in several frames: this client is too simple for it")
            answer = self._answers[stream_id]
            for name, value in self._decoder.decode(payload, raw=True):
                if name == b":status":
                    answer.status = int(value)
            if flags & _END_STREAM:
                del self._answers[stream_id]
                answer.end()
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and stream_id == 0:
            self._send_window += int.from_bytes(payload, "big")
        elif kind == _RST_STREAM:
            if stream_id in self._answers:
                self._answers.pop(stream_id).fail(BrokenAnswer(f"reset with code {int.from_bytes(payload, 'big')}"))
        elif kind == _GOAWAY and int.from_bytes(payload[4:8], "big"):
            raise BrokenAnswer(f"GOAWAY with code {int.from_bytes(payload[4:8], 'big')}")
