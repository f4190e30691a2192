import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.sealing import SealingError, key_from_text, opened, seal, tenant_key

MASTER = bytes(range(32))
NONCE = b"n" * 12


@given(secret=st.text(max_size=200), place=st.text(max_size=50))
def test_what_was_sealed_opens_at_its_place(secret: str, place: str) -> None:
    assert opened(MASTER, seal(MASTER, secret, place=place, nonce=NONCE), place=place) == secret


def test_at_another_place_or_with_another_tenants_key_it_stays_closed() -> None:
    key = tenant_key(MASTER, "acme")
    sealed = seal(key, "sk-secret", place="acme upstream:demo/openai", nonce=NONCE)
    with pytest.raises(SealingError, match="another key, or for another place"):
        opened(key, sealed, place="evil upstream:demo/openai")
    with pytest.raises(SealingError, match="another key, or for another place"):
        opened(tenant_key(MASTER, "evil"), sealed, place="acme upstream:demo/openai")


@given(st.data())
def test_one_changed_bit_keeps_it_closed(data: st.DataObject) -> None:
    sealed = bytearray(seal(MASTER, "sk-secret", place="p", nonce=NONCE))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SealingError):
        opened(MASTER, bytes(sealed), place="p")


@pytest.mark.parametrize("text", ["", "short", "!!!!", "A" * 44])
def test_a_malformed_key_says_how_to_make_one(text: str) -> None:
    with pytest.raises(SealingError, match="32 bytes in base64"):
        key_from_text(text)


def test_every_tenant_has_a_key_of_its_own_and_always_the_same() -> None:
    assert tenant_key(MASTER, "a") == tenant_key(MASTER, "a") != tenant_key(MASTER, "b")
