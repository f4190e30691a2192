"""A connection of either side: whatever frames a header block comes in, its lines are checked; what is sent is read."""

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import Event, RequestReceived, ResponseReceived, TrailersReceived
from h2.exceptions import ProtocolError
from hpack import Encoder
from hyperframe.frame import ContinuationFrame, Frame, HeadersFrame

from behest_proxy.edge.h2_machine import H2Machine
from behest_proxy.edge.limits import EdgeLimits
from behest_proxy.http2.connection import Connection
from behest_proxy.upstream.http2_settings import new_h2_state

Lines = list[tuple[bytes, bytes]]

REQUEST: Lines = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"a.b")]
ANSWER: Lines = [(b":status", b"200")]
BAD_LINES = [
    (b"X-A", b"1"),
    (b"x-a", b"1\r\nx-b: 2"),
    (b"transfer-encoding", b"chunked"),
    (b":path", b"/other"),
]


def frames_of(lines: Lines, how: str, *, ends: bool) -> list[Frame]:
    """The frames of a header block, as bytes that hold it whole, in two pieces, or with all that may surround it."""
    block = Encoder().encode(lines)
    first = HeadersFrame(1)
    first.flags |= {"END_STREAM"} if ends else set()
    if how == "continued":
        first.data, last = block[:3], ContinuationFrame(1, block[3:])
        last.flags.add("END_HEADERS")
        return [first, last]
    first.data = block
    first.flags.add("END_HEADERS")
    if how == "padded":
        first.flags |= {"PADDED", "PRIORITY"}
        first.pad_length, first.depends_on, first.stream_weight, first.exclusive = 5, 0, 15, False
    return [first]


def said(lines: Lines, how: str, *, ends: bool = False) -> bytes:
    return b"".join(frame.serialize() for frame in frames_of(lines, how, ends=ends))


def client() -> Connection:
    """With a request under way."""
    state = new_h2_state()
    server = H2Connection(H2Configuration(client_side=False))
    server.initiate_connection()
    state.receive_data(server.data_to_send())
    state.send_headers(1, REQUEST, end_stream=True)
    return state


def server() -> Connection:
    """To which somebody is connected."""
    state = H2Machine(EdgeLimits())
    other = H2Connection(H2Configuration(client_side=True))
    other.initiate_connection()
    state.receive_data(other.data_to_send())
    return state


def kinds(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events]


@pytest.mark.parametrize("how", ["plain", "continued", "padded"])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_malformed_header_ends_the_connection_in_whatever_frames_it_comes(bad: tuple[bytes, bytes], how: str) -> None:
    assert RequestReceived in kinds(server().receive_data(said(REQUEST, how)))
    assert ResponseReceived in kinds(client().receive_data(said(ANSWER, how)))
    for state, lines in ((server(), REQUEST), (client(), ANSWER)):
        with pytest.raises(ProtocolError):
            state.receive_data(said([*lines, bad], how))


@pytest.mark.parametrize("how", ["plain", "continued", "padded"])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_malformed_trailer_ends_the_connection_too(bad: tuple[bytes, bytes], how: str) -> None:
    for make, lines in ((server, REQUEST), (client, ANSWER)):
        state = make()
        state.receive_data(said(lines, "plain"))
        assert TrailersReceived in kinds(state.receive_data(said([(b"x-sum", b"1")], how, ends=True)))
        state = make()
        state.receive_data(said(lines, "plain"))
        with pytest.raises(ProtocolError):
            state.receive_data(said([bad], how, ends=True))


def test_an_interim_answer_is_checked_too() -> None:
    state = client()
    state.receive_data(said([(b":status", b"103"), (b"link", b"x")], "plain"))
    with pytest.raises(ProtocolError):
        state.receive_data(said([(b":status", b"103"), (b"Link", b"x")], "plain"))


def test_a_block_that_changes_its_table_again_and_again_is_refused() -> None:
    block = HeadersFrame(1, b"\x20" * 16_000)
    block.flags.add("END_HEADERS")
    state = server()
    with pytest.raises(ProtocolError):
        state.receive_data(block.serialize())


def test_what_is_sent_others_read() -> None:
    other = H2Connection(H2Configuration(client_side=True))
    other.initiate_connection()
    state = H2Machine(EdgeLimits())
    other.send_headers(1, REQUEST, end_stream=True)
    state.receive_data(other.data_to_send())
    long = [(b"x-long", b"v" * 40_000)]  # in CONTINUATION
    state.send_headers(1, [*ANSWER, (b"x-a", b"b"), *long], end_stream=True)
    received = [event for event in other.receive_data(state.data_to_send()) if isinstance(event, ResponseReceived)]
    assert [(bytes(name), bytes(value)) for name, value in received[0].headers] == [*ANSWER, (b"x-a", b"b"), *long]
