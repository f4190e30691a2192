"""What one choice says, delta by delta: role, reasoning, text or tool calls, finish."""

from collections.abc import Iterator
from itertools import chain
from typing import Literal, NamedTuple

from behest_proxy.sim.behaviour import MAX_OUTPUT_TOKENS, Behaviour
from behest_proxy.sim.chat_request import ChatRequest
from behest_proxy.sim.text import Piece, made_up, made_up_words, pieces_of, token_count, without_beginning

_REASONING_STREAM = 1 << 32
"""Above the index of any choice, so that reasoning has words of its own; tool calls come above it."""


class Delta(NamedTuple):
    """One step of a choice. `tool` is the number of the call where it is about one."""

    kind: Literal["role", "hidden", "reasoning", "content", "tool", "arguments", "finish"]
    text: str = ""
    tokens: int = 0
    tool: int = 0


class _Allowance:
    """How many output tokens a choice may still say."""

    __slots__ = ("exhausted", "left")

    def __init__(self, limit: int | None) -> None:
        self.left = MAX_OUTPUT_TOKENS * 64 if limit is None else limit
        self.exhausted = False

    def allows(self, tokens: int) -> bool:
        """Takes these tokens, or is exhausted from now on."""
        if self.exhausted or tokens > self.left:
            self.exhausted = True
            return False
        self.left -= tokens
        return True


def choice_deltas(request: ChatRequest, behaviour: Behaviour, choice: int) -> Iterator[Delta]:
    """Everything that the choice with this index says; the last delta's text is the finish reason."""
    allowance = _Allowance(None if behaviour.ignore_max_tokens else request.limit)
    seed = effective_seed(request, behaviour)
    yield Delta("role")
    yield from _reasoning(behaviour, allowance, seed=seed, choice=choice)
    if behaviour.tool_calls:
        for call in range(behaviour.tool_calls):
            yield from _tool_call(request, behaviour, allowance, seed=seed, choice=choice, call=call)
    else:
        pieces, _ = content_pieces(request, behaviour, choice)
        for piece in _grouped(pieces, behaviour.tokens_per_chunk, allowance):
            yield Delta("content", piece.text, piece.tokens)
    said_all = "tool_calls" if behaviour.tool_calls else "stop"
    yield Delta("finish", "length" if allowance.exhausted else said_all)


def effective_seed(request: ChatRequest, behaviour: Behaviour) -> int:
    """The seed of the made-up words and of random cuts."""
    return behaviour.seed if behaviour.seed is not None else request.seed or 0


def content_pieces(request: ChatRequest, behaviour: Behaviour, choice: int) -> tuple[Iterator[Piece], bool]:
    """The text of a choice in whole tokens, and whether it goes on after the last assistant message."""
    said = request.last_assistant_text if behaviour.continue_assistant else ""
    if said:
        rest = without_beginning(_whole_text(request, behaviour, choice), said)
        first = next(rest, None) if rest is not None else None
        # A text that was said to its end was not broken off: this is another turn.
        if rest is not None and first is not None:
            return chain([first], rest), True
    return _whole_text(request, behaviour, choice), False


def _whole_text(request: ChatRequest, behaviour: Behaviour, choice: int) -> Iterator[Piece]:
    if behaviour.text is not None:
        return pieces_of(behaviour.text)
    return _first(behaviour.output_tokens, made_up(effective_seed(request, behaviour), choice))


def _reasoning(behaviour: Behaviour, allowance: _Allowance, *, seed: int, choice: int) -> Iterator[Delta]:
    if not behaviour.reasoning_tokens:
        return
    thoughts = _first(behaviour.reasoning_tokens, made_up(seed, choice + _REASONING_STREAM))
    if behaviour.reasoning_visible:
        for piece in _grouped(thoughts, behaviour.tokens_per_chunk, allowance):
            yield Delta("reasoning", piece.text, piece.tokens)
    else:
        yield Delta("hidden", tokens=sum(piece.tokens for piece in thoughts if allowance.allows(piece.tokens)))


def _tool_call(
    request: ChatRequest, behaviour: Behaviour, allowance: _Allowance, *, seed: int, choice: int, call: int
) -> Iterator[Delta]:
    name = request.tool_name(call)
    name_tokens = token_count(name)
    if not allowance.allows(name_tokens):
        return
    yield Delta("tool", name, name_tokens, call)
    before, after = '{"simulated":"', '"}'
    share = behaviour.output_tokens // behaviour.tool_calls
    words = max(1, share - name_tokens - token_count(before) - token_count(after))
    said = _first(words, made_up_words(seed, choice + (call + 2) * _REASONING_STREAM))
    arguments = before + "".join(piece.text for piece in said) + after
    for piece in _grouped(pieces_of(arguments), behaviour.tokens_per_chunk, allowance):
        yield Delta("arguments", piece.text, piece.tokens, call)


def _first(tokens: int, pieces: Iterator[Piece]) -> Iterator[Piece]:
    left = tokens
    while left > 0:
        piece = next(pieces)
        left -= piece.tokens
        yield piece


def _grouped(pieces: Iterator[Piece], size: int, allowance: _Allowance) -> Iterator[Piece]:
    """Pieces of at least `size` tokens (the last one may be smaller), as far as the allowance goes."""
    texts: list[str] = []
    tokens = 0
    for piece in pieces:
        if not allowance.allows(piece.tokens):
            break
        if piece.tokens >= size and not texts:
            yield piece
            continue
        texts.append(piece.text)
        tokens += piece.tokens
        if tokens >= size:
            yield Piece("".join(texts), tokens)
            texts, tokens = [], 0
    if tokens:
        yield Piece("".join(texts), tokens)
