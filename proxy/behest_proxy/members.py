"""The members of a JSON object, decoded once, each exactly once, in their order.

Two parsers may take different ones of two equal keys: a gateway that prices the first and a provider that obeys the
second would be robbed. So a repeated key is an error here, and what goes on is written anew from what was read.
"""

import re

import msgspec

from behest_proxy.errors import InvalidRequest

_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_KEY_DECODER = msgspec.json.Decoder(str)
_SPACE = re.compile(rb"[ \t\n\r]*")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')

MEMBERS_MAX = 256
"""More members than any API has: beyond, the walk over them would only cost."""


def members_of(body: bytes, where: str = "") -> dict[str, msgspec.Raw]:
    """The top-level members of a JSON object as raw JSON texts.

    `where` names the object if it is a part of the body, for errors. Raises `InvalidRequest` for what is no JSON
    object and for a key that comes twice.
    """
    try:
        # The decoder passes by what stands in the values; what is no UTF-8 must not get any further.
        if not body.isascii():
            body.decode()
        members = _DECODER.decode(body)
    except msgspec.ValidationError:
        raise InvalidRequest("the body must be a JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if len(members) > MEMBERS_MAX:
        raise InvalidRequest(f"the body has more than {MEMBERS_MAX} members")
    _refuse_repeated_keys(body, members, where)
    return members


def _refuse_repeated_keys(body: bytes, members: dict[str, msgspec.Raw], where: str) -> None:
    """Walk over the text by the values that were kept; where one does not stand, another with its key was lost.

    The text is valid JSON already, so only keys, colons and commas are looked at: no value is parsed again.
    """
    seen: set[str] = set()
    at = _skip_space(body, 0) + 1
    while True:
        at = _skip_space(body, at)
        if body[at : at + 1] != b'"':
            return  # the closing brace
        string = _STRING.match(body, at)
        assert string is not None, "valid JSON has a whole string here"
        end = string.end()
        key = _KEY_DECODER.decode(body[at:end])
        at = _skip_space(body, _skip_space(body, end) + 1)
        value = bytes(members[key])
        after = at + len(value)
        behind = _skip_space(body, after)
        if key in seen or body[at:after] != value or body[behind : behind + 1] not in (b",", b"}"):
            param = f"{where}.{key}" if where else key
            raise InvalidRequest(f"{param}: is given more than once", param=param)
        seen.add(key)
        at = behind + 1


def _skip_space(body: bytes, at: int) -> int:
    space = _SPACE.match(body, at)
    assert space is not None, "the pattern matches nothing, too"
    return space.end()
