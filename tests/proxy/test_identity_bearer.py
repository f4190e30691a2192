"""Exactly one bearer credential, in exactly one header."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.errors import InvalidToken
from behest_proxy.identity.bearer import bearer_of


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER", b"bEaReR"])
def test_the_schemes_case_does_not_matter(scheme: bytes) -> None:
    assert bearer_of([scheme + b" a.b-c_d~e+f/g=="]) == "a.b-c_d~e+f/g=="


def test_white_space_around_the_credential_is_no_part_of_it() -> None:
    assert bearer_of([b" \tBearer   token \t"]) == "token"


def test_no_header_is_refused_with_what_to_send() -> None:
    with pytest.raises(InvalidToken, match="Bearer"):
        bearer_of([])


def test_two_headers_are_refused_even_if_they_agree() -> None:
    with pytest.raises(InvalidToken, match="more than one"):
        bearer_of([b"Bearer a", b"Bearer a"])


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer\ttoken",
        b"Bearertoken",
        b"Basic dTpw",
        b"token",
        b"Bearer a b",
        b"Bearer a, Bearer b",
        b"Bearer a,b",
        b"Bearer =",
        b"Bearer a=b",
        b"Bearer \xe9",
        b"Bearer a\x00",
        b"Bearer a\n",
        b"Bearer a\r\nX: y",
        b'Bearer "a"',
        b"X Bearer a",
        b"Bearer " + b"a" * 16_384,
    ],
)
def test_what_is_not_one_bearer_credential_is_refused_without_showing_it(value: bytes) -> None:
    with pytest.raises(InvalidToken) as caught:
        bearer_of([value])
    assert "dTpw" not in caught.value.message


@given(value=st.binary(max_size=100))
def test_no_bytes_whatever_raise_anything_but_a_shown_refusal(value: bytes) -> None:
    try:
        bearer = bearer_of([b"Bearer " + value])
    except InvalidToken:
        return
    assert bearer.isascii()
    assert bearer
