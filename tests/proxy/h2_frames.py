"""HTTP/2 frames by hand (RFC 9113, 4.1), also such as no library would send."""


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def frames_in(received: bytes) -> list[tuple[int, bytes]]:
    """Kind and payload of each whole frame."""
    found: list[tuple[int, bytes]] = []
    while len(received) >= 9 + (length := int.from_bytes(received[:3], "big")):
        found.append((received[3], received[9 : 9 + length]))
        received = received[9 + length :]
    return found


def goaway(last_id: int, code: int = 0) -> bytes:
    return frame(7, 0, 0, last_id.to_bytes(4, "big") + code.to_bytes(4, "big"))
