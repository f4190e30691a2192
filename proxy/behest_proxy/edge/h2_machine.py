"""The `h2` state machine with three of its rules changed for a server that outlives a GOAWAY.

`h2` 4.x closes its machine at the first GOAWAY in either direction, though RFC 9113, 6.8 lets the streams
below the named id finish; it answers one stream too many by ending the connection; and it counts open
streams by walking over all of them. But for headers (`http2.connection`) everything else is `h2`'s own.
"""

from h2.events import ConnectionTerminated, Event
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

from behest_proxy.edge.limits import EdgeLimits
from behest_proxy.http2.connection import Connection

LAST_POSSIBLE_STREAM = 2**31 - 1
_DEFAULT_WINDOW = 65_535


class H2Machine(Connection):
    """The server side of one HTTP/2 connection, sans I/O."""

    # Remembered only to answer late frames by the right error; h2's 65,536 entries would be megabytes.
    MAX_CLOSED_STREAMS = 2048

    def __init__(self, limits: EdgeLimits) -> None:
        super().__init__(client_side=False, header_list_bytes=limits.header_list_bytes)
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: limits.concurrent_streams,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.header_list_bytes,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.request_window_bytes,
            },
        )
        self.initiate_connection()
        if limits.connection_window_bytes > _DEFAULT_WINDOW:
            self.increment_flow_control_window(limits.connection_window_bytes - _DEFAULT_WINDOW)

    @property
    def open_inbound_streams(self) -> int:
        """Zero: the connection itself refuses a stream too many, by REFUSED_STREAM (RFC 9113, 5.1.2)."""
        return 0

    def forget(self, stream_id: int) -> None:
        """Drop a closed stream, as `h2` does while it counts. Late frames for it are still understood."""
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            self._closed_streams[stream_id] = stream.closed_by

    def queue_goaway(self, *, last_stream_id: int, error_code: int = 0) -> None:
        """Queue a GOAWAY without closing the machine, so that the streams up to that id can finish."""
        frame = GoAwayFrame(0)
        frame.last_stream_id = last_stream_id
        frame.error_code = error_code
        self._prepare_for_sending([frame])

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        event = ConnectionTerminated()
        event.error_code = frame.error_code
        event.last_stream_id = frame.last_stream_id
        return [], [event]
