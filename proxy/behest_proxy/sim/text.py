"""The simulator's words: text cut into whole tokens of OpenAI's o200k_base vocabulary, a function of a seed.

Every made-up word is one token wherever it stands, because the vocabulary's first pass cuts before each word
that begins with a space. So the count of the whole text is the sum of the counts of its pieces, however they
are grouped, and a gateway that counts either way must come to the usage that the simulator reports.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import splintr

_PREFACE = "This is simulated text, made by behest-sim."
_SENTENCE_TOKENS = 12
_WORDS = """
the a of and to in is that for it with as was on be at by this have from or one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now
people my made over did down only way find use may water long little very after words called just where
most know get through back much go good new write our used me man too any day same right look think also
around another came come work three must because does part even place well such here take why things help
put years different away again off went old number great tell men say small every found still between
name should home big give air line set own under read last never us left end along while might next sound
below saw something thought both few those always show large often together asked house world going want
school important until form food keep children feet land side
"""

_MASK = (1 << 64) - 1


class Piece(NamedTuple):
    """Text that begins and ends between tokens."""

    text: str
    tokens: int


_VOCABULARY = "o200k_base"
_BETWEEN_WORDS = re.compile(r"(?<=\S)(?= [A-Za-z])")
"""Where no token of the vocabulary goes across: its first pass cuts there, so that each part has its own tokens."""


def warm() -> None:
    """Load the vocabulary, which takes a moment."""
    _tokenizer()


@cache
def _tokenizer() -> splintr.AnyTokenizer:
    return splintr.Tokenizer.from_pretrained(_VOCABULARY)


def token_count(text: str) -> int:
    """The number of tokens of a text."""
    return len(_tokenizer().encode_ordinary(text))


@cache
def _preface() -> tuple[Piece, ...]:
    return tuple(pieces_of(_PREFACE))


@cache
def _vocabulary() -> tuple[Piece, ...]:
    return tuple(Piece(f" {word}", 1) for word in _WORDS.split())


_FULL_STOP = Piece(".", 1)


def made_up(seed: int, stream: int) -> Iterator[Piece]:
    """Endless simulated text, one token a piece; `stream` tells the texts of one seed apart."""
    yield from _preface()
    yield from made_up_words(seed, stream)


def made_up_words(seed: int, stream: int) -> Iterator[Piece]:
    """Endless words and full stops without the preface, one token a piece."""
    vocabulary = _vocabulary()
    size = len(vocabulary)
    # A linear congruential generator (Knuth's MMIX constants): cheap, and the same on every Python.
    state = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + 1) & _MASK
    while True:
        for _ in range(_SENTENCE_TOKENS - 1):
            state = (state * 6364136223846793005 + 1442695040888963407) & _MASK
            yield vocabulary[(state >> 40) % size]
        yield _FULL_STOP


def pieces_of(text: str) -> Iterator[Piece]:
    """The text token by token; tokens that end inside a character come together with the next ones."""
    for segment in _BETWEEN_WORDS.split(text):
        held, tokens = b"", 0
        for number in _tokenizer().encode_ordinary(segment):
            held, tokens = held + _tokenizer().decode_token_bytes(number), tokens + 1
            with suppress(UnicodeDecodeError):
                yield Piece(held.decode(), tokens)
                held, tokens = b"", 0


def without_beginning(pieces: Iterable[Piece], said: str) -> Iterator[Piece] | None:
    """What comes after `said`, or None where `said` is not the beginning of the text.

    A piece of which `said` holds only a part counts whole: the tokens of its rest are not known better.
    """
    rest = iter(pieces)
    while said:
        piece = next(rest, None)
        if piece is None:
            return None
        if said.startswith(piece.text):
            said = said[len(piece.text) :]
        elif piece.text.startswith(said):
            return _chain(Piece(piece.text[len(said) :], piece.tokens), rest)
        else:
            return None
    return rest


def _chain(first: Piece, rest: Iterator[Piece]) -> Iterator[Piece]:
    yield first
    yield from rest
