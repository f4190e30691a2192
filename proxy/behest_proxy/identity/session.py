"""Which session a request belongs to: the token's word binds, the header only fills the gap."""

from collections.abc import Sequence

from behest_proxy.errors import Forbidden, InvalidRequest
from behest_proxy.identity.caller import Caller, is_session_id

__all__ = ["NO_SESSION", "session_of"]

NO_SESSION = "none"
"""The session of a user's requests that name none; budgeted like any other."""


def session_of(caller: Caller, header_values: Sequence[bytes]) -> str:
    """The session of a request, from the token's `sid` and the values of its X-Session-Id headers.

    A header must equal the token's `sid` or be absent: otherwise a browser could invent sessions to escape a
    per-session budget. Without `sid` the header counts, within the user; without both it is `NO_SESSION`.

    Raises `InvalidRequest` for a header that is repeated or no session id, and `Forbidden` for a mismatch.
    """
    if not header_values:
        return caller.session_id if caller.session_id is not None else NO_SESSION
    if len(header_values) > 1:
        raise InvalidRequest("There is more than one X-Session-Id header.", param="X-Session-Id")
    # Latin-1 takes every byte; what is not visible ASCII is refused next.
    header = header_values[0].decode("latin-1")
    if not is_session_id(header):
        raise InvalidRequest("X-Session-Id is not 1-255 visible ASCII characters.", param="X-Session-Id")
    if caller.session_id is not None and header != caller.session_id:
        raise Forbidden(
            "X-Session-Id names another session than the token: send the token's own, or none.",
            param="X-Session-Id",
            details={"reason": "session_mismatch"},
        )
    return header
