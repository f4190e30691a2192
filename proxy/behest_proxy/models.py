"""What is known of models by the pattern of their names: one table, from the most to the least specific.

Only what the vendors document is here, and only where it is sure: `None` and `False` mean "not known". An `Upstream`
resource overrides any of it. Names may carry a vendor's prefix (`openai/gpt-4o`, `us.anthropic.claude-3-haiku`),
a date, a variant (`:free`) or a fine-tune's frame (`ft:gpt-4o-mini:...`).
"""

import re
from functools import lru_cache
from typing import Literal

import msgspec

ClampField = Literal["max_tokens", "max_completion_tokens"]


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What admission and metering need to know of a model."""

    tokenizer: Literal["o200k_base", "cl100k_base"] | None = None
    """The model's own tokenizer, where it is public."""

    visible_only: bool = False
    """True where every token that is billed as output is seen in the stream, so that a local count can meter it.

    False where output may be hidden (reasoning, audio, server-side tools) or nothing sure is known.
    """

    output_limit_tokens: int | None = None
    """The most output tokens that any version of the family gives."""

    context_limit_tokens: int | None = None
    """The largest context window of any version of the family."""

    hidden_tokens_per_second: int = 0
    """About how fast the model thinks unseen: what is charged of one that was left before it told its usage."""

    searches: bool = False
    """True where the provider searches the web for it unasked, at a price of its own."""

    clamp_field: ClampField = "max_tokens"
    """The request member that limits output. OpenAI's reasoning models refuse `max_tokens`."""


UNKNOWN = ModelFacts()
THINKING_TOKENS_PER_SECOND = 100
"""Between what small and large reasoning models are seen to do, some 50 to 200 a second."""


def _openai(
    tokenizer: Literal["o200k_base", "cl100k_base"],
    *,
    context: int | None = None,
    output: int | None = None,
    visible: bool = False,
    thinks: bool = False,
    newer: bool = False,
) -> ModelFacts:
    return ModelFacts(
        tokenizer=tokenizer,
        visible_only=visible,
        output_limit_tokens=output,
        context_limit_tokens=context,
        hidden_tokens_per_second=THINKING_TOKENS_PER_SECOND if thinks else 0,
        clamp_field="max_completion_tokens" if thinks or newer else "max_tokens",
    )


def _open(
    *, context: int | None = None, output: int | None = None, visible: bool = True, thinks: bool = False
) -> ModelFacts:
    return ModelFacts(
        visible_only=visible,
        output_limit_tokens=output,
        context_limit_tokens=context,
        hidden_tokens_per_second=THINKING_TOKENS_PER_SECOND if thinks else 0,
    )


