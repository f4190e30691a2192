"""What is known of models by their names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.models import UNKNOWN, facts_for


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gpt-4o", "openai/gpt-4o-2024-08-06"),
        ("gpt-4o-mini", "ft:gpt-4o-mini-2024-07-18:heron::abc"),
        ("gpt-3.5-turbo", "gpt-35-turbo"),
        (
            "llama-3.1-8b-instruct",
            "accounts/fireworks/models/llama-v3p1-8b-instruct",
        ),
        ("llama-3.1-8b-instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
        ("claude-3-5-sonnet", "us.anthropic.claude-3-5-sonnet-20240620-v1:0"),
        ("gpt-4o", "openai/gpt-4o:free"),
    ],
)
def test_vendors_dates_and_frames_around_a_name_do_not_matter(one: str, other: str) -> None:
    assert facts_for(one) == facts_for(other) != UNKNOWN


@pytest.mark.parametrize(
    "model",
    [
        "gpt-3.5-turbo",
        "gpt-4",
        "gpt-4-turbo",
        "gpt-4o",
        "gpt-4.1-mini",
        "chatgpt-4o-latest",
        "llama-3.3-70b-versatile",
        "llama3-8b-8192",
        "mistral-7b-instruct",
        "open-mixtral-8x7b",
        "claude-3-haiku",
        "gemini-2.0-flash",
        "qwen2.5-7b",
    ],
)
def test_models_that_show_all_they_bill(model: str) -> None:
    assert facts_for(model).visible_only


@pytest.mark.parametrize(
    "model",
    [
        "o1",
        "o1-mini",
        "o3-mini-2025-01-31",
        "o4-mini",
        "gpt-5",
        "gpt-5-nano",
        "gpt-5.2",
        "gpt-6",
        "deepseek-reasoner",
        "deepseek-r1-distill-llama-70b",
        "llama-3.1-nemotron-ultra",
        "qwq-32b",
        "magistral-small",
        "phi-4-reasoning",
        "gemini-2.5-pro",
        "gemini-2.0-flash-thinking-exp",
        "grok-4",
        "claude-sonnet-4-5",
        "claude-3-7-sonnet",
        "qwen3-8b",
        "gpt-4o-audio-preview",
        "gpt-audio-1.5",
        "gpt-4o-mini-search-preview",
        "sonar",
        "gpt-oss-120b",
        "heron-1",
        "",
        "openai/gpt-4o:online",
        "qwen/qwen2.5-7b:thinking",
    ],
)
def test_models_that_may_hide_output_or_are_not_known(model: str) -> None:
    assert not facts_for(model).visible_only


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [
        ("gpt-4o", "o200k_base"),
        ("gpt-5-mini", "o200k_base"),
        ("o3", "o200k_base"),
        ("gpt-4.1", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("gpt-4-0613", "cl100k_base"),
        ("gpt-3.5-turbo-0125", "cl100k_base"),
        ("llama-3.1-8b", None),
        ("claude-3-haiku", None),
        ("heron-1", None),
    ],
)
def test_tokenizers(model: str, tokenizer: str | None) -> None:
    assert facts_for(model).tokenizer == tokenizer


def test_reasoning_models_of_openai_are_clamped_by_the_field_that_they_take() -> None:
    assert facts_for("o3-mini").clamp_field == "max_completion_tokens"
    assert facts_for("gpt-5").clamp_field == "max_completion_tokens"
    assert facts_for("gpt-4o").clamp_field == "max_tokens"
    assert facts_for("llama-3.1-8b").clamp_field == "max_tokens"


@given(st.text(max_size=80))
def test_no_name_fails(model: str) -> None:
    facts_for(model)
