"""Header blocks: what `hpack` reads, we read; what we write, `hpack` reads; and what is remembered changes nothing."""

import pytest
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError, OversizedHeaderListError
from hpack.struct import HeaderTuple, NeverIndexedHeaderTuple
from hpack.table import HeaderTable
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.http2.header_coding import HeaderDecoder, HeaderEncoder, remembered

NAMES = st.sampled_from(
    [b":path", b":method", b":status", b"authorization", b"content-type", b"date", b"x-a"]
) | st.binary(min_size=1, max_size=20)
VALUES = st.sampled_from([b"", b"GET", b"POST", b"200", b"418", b"gzip, deflate"]) | st.binary(max_size=40)
LINES = st.lists(st.tuples(NAMES, VALUES, st.booleans()), max_size=8)

# RFC 7541, appendix C: three requests and three answers over one connection each, without and with the Huffman code.
REQUESTS = [
    "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
    "8286 84be 5808 6e6f 2d63 6163 6865",
    "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
]
CODED_REQUESTS = [
    "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
    "8286 84be 5886 a8eb 1064 9cbf",
    "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
]
SAID = [
    [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")],
    [
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":path", b"/"),
        (b":authority", b"www.example.com"),
        (b"cache-control", b"no-cache"),
    ],
    [
        (b":method", b"GET"),
        (b":scheme", b"https"),
        (b":path", b"/index.html"),
        (b":authority", b"www.example.com"),
        (b"custom-key", b"custom-value"),
    ],
]


@pytest.mark.parametrize("blocks", [REQUESTS, CODED_REQUESTS], ids=["plain", "coded"])
def test_the_examples_of_the_specification_are_read(blocks: list[str]) -> None:
    decoder = HeaderDecoder()
    assert [decoder.decode(bytes.fromhex(block)) for block in blocks] == SAID


@given(blocks=st.lists(st.tuples(LINES, st.booleans(), st.sampled_from([None, 0, 60, 4096])), max_size=6))
def test_what_another_encoder_writes_is_read_as_it_was_said(
    blocks: list[tuple[list[tuple[bytes, bytes, bool]], bool, int | None]],
) -> None:
    encoder, decoder = Encoder(), HeaderDecoder()
    for lines, huffman, table_bytes in blocks:
        if table_bytes is not None:
            encoder.header_table_size = table_bytes
        said = [(NeverIndexedHeaderTuple if never else HeaderTuple)(name, value) for name, value, never in lines]
        read = decoder.decode(encoder.encode(said, huffman=huffman))
        assert read == [(name, value) for name, value, _ in lines]
        kinds = [isinstance(line, NeverIndexedHeaderTuple) for line in read]
        # A line that is in a table already comes as its place there, whatever it was marked as.
        assert all(never or not kind for kind, (_, _, never) in zip(kinds, lines, strict=True))


@given(blocks=st.lists(st.binary(max_size=30) | st.lists(st.integers(0x00, 0xFF), max_size=12).map(bytes), max_size=4))
def test_any_bytes_are_read_or_refused_as_by_hpack(blocks: list[bytes]) -> None:
    ours, theirs = HeaderDecoder(), Decoder()
    for block in blocks:
        try:
            expected = [(bytes(name), bytes(value)) for name, value in theirs.decode(block, raw=True)]
        except (HPACKError, IndexError):
            with pytest.raises(HPACKError):
                ours.decode(block)
            return  # the connection ends here
        assert ours.decode(block) == expected
        assert list(ours.header_table.dynamic_entries) == list(theirs.header_table.dynamic_entries)


def test_headers_are_bounded_however_few_bytes_they_come_in() -> None:
    decoder = HeaderDecoder(max_header_list_size=1000)
    decoder.decode(b"\x40\x01a\x7f\x01" + b"x" * 128)
    with pytest.raises(OversizedHeaderListError):
        decoder.decode(b"\xbe" * 10)


@pytest.mark.parametrize(
    "block",
    ["3fff ffff ff0f 82", "3fe2 1f", "82 20", "20 20 20 82", "20" * 5000],
    ids=["huge", "one more than allowed", "behind a header", "three times", "again and again"],
)
def test_a_tables_size_is_changed_within_bounds_and_at_the_beginning(block: str) -> None:
    with pytest.raises(HPACKError):
        HeaderDecoder().decode(bytes.fromhex(block))
    assert HeaderDecoder().decode(bytes.fromhex("20 3fe1 1f 82")) == [(b":method", b"GET")]


