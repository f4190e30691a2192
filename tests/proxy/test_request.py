"""A chat completion request: checked, counted, and written anew for the provider."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.errors import InvalidRequest
from behest_proxy.models import ModelFacts
from behest_proxy.request import PROMPT_TOKENIZED_BYTES_MAX, ChatRequest, count_input, parse, upstream_body
from behest_proxy.tokens import counter_for

USER = [{"role": "user", "content": "Hi"}]
EXACT, FOREIGN = counter_for("gpt-4o"), counter_for("mistral-large")
UNKNOWN = ModelFacts()


def parsed(**members: Any) -> ChatRequest:
    return parse(json.dumps({"messages": USER, **members}).encode())


def refusal(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value


def test_what_is_left_out_has_its_default() -> None:
    request = parsed()
    assert request.model is None
    assert not request.stream
    assert not request.include_usage
    assert request.choices == 1
    assert request.output_limit_tokens is None
    assert request.bounded_input


def test_null_is_the_same_as_left_out() -> None:
    names = [
        "model",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "best_of",
        "audio",
        "tools",
    ]
    request = parsed(**dict.fromkeys(names))
    assert (request.model, request.stream, request.choices, request.output_limit_tokens) == (None, False, 1, None)


@pytest.mark.parametrize(("model", "wanted"), [("gpt-4o", "gpt-4o"), ("", None), ("default", None)])
def test_the_default_model_has_three_names(model: str, wanted: str | None) -> None:
    assert parsed(model=model).model == wanted


def test_usage_is_asked_for_by_its_option() -> None:
    assert parsed(stream=True, stream_options={"include_usage": True}).include_usage
    assert not parsed(stream=True, stream_options={"include_usage": False}).include_usage


def test_of_two_limits_the_larger_one_is_what_a_provider_may_obey() -> None:
    assert parsed(max_tokens=5).output_limit_tokens == 5
    assert parsed(max_completion_tokens=7).output_limit_tokens == 7
    assert parsed(max_tokens=5, max_completion_tokens=7).output_limit_tokens == 7


SERVER_TOOLS: list[dict[str, Any]] = [
    {"type": "web_search"},
    {"type": "web_search_preview"},
    {"type": "file_search"},
    {"type": "code_interpreter"},
    {"type": "openrouter:web_search"},
    {"type": None},
    {"type": 5},
    {"type": ["function"]},
    {"google_search": {}},
]
BAD: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": []}),
    ("messages", {"messages": None}),
    ("messages", {"messages": "Hi"}),
    ("messages[0]", {"messages": ["Hi"]}),
    ("messages[0]", {"messages": [{"content": "Hi"}]}),
    ("messages[1].content", {"messages": [*USER, {"role": "user", "content": 5}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}),
    (
        "messages[0].content[1].text",
        {"messages": [{"role": "user", "content": [{"type": "text"}, {"type": "text", "text": 5}]}]},
    ),
    ("model", {"model": 5}),
    ("stream", {"stream": "yes"}),
    ("stream", {"stream": 1}),
    ("stream_options", {"stream_options": []}),
    ("stream_options.include_usage", {"stream_options": {"include_usage": 1}}),
    *(("n", {"n": value}) for value in (0, -1, 129, 1.5, "1", True, 10**30)),
    *((name, {name: value}) for name in ("max_tokens", "max_completion_tokens") for value in (0, -1, 2**31, "5", True)),
    ("best_of", {"best_of": 2}),
    ("prediction", {"prediction": {"type": "content", "content": "Hi"}}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("audio", {"audio": {"voice": "alloy"}}),
    ("service_tier", {"service_tier": 1}),
    ("speed", {"speed": ["fast"]}),
    ("web_search_options", {"web_search_options": {}}),
    ("search_parameters", {"search_parameters": {"mode": "auto"}}),
    ("enable_search", {"enable_search": True}),
    ("models", {"models": ["a"]}),
    ("route", {"route": "fallback"}),
    ("provider", {"provider": {"order": ["x"]}}),
    ("plugins", {"plugins": [{"id": "web"}]}),
    ("Stream", {"Stream": True}),
    ("MAX_TOKENS", {"MAX_TOKENS": 5}),
    ("max_to\u212aens", {"max_to\u212aens": 5}),
    ("me\u017f\u017fages", {"me\u017f\u017fages": []}),
    ("tools", {"tools": {}}),
    ("tools[0]", {"tools": ["web_search"]}),
    ("tools[0].Type", {"tools": [{"type": "function", "Type": "web_search"}]}),
    *(("tools[1].type", {"tools": [{"type": "function", "function": {"name": "f"}}, tool]}) for tool in SERVER_TOOLS),
]


@pytest.mark.parametrize(("param", "members"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_member_is_refused_by_its_name(param: str, members: dict[str, Any]) -> None:
    error = refusal(json.dumps({"messages": USER, **members}).encode())
    assert error.param == param
    assert param in error.message
    assert error.code == "validation_error"


@pytest.mark.parametrize(
    "members",
    [
        {"best_of": 1},
        {"modalities": ["text"]},
        {"service_tier": "default"},
        {"service_tier": "auto"},
        {"enable_search": False},
        {"tools": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "g"}}]},
        {"temperature": 0.5, "logit_bias": {"5": 1}, "anything": [None]},
    ],
    ids=str,
)
def test_members_that_cost_nothing_more_pass(members: dict[str, Any]) -> None:
    assert set(parsed(**members).members) == {"messages", *members}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"messages": [{"role": "user"}], "n": 1, "n": 8}', "n"),
        (b'{"messages": [{"role": "user"}], "n": 1, "\\u006e": 1}', "n"),
        (b'{"messages": [{"role": "user"}], "tools": [{"type": "web_search", "type": "function"}]}', "tools[0].type"),
    ],
)
def test_a_repeated_key_is_refused(body: bytes, param: str) -> None:
    assert refusal(body).param == param


@pytest.mark.parametrize("content", [b'"\xff"', b'"\\ud800 and more"', b"1e99999", b"[" * 5000 + b"]" * 5000])
def test_content_that_cannot_be_read_is_a_bad_request(content: bytes) -> None:
    refusal(b'{"messages": [{"role": "user", "content": ' + content + b"}]}")


@given(st.binary(max_size=80))
def test_noise_is_a_bad_request(body: bytes) -> None:
    refusal(body)


# --- counting --------------------------------------------------------------------------------------------------


def test_the_input_of_a_known_tokenizer_is_counted_as_its_vendor_documents() -> None:
    count = count_input(parsed(messages=[{"role": "user", "content": "The heron waits."}]), EXACT, UNKNOWN)
    words = EXACT.count("The heron waits.") + EXACT.count("user")
    assert count.best_tokens == count.bound_tokens == words + 3 + 3
    assert count.exact


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS},
        optional={"name": TEXTS, "reasoning_content": TEXTS, "tool_calls": st.lists(st.dictionaries(TEXTS, TEXTS))},
    ),
    min_size=1,
    max_size=5,
)


@given(MESSAGES, st.booleans(), st.sampled_from([EXACT, FOREIGN]))
def test_the_bound_is_never_below_the_best_count(messages: list[Any], escaped: bool, counter: Any) -> None:
    body = json.dumps({"messages": messages, "documents": ["x" * 100]}, ensure_ascii=escaped).encode()
    count = count_input(parse(body), counter, UNKNOWN)
    assert count.bound_tokens >= count.best_tokens >= 3 + 3 * len(messages)
    if counter is FOREIGN:
        texts = [text for message in messages for text in message.values() if isinstance(text, str)]
        assert count.bound_tokens >= sum(len(text.encode()) for text in texts) + 100


def test_a_large_prompt_is_bounded_by_its_bytes() -> None:
    content = "heron " * (PROMPT_TOKENIZED_BYTES_MAX // 6 + 1)
    count = count_input(parsed(messages=[{"role": "user", "content": content}]), EXACT, UNKNOWN)
    assert not count.exact
    assert count.bound_tokens >= len(content)
    assert count.best_tokens < count.bound_tokens


@pytest.mark.parametrize("word", ["heron ", "0123456789", "Zm9vYmFyYmF6", "鷺は水辺に", "  \n"])
def test_the_tokens_of_a_large_prompt_are_estimated_by_what_it_is_made_of(word: str) -> None:
    content = word * (3 * PROMPT_TOKENIZED_BYTES_MAX // len(word.encode()))
    count = count_input(parsed(messages=[{"role": "user", "content": content}]), EXACT, UNKNOWN)
    assert count.best_tokens == pytest.approx(EXACT.count(content), rel=0.05)


def test_tools_are_part_of_the_input() -> None:
    tools = [{"type": "function", "function": {"name": "find", "description": "Finds a heron. " * 20}}]
    with_tools = count_input(parsed(tools=tools), EXACT, UNKNOWN)
    assert with_tools.best_tokens > count_input(parsed(), EXACT, UNKNOWN).best_tokens + 60
    assert with_tools.bound_tokens > with_tools.best_tokens


@pytest.mark.parametrize("kind", ["text", "refusal"])
def test_all_text_of_a_part_is_counted_whatever_its_type(kind: str) -> None:
    def counted(**members: str) -> int:
        part = {"type": kind, **members}
        return count_input(parsed(messages=[{"role": "assistant", "content": [part]}]), EXACT, UNKNOWN).bound_tokens

    long = "The heron waits. " * 100
    assert counted(text="x", refusal=long) > counted(refusal=long) >= counted() + 400
    assert counted(text=long, refusal="x") > counted(text=long)


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/heron.png"}}]}]


def test_an_image_is_held_at_the_models_whole_context() -> None:
    count = count_input(parsed(messages=IMAGE), EXACT, ModelFacts(context_limit_tokens=128_000))
    assert count.bound_tokens == 128_000
    assert 1000 <= count.best_tokens < 1020


def test_of_many_images_no_more_is_charged_than_the_bound() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://x/heron.png"}}
    many = [{"role": "user", "content": [image] * 200}]
    count = count_input(parsed(messages=many), EXACT, ModelFacts(context_limit_tokens=128_000))
    assert count.best_tokens == count.bound_tokens == 128_000


def test_an_image_for_a_model_without_a_known_context_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        count_input(parsed(messages=IMAGE), FOREIGN, UNKNOWN)
    assert caught.value.param == "messages"


# --- the body for the provider ---------------------------------------------------------------------------------


def body_for(request: ChatRequest, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": "up-1",
        "ask_usage": True,
        "clamp_field": "max_completion_tokens",
        "clamp_tokens": None,
    }
    found: dict[str, Any] = json.loads(upstream_body(request, **{**arguments, **changes}))
    return found


def test_the_provider_is_always_asked_for_a_stream_with_usage_by_its_own_name_of_the_model() -> None:
    body = body_for(parsed(model="nice", stream=False, temperature=0.5))
    assert body == {
        "messages": USER,
        "model": "up-1",
        "stream": True,
        "temperature": 0.5,
        "stream_options": {"include_usage": True},
    }


def test_other_stream_options_are_kept() -> None:
    body = body_for(parsed(stream_options={"include_obfuscation": False}))
    assert body["stream_options"] == {"include_obfuscation": False, "include_usage": True}


def test_a_provider_that_knows_no_usage_in_streams_is_not_asked() -> None:
    assert "stream_options" not in body_for(parsed(stream_options={"include_usage": True}), ask_usage=False)


def test_our_limit_takes_the_place_of_the_callers() -> None:
    body = body_for(parsed(max_tokens=500, max_completion_tokens=600), clamp_tokens=40)
    assert "max_tokens" not in body
    assert body["max_completion_tokens"] == 40
    assert body_for(parsed(max_tokens=500))["max_tokens"] == 500


KEYS = st.sampled_from(["temperature", "seed", "user", "metadata", "logit_bias", "x", "messages2", "Ünï"])


@given(
    st.dictionaries(
        KEYS, st.sampled_from([b"12345678901234567890123", b'{"a":  1.50}', b'"\\u00e9"', b"[1,2 ,3]", b"null"])
    ),
    st.one_of(st.none(), st.integers(1, 100)),
)
def test_every_other_member_goes_on_to_the_letter(others: dict[str, bytes], clamp: int | None) -> None:
    text = b'[{"role": "user",  "content": "H\\u0069"}]'
    members = b"".join(b", " + json.dumps(key).encode() + b" :" + value for key, value in others.items())
    request = parse(b'{"messages": ' + text + members + b"}")
    body = upstream_body(request, model="m", ask_usage=True, clamp_field="max_tokens", clamp_tokens=clamp)
    written = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    assert bytes(written["messages"]) == text
    assert {key: bytes(written[key]) for key in others} == others
    assert set(written) == {"messages", "model", "stream", "stream_options", *others} | (
        {"max_tokens"} if clamp else set()
    )


@pytest.mark.parametrize(
    ("members", "context"),
    [
        ({}, {}),
        ({"service_tier": "auto", "speed": "standard"}, {}),
        ({"service_tier": "default"}, {"service_tier": "default"}),
        ({"service_tier": "priority", "speed": "fast"}, {"service_tier": "priority", "speed": "fast"}),
        ({"cache_control": {"type": "ephemeral"}}, {}),
        ({"cache_control": {"type": "ephemeral", "ttl": "5m"}}, {}),
        ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, {"cache_ttl": "1h"}),
        ({"tools": [{"type": "function", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]}, {"cache_ttl": "1h"}),
    ],
)
def test_what_is_priced_apart_is_told(members: dict[str, Any], context: dict[str, str]) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **members}).encode()
    assert parse(body).price_context == context


def test_a_long_cache_is_found_in_messages_also_in_escapes() -> None:
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    plain = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
    assert parse(plain).price_context == {"cache_ttl": "1h"}
    assert parse(plain.replace(b'"ttl"', b'"t\\u0074l"')).price_context == {"cache_ttl": "1h"}