# The first pattern that matches at the start of the bare name counts.
_FAMILIES: tuple[tuple[str, ModelFacts], ...] = (
    # Whatever its family: names that say reasoning, search or sound.
    (
        r"gpt-(audio|realtime)|gpt-4o(-mini)?-(audio|realtime|search)",
        _openai("o200k_base", context=128_000, output=16_384),
    ),
    (r"(?!o[134]|gpt-).*(think|reason|\br1\b|qwq|magistral|deep-?research|audio|omni|voxtral)", UNKNOWN),
    # OpenAI
    (r"gpt-3\.5-turbo", _openai("cl100k_base", context=16_385, output=4_096, visible=True)),
    (r"gpt-4-32k", _openai("cl100k_base", context=32_768, output=32_768, visible=True)),
    (r"gpt-4-(turbo|1106|0125|vision)", _openai("cl100k_base", context=128_000, output=4_096, visible=True)),
    (r"gpt-4(-0314|-0613)?$", _openai("cl100k_base", context=8_192, output=8_192, visible=True)),
    (r"gpt-4\.1", _openai("o200k_base", context=1_047_576, output=32_768, visible=True)),
    (r"gpt-4\.5", _openai("o200k_base", context=128_000, output=16_384, visible=True)),
    (r"(chatgpt|gpt)-4o", _openai("o200k_base", context=128_000, output=16_384, visible=True)),
    # Its vocabulary is o200k, but the channel markers that it is billed for are never shown.
    (r"gpt-oss", _open(context=131_072, visible=False)),
    (r"gpt-5-chat", _openai("o200k_base", context=128_000, output=16_384, newer=True)),
    (r"gpt-5(\.[12])?(-|$)", _openai("o200k_base", context=400_000, output=128_000, thinks=True)),
    (r"gpt-5", _openai("o200k_base", output=128_000, thinks=True)),
    (r"o1-mini", _openai("o200k_base", context=128_000, output=65_536, thinks=True)),
    (r"o1-preview", _openai("o200k_base", context=128_000, output=32_768, thinks=True)),
    (r"o[134](-|$)", _openai("o200k_base", context=200_000, output=100_000, thinks=True)),
    # Anthropic; from 3.7 on thinking is billed in full and shown in part or not at all.
    (r"claude-(3-5|3\.5)", _open(context=200_000, output=8_192)),
    (r"claude-3-(haiku|sonnet|opus)", _open(context=200_000, output=4_096)),
    (r"claude-(3-7|3\.7)", _open(context=200_000, output=128_000, visible=False)),
    # Google
    (r"gemini-1\.5", _open(context=2_097_152, output=8_192)),
    (r"gemini-2\.0-flash", _open(context=1_048_576, output=8_192)),
    (r"gemini-2\.5", _open(context=1_048_576, output=65_536, visible=False, thinks=True)),
    (r"gemma-?2", _open(context=8_192)),
    (r"gemma-?3", _open(context=131_072)),
    # Meta
    (r"(meta-)?llama-?v?3[.p-][123](?!.*nemotron)", _open(context=131_072)),
    (r"(meta-)?llama-?v?3-(8b|70b)", _open(context=8_192)),
    (r"llama3-(8b|70b)-8192", _open(context=8_192)),
    (r"(meta-)?llama-?2", _open(context=4_096)),
    # Mistral; small, medium and large have come to reason on demand.
    (r"(open-)?mi[sx]tral-(7b|8x7b)", _open(context=32_768)),
    (r"(open-)?mixtral-8x22b", _open(context=65_536)),
    (r"(open-)?mistral-nemo|ministral-(3|8)b|pixtral", _open(context=131_072)),
    (r"codestral|mistral-(saba|tiny)|open-codestral", _open()),
    # Others with open weights and no hidden output
    (r"deepseek-v3(-0324)?$", _open(context=131_072)),
    (r"qwen-?2", _open()),
    (r"phi-?[34]", _open()),
    (r"command-r", _open(context=131_072, output=4_096)),
)

_TABLE = tuple((re.compile(pattern), facts) for pattern, facts in _FAMILIES)

_VENDOR = re.compile(
    r"^(?:(?:us|eu|apac|jp|au|ca|global)\.)?"
    r"(?:openai|anthropic|meta|mistral|google|amazon|cohere|deepseek|qwen|microsoft|ai21)\."
)


_SEARCHING = re.compile(r"(^|[-_.])(search|sonar|deep-?research|online)")

_HIDING_VARIANTS = ("thinking", "online")
"""OpenRouter's variants that make any model think or search: not all that is billed is shown then."""


@lru_cache(maxsize=1024)
def facts_for(model: str) -> ModelFacts:
    """What is known of the model of this name; `UNKNOWN` where that is nothing. Never fails."""
    name, variant = bare_name(model)
    facts = next((facts for pattern, facts in _TABLE if pattern.match(name)), UNKNOWN)
    if variant in _HIDING_VARIANTS:
        facts = msgspec.structs.replace(facts, visible_only=False)
    if variant == "online" or _SEARCHING.search(name):
        facts = msgspec.structs.replace(facts, searches=True)
    return facts


def bare_name(model: str) -> tuple[str, str]:
    """The name without the frames around it, and its variant: `Vendor/Llama-3:free` -> (`llama-3`, `free`)."""
    name = model[:512].lower().strip().removeprefix("ft:")
    name, _, variant = _VENDOR.sub("", name.rpartition("/")[2]).partition(":")
    # Azure's deployments write the version without its point.
    return name.replace("gpt-35", "gpt-3.5"), variant