def test_a_number_has_as_many_bytes_as_in_hpack() -> None:
    # An index of four and of five bytes behind its prefix, with zeros on top: 2 in each case.
    for block in ("ff 8380 8000", "7f 0000", "ff 8080 8080 00"):
        try:
            theirs: object = Decoder().decode(bytes.fromhex(block), raw=True)
        except (HPACKError, IndexError):
            theirs = "refused"
        try:
            ours: object = HeaderDecoder().decode(bytes.fromhex(block))
        except HPACKError:
            ours = "refused"
        assert ours == theirs
    decoder = HeaderDecoder()
    for number in range(70):
        decoder.decode(b"\x40\x01%c\x00" % (48 + number % 10))
    # The 127th entry: 127 - 61 - 1 = 65 before the newest, and a number of 5 bytes that says so.
    assert decoder.decode(bytes.fromhex("ff 80 80 80 80 00")) == [(b"4", b"")]
    with pytest.raises(HPACKError):
        decoder.decode(bytes.fromhex("ff 80 80 80 80 80 00"))


def test_a_string_is_not_undone_where_it_must_be_too_large() -> None:
    decoder = HeaderDecoder(max_header_list_size=1000)
    misses = remembered.cache_info().misses
    with pytest.raises(OversizedHeaderListError):
        decoder.decode(b"\x00\x01a\xff" + b"\xa2\x1e" + b"\x00" * 4001)
    assert remembered.cache_info().misses == misses


def test_what_must_never_be_kept_is_told_apart() -> None:
    read = HeaderDecoder().decode(b"\x10\x01a\x01b" + b"\x00\x01a\x01b" + b"\x40\x01a\x01b")
    assert [isinstance(line, NeverIndexedHeaderTuple) for line in read] == [True, False, False]


def test_a_table_that_must_shrink_and_does_not_is_refused() -> None:
    decoder = HeaderDecoder()
    decoder.max_allowed_table_size = 100
    with pytest.raises(HPACKError):
        decoder.decode(b"\x82")
    assert decoder.decode(b"\x3f\x45\x82") == [(b":method", b"GET")]


def test_of_what_was_undone_only_so_much_is_remembered() -> None:
    remembered.cache_clear()
    encoder = Encoder()
    for number in range(3000):
        HeaderDecoder().decode(encoder.encode([NeverIndexedHeaderTuple(b"authorization", b"Bearer %d" % number)]))
    HeaderDecoder().decode(encoder.encode([NeverIndexedHeaderTuple(b"authorization", b"0" * 8000)]))
    found = remembered.cache_info()
    assert found.currsize <= 1024
    assert found.misses >= 3000
    again = encoder.encode([NeverIndexedHeaderTuple(b"authorization", b"Bearer 2999")])
    assert HeaderDecoder().decode(again) == [(b"authorization", b"Bearer 2999")]
    assert remembered.cache_info().hits > found.hits


@given(
    blocks=st.lists(st.lists(st.tuples(NAMES, VALUES | st.binary(min_size=100, max_size=400)), max_size=6), max_size=4)
)
def test_what_is_written_is_read_by_others_whatever_table_they_allow(
    blocks: list[list[tuple[bytes, bytes]]],
) -> None:
    encoder, decoder = HeaderEncoder(), Decoder()
    for number, lines in enumerate(blocks):
        decoder.max_allowed_table_size = encoder.header_table_size = (
            (4096, 0, 200, 65536)[number % 4] if number else 4096
        )
        assert [(bytes(name), bytes(value)) for name, value in decoder.decode(encoder.encode(lines), raw=True)] == lines
        assert not decoder.header_table.dynamic_entries


def test_every_length_and_every_known_name_is_written_as_others_read_it() -> None:
    names = [name for name, _ in HeaderTable.STATIC_TABLE if name[:1] != b":"] + [
        b"x" * size for size in (1, 126, 127, 128)
    ]
    said = [(name, b"v") for name in names] + [(b"x", b"y" * size) for size in (*range(120, 135), 254, 255, 256, 5000)]
    said += [(b":status", b"%d" % status) for status in (200, 204, 418, 503)]
    read = Decoder(max_header_list_size=100_000).decode(HeaderEncoder().encode(said), raw=True)
    assert [(bytes(name), bytes(value)) for name, value in read] == said


def test_a_client_that_changes_its_table_again_and_again_leaves_nothing_behind() -> None:
    encoder = HeaderEncoder()
    first = encoder.encode([(b":status", b"200")])
    for size in range(1000):
        encoder.header_table_size = size
    assert first == b"\x20\x88"
    assert encoder.encode([(b":status", b"200")]) == b"\x88"
    assert encoder.table_size_changes == []


def test_what_is_secret_is_marked_for_everybody_on_the_way() -> None:
    said = [(b"authorization", b"Bearer x"), (b"x-api-key", b"x"), (b"accept", b"*/*"), (b"x-a", b"b")]
    read = HeaderDecoder().decode(HeaderEncoder().encode(said))
    assert read == said
    assert [isinstance(line, NeverIndexedHeaderTuple) for line in read] == [True, True, False, False]
