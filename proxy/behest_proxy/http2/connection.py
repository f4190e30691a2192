"""The `h2` state machine with our own handling of headers, for either side of a connection."""

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    Event,
    InformationalResponseReceived,
    RequestReceived,
    ResponseReceived,
    TrailersReceived,
)
from hyperframe.frame import Frame, HeadersFrame

from behest_proxy.http2.header_coding import HeaderDecoder, HeaderEncoder
from behest_proxy.http2.header_rules import check_answer, check_request, check_trailers


class Connection(H2Connection):
    """Header lines are bytes. Those that go out are checked by who makes them: names in lower case, no line breaks."""

    def __init__(self, *, client_side: bool, header_list_bytes: int) -> None:
        super().__init__(
            H2Configuration(
                client_side=client_side,
                header_encoding=None,
                validate_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.decoder, self.encoder = HeaderDecoder(), HeaderEncoder()
        self.decoder.max_header_list_size = header_list_bytes

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Frame], list[Event]]:
        frames, events = super()._receive_headers_frame(frame)
        for event in events:
            match event:
                case RequestReceived():
                    check_request(event.headers)
                case ResponseReceived() | InformationalResponseReceived():
                    check_answer(event.headers)
                case TrailersReceived():
                    check_trailers(event.headers)
                case _:
                    pass
        return frames, events
