"""The bearer credential in an Authorization header (RFC 6750 section 2.1), and nothing else."""

import re
from collections.abc import Sequence

from behest_proxy.errors import InvalidToken

__all__ = ["bearer_of"]

_HEADER_BYTES_MAX = 16 * 1024

# RFC 7235: the scheme's case does not matter; RFC 6750: b64token.
_BEARER = re.compile(rb"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)


def bearer_of(values: Sequence[bytes]) -> str:
    """The credential in the values of a request's Authorization headers.

    Raises `InvalidToken` unless there is exactly one such header with the scheme Bearer and a credential:
    with two of them, something before us may have looked at the other.
    """
    if not values:
        raise InvalidToken("There is no Authorization header: send 'Authorization: Bearer <token>'.")
    if len(values) > 1:
        raise InvalidToken("There is more than one Authorization header: send exactly one.")
    value = values[0].strip(b" \t")
    if len(value) > _HEADER_BYTES_MAX:
        raise InvalidToken(f"The Authorization header is over {_HEADER_BYTES_MAX} bytes.")
    match = _BEARER.fullmatch(value)
    if match is None:
        raise InvalidToken("The Authorization header is not 'Bearer <token>'.")
    return match[1].decode("ascii")
