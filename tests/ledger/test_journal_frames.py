import random
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from behest_ledger.charging import Outcome
from behest_ledger.holds import Settlement, UsageLine, void
from behest_ledger.journal import Acknowledged, Admitted, Carried, Damage, Ended, Extended, Progress, Record
from behest_ledger.journal.errors import RecordRefusedError
from behest_ledger.journal.frames import HEADER_BYTES, MAGIC, PAYLOAD_BYTES_MAX, frame, payloads
from behest_ledger.journal.records import PAD, decode, encode, is_padding
from behest_ledger.token_counts import TOKEN_CLASSES, TokenCounts

HOLDER = UUID("11111111-2222-4333-8444-555555555555")
IDS = st.uuids(version=4)
COUNTS = st.integers(0, 2**40)
TEXT = st.text(max_size=12)
ATTRIBUTES = st.dictionaries(TEXT, TEXT | st.integers(-(2**63), 2**63 - 1) | st.none(), max_size=3)
SETTLEMENTS = st.builds(
    Settlement,
    tenant_id=TEXT,
    request_id=IDS,
    state=st.sampled_from(["settled", "void"]),
    outcome=st.sampled_from(Outcome),
    source=st.sampled_from(["provider", "local", "estimate", "none"]),
    requests=st.integers(0, 1),
    input_tokens=COUNTS,
    output_tokens=COUNTS,
    amount_pico=st.integers(0, 2**63 - 1),
    lines=st.lists(
        st.builds(
            UsageLine,
            class_=st.sampled_from(TOKEN_CLASSES),
            quantity=COUNTS,
            rate_pico=COUNTS,
            amount_pico=COUNTS,
            source=st.just("local"),
        ),
        max_size=2,
    ),
    facts=ATTRIBUTES,
)
ADMISSIONS = st.builds(
    Admitted,
    tenant_id=TEXT,
    request_id=IDS,
    holder_id=st.just(HOLDER),
    input_counts=st.builds(TokenCounts, input=COUNTS, cache_read=COUNTS),
    rates=st.fixed_dictionaries(dict.fromkeys(TOKEN_CLASSES, COUNTS)),
    request_fee_pico=COUNTS,
    price_key=TEXT,
    attributes=ATTRIBUTES,
)
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(Acknowledged, request_id=IDS),
    st.builds(Extended, request_id=IDS, granted_tokens=COUNTS),
    st.builds(Carried, request_id=IDS, progress=st.builds(Progress, output=COUNTS, sent=st.booleans())),
    st.builds(Ended, settlement=SETTLEMENTS),
    ADMISSIONS,
)
FILES = st.lists(RECORDS, max_size=6)


def read(data: bytes) -> tuple[list[Record | None], Damage]:
    damage = Damage()
    return [decode(payload) for payload in payloads(data, damage)], damage


def joined(written: list[Record]) -> tuple[bytes, list[int]]:
    """A file, and where each of its frames ends."""
    data, ends = b"", list[int]()
    for record in written:
        data += encode(record)
        ends.append(len(data))
    return data, ends


@given(FILES)
def test_what_is_written_is_read(written: list[Record]) -> None:
    assert read(joined(written)[0]) == (written, Damage())


@given(FILES, FILES, st.integers(0, 2**64))
def test_files_one_after_the_other_are_one_file(first: list[Record], second: list[Record], seed: int) -> None:
    shuffled = random.Random(seed).sample(first + second, len(first + second))
    assert read(joined(first)[0] + joined(second)[0])[0] == first + second
    assert read(joined(shuffled)[0])[0] == shuffled


@given(st.lists(RECORDS, min_size=1, max_size=2))
def test_a_file_cut_at_any_byte_loses_the_cut_record_alone(written: list[Record]) -> None:
    data, ends = joined(written)
    for cut in range(len(data)):
        whole = sum(end <= cut for end in ends)
        torn = cut - ([0, *ends][whole])
        assert read(data[:cut]) == (written[:whole], Damage(regions=int(torn > 0), bytes=torn))


@given(FILES, st.data())
def test_a_file_without_its_beginning_loses_the_cut_record_alone(written: list[Record], draw: st.DataObject) -> None:
    data, ends = joined(written)
    cut = draw.draw(st.integers(0, len(data)))
    starts = [0, *ends[:-1]]
    assert read(data[cut:])[0] == [
        record for record, start in zip(written, starts[: len(written)], strict=True) if start >= cut
    ]


