"""Rules for single values that several kinds of manifest share: names, patterns, URLs, ranges, labels.

A rule yields (path, reason) for what it finds wrong, and nothing otherwise; an absent value is never wrong here.
"""

import ipaddress
import re
import zoneinfo
from collections.abc import Iterator, Mapping, Sized
from urllib.parse import SplitResult, urlsplit

from behest_ledger.configuration.globs import PATTERN_LENGTH_MAX, STARS_MAX
from behest_ledger.configuration.problems import Problem, shown

LIST_LENGTH_MAX = 200
LABELS_MAX = 64
TEXT_LENGTH_MAX = 32 * 1024
NAME_LENGTH_MAX = 253

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(rf"{DNS_LABEL.pattern}(\.{DNS_LABEL.pattern})*")
VISIBLE = re.compile(r"[\x21-\x7e]+")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}")
_ABBREVIATIONS = frozenset({"CET", "EET", "EST", "HST", "MET", "MST", "WET"})
"""To PostgreSQL these are offsets and not zones: it would never change their clocks as IANA's zones of that name do."""
_HOST = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_]*[A-Za-z0-9])?(\.[A-Za-z0-9]([-A-Za-z0-9_]*[A-Za-z0-9])?)*\.?")


def is_zone(name: str) -> bool:
    """Whether this is an IANA time zone that this machine knows."""
    # `localtime`, `posix/...` and the like are names of files, not zones, and PostgreSQL does not know them.
    if len(name) > 64 or not _ZONE.fullmatch(name) or name in ("Factory", "localtime", "posixrules"):
        return False
    if name in _ABBREVIATIONS:
        return False
    if name.startswith(("posix/", "right/")):
        return False
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def dns_name(path: str, name: str | None) -> Iterator[Problem]:
    """A name as Kubernetes and the price book have them."""
    if name is not None and (len(name) > NAME_LENGTH_MAX or not DNS_SUBDOMAIN.fullmatch(name.replace("_", "-"))):
        yield path, f"must be a name of lower-case letters, digits, '-' and '.', got {shown(name)}"


def holds_a_key(variable: str) -> bool:
    """Whether a variable of the environment may be named as a provider's key.

    By its name, which says so: what a process has besides (`PATH`, `PGHOST`, `DATABASE_URL`) is sent to no provider,
    and of Behest's own settings not even what has a key in it.
    """
    return (
        _ENVIRONMENT_NAME.fullmatch(variable) is not None
        and ("KEY" in variable or "TOKEN" in variable)
        and not variable.startswith("BEHEST_")
    )


def short_text(path: str, text: str | None) -> Iterator[Problem]:
    """One line for people, 1 to 128 printable characters."""
    if text is not None and (not text.strip() or len(text) > 128 or not text.isprintable()):
        yield path, f"must be 1 to 128 printable characters, got {shown(text)}"


def long_text(path: str, text: str | None) -> Iterator[Problem]:
    """Text for a model, bounded."""
    if text is None:
        return
    if len(text) > TEXT_LENGTH_MAX:
        yield path, f"must be at most {TEXT_LENGTH_MAX} characters long, got {len(text)}"
    elif "\0" in text:
        yield path, "must not contain a zero character: the ledger cannot store it"


def model_name(path: str, model: str | None) -> Iterator[Problem]:
    """A model's name as providers have them."""
    if model is not None and (len(model) > PATTERN_LENGTH_MAX or not VISIBLE.fullmatch(model)):
        yield path, f"must be 1 to {PATTERN_LENGTH_MAX} visible ASCII characters, got {shown(model)}"


def glob(path: str, pattern: str) -> Iterator[Problem]:
    """A pattern whose matching is cheap here and in PostgreSQL."""
    if not pattern or len(pattern) > PATTERN_LENGTH_MAX or not pattern.isprintable():
        yield path, f"must be 1 to {PATTERN_LENGTH_MAX} printable characters, got {shown(pattern)}"
    elif pattern.count("*") > STARS_MAX:
        yield path, f"must have at most {STARS_MAX} stars, got {shown(pattern)}"


def globs(path: str, patterns: list[str]) -> Iterator[Problem]:
    """A bounded list of patterns."""
    yield from few(path, patterns)
    for index, pattern in enumerate(patterns):
        yield from glob(f"{path}[{index}]", pattern)


def in_range(path: str, number: int | None, least: int, most: int) -> Iterator[Problem]:
    """A number between two bounds, both included."""
    if number is not None and not least <= number <= most:
        yield path, f"must be from {least} to {most}, got {number}"


def few(path: str, items: Sized) -> Iterator[Problem]:
    """A list or mapping that is not longer than `LIST_LENGTH_MAX`."""
    if len(items) > LIST_LENGTH_MAX:
        yield path, f"has {len(items)} entries, at most {LIST_LENGTH_MAX} are allowed"


def unique(path: str, member: str, values: list[str]) -> Iterator[Problem]:
    """No value of a member is there twice in a list."""
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if first.setdefault(value, index) != index:
            yield (
                f"{path}[{index}].{member}",
                f"{shown(value)} is there twice, first in {path}[{first[value]}]",
            )


def labels_of(path: str, labels: Mapping[str, str]) -> Iterator[Problem]:
    """Labels as Kubernetes has them."""
    if len(labels) > LABELS_MAX:
        yield path, f"has {len(labels)} labels, at most {LABELS_MAX} are allowed"
    for key, value in labels.items():
        prefix, _, name = key.rpartition("/")
        if not _LABEL_NAME.fullmatch(name) or (prefix and not DNS_SUBDOMAIN.fullmatch(prefix)):
            yield path, f"{shown(key)} is no label key"
        if value and not _LABEL_NAME.fullmatch(value):
            yield f"{path}.{key}", f"must be at most 63 letters, digits, '-', '_' and '.', got {shown(value)}"


def absolute_url(path: str, url: str, *, query: bool = False) -> Iterator[Problem]:
    """An absolute http(s) URL. Credentials in it would end in logs, a query is lost when paths are added."""
    parts = split_url(url)
    if parts is None or parts.scheme not in ("http", "https") or not is_host(parts.hostname) or "\\" in url:
        yield (
            path,
            f'must be an absolute http or https URL such as "https://api.openai.com/v1"{_got(url)}',
        )
        return
    if "@" in parts.netloc:
        yield path, "must not contain credentials: use spec.credentials"
    if ("?" in url and not query) or "#" in url:
        yield path, f"must have no query and no fragment{_got(url)}"


def _got(url: str) -> str:
    """What was given, unless that may hold a password or a key: this is told in Events and logs."""
    return "" if any(sign in url for sign in "@?#") else f", got {shown(url)}"


def split_url(url: str) -> SplitResult | None:
    """The parts of a URL; None for what is none, or longer than 2048 characters."""
    if len(url) > 2048 or not VISIBLE.fullmatch(url):
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for what is no port
    except ValueError:
        return None
    return parts


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a URL's host is; None: it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_host(host: str | None) -> bool:
    """Whether this is a host name or an IP address."""
    if not host:
        return False
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return False
        return True
    return len(host) <= NAME_LENGTH_MAX and _HOST.fullmatch(host) is not None
