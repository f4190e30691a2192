"""Tokens by disjoint class: what a request used, ready to be priced without counting anything twice."""

import msgspec

TOKEN_CLASSES = ("input", "cache_read", "cache_write", "output", "reasoning", "audio_input", "audio_output")
"""The disjoint classes, in the order in which they are written down everywhere."""

INPUT_CLASSES = ("input", "cache_read", "cache_write", "audio_input")
OUTPUT_CLASSES = ("output", "reasoning", "audio_output")


class TokenCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per class, each >= 0. A token is in exactly one class: cached input is not in `input`."""

    input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    audio_input: int = 0
    audio_output: int = 0

    @property
    def input_tokens(self) -> int:
        """All tokens that went in, of whatever class."""
        return self.input + self.cache_read + self.cache_write + self.audio_input

    @property
    def output_tokens(self) -> int:
        """All tokens that came out, of whatever class."""
        return self.output + self.reasoning + self.audio_output

    def at_most(self, *, input_tokens: int, output_tokens: int) -> "TokenCounts":
        """The same, without what is above so many tokens in and out; plain ones are left out first."""
        kept = dict[str, int]()
        for classes, most in ((INPUT_CLASSES, input_tokens), (OUTPUT_CLASSES, output_tokens)):
            left = most
            for name in reversed(classes):
                kept[name] = min(left, getattr(self, name))
                left -= kept[name]
        return TokenCounts(**kept)

    def by_class(self) -> dict[str, int]:
        """The classes that hold at least one token, in the order of `TOKEN_CLASSES`."""
        return {name: count for name in TOKEN_CLASSES if (count := getattr(self, name))}
