"""Which provider a base URL leads to: the whole host has to fit, so that one that only begins alike does not.

The price data know a provider by a regular expression over the beginning of a URL. Taken as it is, it also fits
`https://api.openai.com.evil.example/v1`, `https://api.openai.com@evil.example/` and, where it has `.*` in it,
`https://evil.example/x.googleapis.com`. So an expression is divided where its host ends, and each part has to fit the
whole of its counterpart in the URL as a URL parser reads it: all of the host, and whole segments of the path.
"""

import functools
import re
from typing import NamedTuple
from urllib.parse import urlsplit

_UNFINISHED = {r"api\.moonshot\.": r"api\.moonshot\.(?:ai|cn)"}
"""Hosts that the data leave open at the end, as the providers document them. Others that are open fit nothing."""

_END = re.compile(r"\((?:\?:)?/\|\$\)$")
_ANY_SCHEME = re.compile(r"^\((?:\?:)?https\?://\)\?")
_SCHEME = re.compile(r"^https(?P<maybe>\??)://")


class _Pattern(NamedTuple):
    schemes: tuple[str, ...]
    host: re.Pattern[str]
    path: re.Pattern[str] | None


def url_fits(pattern: str, url: str) -> bool:
    """Whether a base URL is one of the provider's that the price data recognise by `pattern`.

    Never raises: what is no URL with a host fits nothing.
    """
    divided = _divided(pattern)
    if divided is None:
        return False
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        return False
    if parts.scheme not in divided.schemes or parts.username is not None or not divided.host.fullmatch(host):
        return False
    if divided.path is None:
        return True
    path = parts.path.lstrip("/")
    ends = [index for index, character in enumerate(path) if character == "/"]
    return any(divided.path.fullmatch(path[:end]) for end in (*ends, len(path)))


@functools.lru_cache(maxsize=1024)
def _divided(pattern: str) -> _Pattern | None:
    """The parts of an expression; None for one that is none, or not one of a URL."""
    text = _END.sub("", pattern)
    found = _SCHEME.match(text)
    schemes: tuple[str, ...]
    if _ANY_SCHEME.match(text):
        schemes, text = ("https", "http"), _ANY_SCHEME.sub("", text)
    elif found is not None:
        schemes, text = ("https", "http") if found["maybe"] else ("https",), text[found.end() :]
    else:
        return None
    at = _first_slash(text)
    host, path = (text, None) if at is None else (text[:at], text[at + 1 :])
    try:
        return _Pattern(
            schemes, re.compile(_UNFINISHED.get(host, host)), re.compile(path) if path is not None else None
        )
    except re.error:
        return None


def _first_slash(text: str) -> int | None:
    """Where the path begins: the first slash that is not in a set such as `[^/]`."""
    inside = escaped = False
    for index, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "[":
            inside = True
        elif character == "]":
            inside = False
        elif character == "/" and not inside:
            return index
    return None