@given(st.lists(RECORDS, min_size=1, max_size=6), st.data())
def test_changed_bytes_cost_the_records_they_are_in_and_no_other(written: list[Record], draw: st.DataObject) -> None:
    data, ends = joined(written)
    changes = draw.draw(st.dictionaries(st.integers(0, len(data) - 1), st.integers(1, 255), max_size=5))
    changed = bytearray(data)
    for at, mask in changes.items():
        changed[at] ^= mask
    starts = [0, *ends[:-1]]
    intact = [
        record
        for record, start, end in zip(written, starts, ends, strict=True)
        if not any(start <= at < end for at in changes)
    ]
    found, damage = read(bytes(changed))
    assert found == intact
    assert bool(damage) == bool(changes)


@given(
    FILES,
    st.binary(min_size=1, max_size=200) | st.sampled_from([MAGIC, MAGIC * 20, b"\0" * 99, MAGIC + bytes(60)]),
    st.data(),
)
def test_rubbish_costs_at_most_the_record_it_is_in(written: list[Record], rubbish: bytes, draw: st.DataObject) -> None:
    data, ends = joined(written)
    at = draw.draw(st.integers(0, len(data)))
    starts = [0, *ends[:-1]]
    kept = [record for record, start, end in zip(written, starts, ends, strict=False) if not start < at < end]
    found, _ = read(data[:at] + rubbish + data[at:])
    # Only where the rubbish repeats the frame's own bytes at its place is even that record whole.
    assert found in (kept, written)


@given(st.binary(max_size=400))
@example(MAGIC + bytes(200))
@example(MAGIC * 50)
def test_rubbish_alone_is_no_record(rubbish: bytes) -> None:
    found, damage = read(rubbish)
    assert found == []
    assert damage.bytes == len(rubbish)


@given(ADMISSIONS)
def test_a_frame_smuggled_into_a_text_is_never_believed(inner: Admitted) -> None:
    """Somebody names his session so that it looks like a record, and hopes for damage to the record around it."""
    text = encode(inner).decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()
    outer = Admitted(
        tenant_id="t",
        request_id=HOLDER,
        holder_id=HOLDER,
        input_counts=TokenCounts(),
        rates=dict.fromkeys(TOKEN_CLASSES, 1),
        request_fee_pico=0,
        price_key="p",
        attributes={"session": text, "user": encode(inner).decode("latin-1")},
    )
    data = encode(outer)
    assert read(data)[0] == [outer]
    assert read(b"\0" + data[1:])[0] == []
    assert read(data[HEADER_BYTES:])[0] == []


def test_no_byte_of_the_magic_is_ever_a_part_of_utf8() -> None:
    used = {byte for number in range(0x110000) if not 0xD800 <= number < 0xE000 for byte in chr(number).encode()}
    assert used.isdisjoint(MAGIC)


def test_another_versions_kinds_are_skipped_and_seen_to_be_unknown() -> None:
    first, last = Acknowledged(request_id=HOLDER), Extended(request_id=HOLDER, granted_tokens=3)
    for payload in (
        msgspec.msgpack.encode({"kind": "audited", "request_id": str(HOLDER)}),
        msgspec.msgpack.encode({"kind": "extended", "request_id": str(HOLDER), "granted_tokens": "many"}),
        msgspec.msgpack.encode({"request_id": str(HOLDER)}),
        msgspec.msgpack.encode([1, 2]),
        b"\xc1",
    ):
        assert read(encode(first) + frame(payload) + encode(last)) == ([first, None, last], Damage())


def test_members_that_a_later_version_adds_do_no_harm() -> None:
    payload = msgspec.msgpack.encode({"kind": "acknowledged", "request_id": str(HOLDER), "why": "because"})
    assert decode(payload) == Acknowledged(request_id=HOLDER)


def test_padding_means_nothing() -> None:
    damage = Damage()
    (payload,) = payloads(PAD, damage)
    assert is_padding(payload)
    assert not damage


@pytest.mark.parametrize(
    "facts", [{"much": "x" * PAYLOAD_BYTES_MAX}, {"large": 2**70}, {"odd": object()}, {"text": "\ud800"}]
)
def test_a_record_that_has_no_form_is_refused_as_such(facts: dict[str, Any]) -> None:
    settlement = msgspec.structs.replace(void("t", HOLDER, Outcome.CRASHED), facts=facts)
    with pytest.raises(RecordRefusedError, match=str(HOLDER)):
        encode(Ended(settlement=settlement))


def test_an_admission_without_a_rate_for_every_class_is_no_record() -> None:
    with pytest.raises(ValueError, match="no rate for reasoning"):
        Admitted(
            tenant_id="t",
            request_id=HOLDER,
            holder_id=HOLDER,
            input_counts=TokenCounts(),
            rates={name: 1 for name in TOKEN_CLASSES if name != "reasoning"},
            request_fee_pico=0,
            price_key="p",
            attributes={},
        )
