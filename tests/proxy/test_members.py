"""The members of a body: each exactly once, as they stand."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.errors import InvalidRequest
from behest_proxy.members import MEMBERS_MAX, members_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=12,
)
SPACES = st.text(" \t\n\r", max_size=3)


@st.composite
def spelled(draw: st.DrawFn, text: str) -> str:
    """A JSON string of the text in one of its many spellings."""
    pieces: list[str] = []
    for character in text:
        if draw(st.booleans()) or character in '"\\' or ord(character) < 0x20:
            units = character.encode("utf-16-be")
            pieces += [f"\\u{units[at]:02x}{units[at + 1]:02X}" for at in range(0, len(units), 2)]
        else:
            pieces.append(character)
    return '"' + "".join(pieces) + '"'


@st.composite
def objects(draw: st.DrawFn, pairs: list[tuple[str, Any]]) -> bytes:
    """The JSON text of an object with these members, with any spaces and escapes."""
    members: list[str] = []
    for key, value in pairs:
        text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
        members.append(draw(SPACES) + draw(spelled(key)) + draw(SPACES) + ":" + draw(SPACES) + text + draw(SPACES))
    return (draw(SPACES) + "{" + (",".join(members) or draw(SPACES)) + "}" + draw(SPACES)).encode()


@given(st.dictionaries(TEXTS, VALUES, max_size=6), st.data())
def test_the_members_are_those_that_another_parser_finds(value: dict[str, Any], data: st.DataObject) -> None:
    body = data.draw(objects(list(value.items())))
    members = members_of(body)
    assert list(members) == list(value)
    assert {key: json.loads(bytes(raw)) for key, raw in members.items()} == value
    assert all(bytes(raw) in body for raw in members.values())


@given(st.lists(st.tuples(TEXTS, VALUES), min_size=1, max_size=5), VALUES, st.data())
def test_a_key_that_comes_twice_is_refused_wherever_and_however_it_is_spelled(
    pairs: list[tuple[str, Any]], other: Any, data: st.DataObject
) -> None:
    key, value = data.draw(st.sampled_from(pairs))
    pairs.insert(data.draw(st.integers(0, len(pairs))), (key, data.draw(st.sampled_from([value, other]))))
    with pytest.raises(InvalidRequest):
        members_of(data.draw(objects(pairs)))


@given(st.binary(max_size=60))
def test_noise_is_refused_or_read_as_another_parser_reads_it(body: bytes) -> None:
    try:
        members = members_of(body)
    except InvalidRequest:
        return
    assert list(members) == list(json.loads(body))


def test_repeats_inside_a_value_are_the_values_own() -> None:
    assert bytes(members_of(b'{"a": {"b": 1, "b": 2}}')["a"]) == b'{"b": 1, "b": 2}'


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"[]", b"null", b'"a"', b"{", b'{"a":1}x', b"{'a':1}", b'{"a":1,}', b'{"a":"\xff"}', b"\xef\xbb\xbf{}"],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        members_of(body)


def test_endless_nesting_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        members_of(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")


def test_more_members_than_any_api_has_are_refused() -> None:
    assert len(members_of(msgspec.json.encode({str(number): 0 for number in range(MEMBERS_MAX)}))) == MEMBERS_MAX
    with pytest.raises(InvalidRequest, match="more than"):
        members_of(msgspec.json.encode({str(number): 0 for number in range(MEMBERS_MAX + 1)}))


def test_a_repeat_is_named_with_the_place_of_its_object() -> None:
    with pytest.raises(InvalidRequest) as caught:
        members_of(b'{"type": 1, "type": 1}', "tools[3]")
    assert caught.value.param == "tools[3].type"
