"""Our limits on HTTP/2, and the `h2` state of a new connection that tells them to the peer."""

from typing import Final

from h2.settings import SettingCodes, Settings

from behest_proxy.http2.connection import Connection

STREAM_WINDOW_BYTES: Final = 256 * 1024
"""What a peer may send on one stream before its call has taken it: the bound on what a paused call holds."""

CONNECTION_WINDOW_BYTES: Final = 16 * 1024 * 1024
"""Given back on receipt, so it only has to cover what is on its way."""

STREAMS_MAX: Final = 250
"""Streams on one connection, also when the peer allows more: they share one TCP stream and its losses."""

FRAME_BYTES_MAX: Final = 16 * 1024
"""The default of SETTINGS_MAX_FRAME_SIZE, which we do not raise."""

LAST_STREAM_ID: Final = 2**30
"""Far below the protocol's own end of numbers: then a new connection is opened."""

CONTROL_BACKLOG_BYTES_MAX: Final = 1024 * 1024
"""Answers to PING and SETTINGS that a peer may leave unread."""

_HEADER_LIST_BYTES_MAX: Final = 64 * 1024
_WINDOW_BYTES_AT_START: Final = 65_535


def new_h2_state() -> Connection:
    """A client's state, with preface, SETTINGS and the wider connection window ready to be sent."""
    state = Connection(client_side=True, header_list_bytes=_HEADER_LIST_BYTES_MAX)
    state.local_settings = Settings(
        client=True,
        initial_values={
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
            SettingCodes.MAX_HEADER_LIST_SIZE: _HEADER_LIST_BYTES_MAX,
        },
    )
    state.initiate_connection()
    state.increment_flow_control_window(CONNECTION_WINDOW_BYTES - _WINDOW_BYTES_AT_START)
    return state
