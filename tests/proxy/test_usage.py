"""Usage: disjoint counts out of every provider's way to report them, and one state out of many reports."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.token_counts import TOKEN_CLASSES, TokenCounts
from behest_proxy.usage import COUNT_MAX, UsageError, UsageState, as_openai, normalise

odd = st.none() | st.booleans() | st.text(max_size=3) | st.floats() | st.integers() | st.lists(st.integers())
counts = st.integers(0, 2000) | odd
details = st.dictionaries(
    st.sampled_from(["cached_tokens", "cache_write_tokens", "audio_tokens", "reasoning_tokens", "text_tokens"]), counts
)
usages = st.dictionaries(
    st.sampled_from(
        [
            "prompt_tokens",
            "completion_tokens",
            "total_tokens",
            "input_tokens",
            "output_tokens",
            "cached_tokens",
            "reasoning_tokens",
            "prompt_cache_hit_tokens",
            "cache_creation_input_tokens",
            "cache_read_input_tokens",
            "prompt_tokens_details",
            "completion_tokens_details",
        ]
    ),
    counts | details,
)
plain_counts = st.integers(0, 5000)


@given(usages)
def test_whatever_is_reported_no_class_is_negative_or_beyond_belief(usage: dict[str, Any]) -> None:
    found = normalise(usage)
    assert all(0 <= count <= 4 * COUNT_MAX for count in found.by_class().values())


@given(plain_counts, plain_counts, st.none() | plain_counts, details, details)
def test_the_classes_are_disjoint(
    prompt: int, completion: int, total: int | None, inputs: dict[str, Any], outputs: dict[str, Any]
) -> None:
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
    found = normalise({**usage, "prompt_tokens_details": inputs, "completion_tokens_details": outputs})
    charged = found.input_tokens + found.output_tokens
    if total is None:
        assert prompt + completion <= charged <= prompt + completion + found.reasoning
    else:
        assert charged == max(total, prompt + completion)
    assert found.input_tokens >= prompt
    assert found.output_tokens >= completion


@given(st.fixed_dictionaries(dict.fromkeys(TOKEN_CLASSES, plain_counts)))
def test_our_own_usage_object_is_read_back(numbers: dict[str, int]) -> None:
    written = TokenCounts(**numbers)
    assert normalise(as_openai(written)) == written


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3}, TokenCounts(input=7, output=3)),
        ({"prompt_tokens": 7, "total_tokens": 10}, TokenCounts(input=7, output=3)),
        # Anthropic's own names: what was cached is beside the input
        (
            {"input_tokens": 3, "output_tokens": 5, "cache_read_input_tokens": 11, "cache_creation_input_tokens": 2},
            TokenCounts(input=3, cache_read=11, cache_write=2, output=5),
        ),
        # The Responses API has the same names with details, and there it is inside.
        (
            {
                "input_tokens": 30,
                "output_tokens": 5,
                "input_tokens_details": {"cached_tokens": 10},
                "output_tokens_details": {"reasoning_tokens": 4},
            },
            TokenCounts(input=20, cache_read=10, output=1, reasoning=4),
        ),
        # OpenAI's names with what was cached beside the prompt: only the total shows it.
        (
            {
                "prompt_tokens": 3,
                "completion_tokens": 5,
                "total_tokens": 108,
                "prompt_tokens_details": {"cached_tokens": 100},
            },
            TokenCounts(input=3, cache_read=100, output=5),
        ),
        # More reasoning than completion and no total to tell
        (
            {"prompt_tokens": 3, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 40}},
            TokenCounts(input=3, output=5, reasoning=40),
        ),
        # Without a total, what is beside the completion is no room for cached input.
        (
            {
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "prompt_tokens_details": {"cached_tokens": 1},
                "completion_tokens_details": {"reasoning_tokens": 1},
            },
            TokenCounts(reasoning=1),
        ),
        ({"prompt_tokens": 1.2, "completion_tokens": True}, TokenCounts(input=2)),
        ({"prompt_tokens": 10**30, "completion_tokens": 1}, TokenCounts(input=COUNT_MAX, output=1)),
        ({"prompt_tokens": float("inf"), "completion_tokens": float("nan")}, TokenCounts(input=COUNT_MAX)),
        ({}, TokenCounts()),
    ],
)
def test_known_shapes(usage: dict[str, Any], expected: TokenCounts) -> None:
    assert normalise(usage) == expected


def test_usage_is_taken_as_json_too() -> None:
    assert normalise(b'{"prompt_tokens":7}') == TokenCounts(input=7)


@pytest.mark.parametrize("usage", [b"", b"null", b"[]", b"7", b"\xff"])
def test_json_that_is_no_object_is_an_error(usage: bytes) -> None:
    with pytest.raises(UsageError):
        normalise(usage)


def test_copies_of_one_report_are_one_report() -> None:
    state = UsageState()
    for _ in range(3):
        state.update({"prompt_tokens": 7, "completion_tokens": 3})
    assert state.counts == TokenCounts(input=7, output=3)


def test_the_last_of_equal_reports_is_kept_as_it_was_written() -> None:
    state = UsageState()
    state.update({"prompt_tokens": 7, "completion_tokens": 3, "cost": None})
    state.update({"prompt_tokens": 7, "completion_tokens": 3, "cost": 1})
    assert state.members == {"prompt_tokens": 7, "completion_tokens": 3, "cost": 1}


def test_place_holders_are_not_usage() -> None:
    state = UsageState()
    state.update({"prompt_tokens": 0, "completion_tokens": 0})
    assert not state.seen
    state.update({"prompt_tokens": 7, "completion_tokens": 3})
    state.update({"prompt_tokens": 0, "completion_tokens": 0})
    assert state.counts == TokenCounts(input=7, output=3)


@given(st.lists(st.tuples(plain_counts, plain_counts), min_size=1))
def test_usage_never_shrinks_and_is_one_of_the_reports(reports: list[tuple[int, int]]) -> None:
    state = UsageState()
    sizes: list[int] = []
    for prompt, completion in reports:
        state.update(json.loads(json.dumps({"prompt_tokens": prompt, "completion_tokens": completion})))
        sizes.append(prompt + completion)
        assert state.counts.input_tokens + state.counts.output_tokens == max(sizes)
