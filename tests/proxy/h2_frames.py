"""HTTP/2 frames by hand (RFC 9113, 4.1), also such as no library would send."""


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def goaway(last_id: int, code: int = 0) -> bytes:
    return frame(7, 0, 0, last_id.to_bytes(4, "big") + code.to_bytes(4, "big"))
