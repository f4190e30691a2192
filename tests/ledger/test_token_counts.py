import msgspec
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.token_counts import INPUT_CLASSES, OUTPUT_CLASSES, TOKEN_CLASSES, TokenCounts

COUNTS = st.builds(TokenCounts, **dict.fromkeys(TOKEN_CLASSES, st.integers(0, 10**9)))


def test_every_class_is_a_field_and_is_either_input_or_output() -> None:
    assert TokenCounts.__struct_fields__ == (
        "input", "cache_read", "cache_write", "output", "reasoning", "audio_input", "audio_output",
    )  # fmt: skip
    assert TokenCounts.__struct_fields__ == TOKEN_CLASSES
    assert sorted(INPUT_CLASSES + OUTPUT_CLASSES) == sorted(TOKEN_CLASSES)


@given(COUNTS)
def test_no_token_is_counted_twice(counts: TokenCounts) -> None:
    assert counts.input_tokens + counts.output_tokens == sum(msgspec.structs.astuple(counts))
    assert counts.input_tokens == sum(getattr(counts, name) for name in INPUT_CLASSES)
    assert counts.output_tokens == sum(getattr(counts, name) for name in OUTPUT_CLASSES)


@given(COUNTS)
def test_the_classes_with_tokens_come_in_the_order_in_which_they_are_written_everywhere(counts: TokenCounts) -> None:
    by_class = counts.by_class()
    assert list(by_class) == [name for name in TOKEN_CLASSES if getattr(counts, name)]
    assert TokenCounts(**by_class) == counts


@given(COUNTS, st.integers(0, 10**9), st.integers(0, 10**9))
def test_what_is_above_a_limit_is_left_out_and_nothing_else(
    counts: TokenCounts, input_tokens: int, output_tokens: int
) -> None:
    limited = counts.at_most(input_tokens=input_tokens, output_tokens=output_tokens)
    assert limited.input_tokens == min(counts.input_tokens, input_tokens)
    assert limited.output_tokens == min(counts.output_tokens, output_tokens)
    assert all(getattr(limited, name) <= getattr(counts, name) for name in TOKEN_CLASSES)
