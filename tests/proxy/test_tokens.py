"""Token counts, offline."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.request import PROMPT_TOKENIZED_BYTES_MAX
from behest_proxy.tokens import FOREIGN_RATIO, bytes_bound, counter_for, warm


@pytest.mark.parametrize(
    ("model", "text", "count"),
    [
        # Published examples of OpenAI's cookbook, "How to count tokens with tiktoken"
        ("gpt-4", "antidisestablishmentarianism", 6),
        ("gpt-4o", "antidisestablishmentarianism", 6),
        ("gpt-4", "2 + 2 = 4", 7),
        ("gpt-4", "お誕生日おめでとう", 9),
        ("gpt-4o", "お誕生日おめでとう", 8),
        ("gpt-4o", "", 0),
    ],
)
def test_counts_are_those_of_the_models_own_tokenizer(model: str, text: str, count: int) -> None:
    counter = counter_for(model)
    assert counter.exact
    assert counter.ratio == 1.0
    assert counter.count(text) == count


def test_a_model_with_another_tokenizer_is_counted_with_a_careful_ratio() -> None:
    counter = counter_for("meta-llama/Llama-3.3-70B-Instruct")
    assert not counter.exact
    assert counter.ratio == FOREIGN_RATIO
    assert counter.count("The heron waits.") > 0


def test_special_tokens_in_a_text_are_plain_text() -> None:
    assert counter_for("gpt-4o").count("<|endoftext|>") > 1


@given(st.text())
def test_no_text_has_more_tokens_than_bytes(text: str) -> None:
    assert counter_for("gpt-4o").count(text) <= bytes_bound(text)


def test_half_a_surrogate_pair_is_counted() -> None:
    assert counter_for("gpt-4o").count("a\ud83d") >= 2
    assert bytes_bound("a\ud83d") == 4


def test_many_threads_get_one_counter_and_one_count() -> None:
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(counter_for("gpt-4").count("2 + 2 = 4"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    warm("cl100k_base")
    assert counts == [7] * 8


def test_long_runs_without_a_word_are_counted() -> None:
    """A tokenizer that is quadratic in the length of a run takes minutes for these."""
    counter = counter_for("gpt-4o")
    runs = [
        "a" * PROMPT_TOKENIZED_BYTES_MAX,
        " " * PROMPT_TOKENIZED_BYTES_MAX,
        "ab" * (PROMPT_TOKENIZED_BYTES_MAX // 2),
    ]
    assert [counter.count(run) for run in runs] == [4096, 256, 8192]
