"""Patterns that people write in manifests: `*` for any text, `?` for one character, everything else as it is.

There are no character classes: model names contain square brackets.
"""

from collections.abc import Iterable

PATTERN_LENGTH_MAX = 256
STARS_MAX = 8
"""In one pattern: PostgreSQL's LIKE slows down with each."""


def is_pattern(text: str) -> bool:
    """Whether the text names more than itself."""
    return "*" in text or "?" in text


def matches(pattern: str, text: str) -> bool:
    """Whether the whole text fits the pattern; case counts."""
    if not is_pattern(pattern):
        return pattern == text
    return _fits(pattern, text)


def matches_any(patterns: Iterable[str], text: str) -> bool:
    """Whether the text fits at least one of the patterns."""
    return any(matches(pattern, text) for pattern in patterns)


def like_pattern(pattern: str) -> str:
    r"""The SQL LIKE pattern that matches what this one matches, with LIKE's own `\`, `%` and `_` escaped."""
    translated: list[str] = []
    for character in pattern:
        if character == "*":
            translated.append("%")
        elif character == "?":
            translated.append("_")
        elif character in "\\%_":
            translated.append("\\" + character)
        else:
            translated.append(character)
    return "".join(translated)


def pattern_of_like(like: str) -> str:
    """The inverse of `like_pattern`, to show a stored scope as it was written."""
    shown: list[str] = []
    characters = iter(like)
    for character in characters:
        if character == "\\":
            shown.append(next(characters, ""))
        else:
            shown.append({"%": "*", "_": "?"}.get(character, character))
    return "".join(shown)


def _fits(pattern: str, text: str) -> bool:
    """Match by walking both once, going back only to the last star: at worst their lengths multiplied.

    A regular expression for `*a*a*a*` would try every way to share out the text among the stars.
    """
    at = place = 0
    star = -1
    star_place = 0
    while place < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, star_place = at, place
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", text[place]):
            at += 1
            place += 1
        elif star >= 0:
            star_place += 1
            at, place = star + 1, star_place
        else:
            return False
    return all(character == "*" for character in pattern[at:])
