"""The headers that say how a tier's rates stand, named and written as OpenAI does."""

from collections.abc import Sequence
from datetime import UTC, datetime

from behest_ledger.holds import Answer, Granted, Rate, Refused

_UNITS = ("requests", "tokens")


def rate_headers(answer: Answer | None, now: datetime) -> list[tuple[bytes, bytes]]:
    """`x-ratelimit-limit-requests`, `-remaining-requests`, `-reset-requests`, and the same for `tokens`.

    Of several rates in one unit the one that has least left is told. Nothing where no tier binds the request.
    """
    headers: list[tuple[bytes, bytes]] = []
    rates = _rates(answer)
    for unit in _UNITS:
        told = min((rate for rate in rates if rate.unit == unit), key=lambda rate: rate.remaining, default=None)
        if told is None:
            continue
        headers.append((b"x-ratelimit-limit-%b" % unit.encode(), b"%d" % told.limit))
        headers.append((b"x-ratelimit-remaining-%b" % unit.encode(), b"%d" % told.remaining))
        if told.resets_at is not None:
            headers.append((b"x-ratelimit-reset-%b" % unit.encode(), _until(told.resets_at, now)))
    return headers


def _rates(answer: Answer | None) -> Sequence[Rate]:
    if isinstance(answer, Granted):
        return answer.rates
    if isinstance(answer, Refused) and "/tier:" in answer.budget:
        resets_at = datetime.fromisoformat(answer.resets_at) if answer.resets_at else None
        return [Rate(unit=answer.unit, limit=answer.limit, remaining=answer.remaining, resets_at=resets_at)]
    return ()


def _until(moment: datetime, now: datetime) -> bytes:
    """A duration in whole seconds as Go writes it: `45s`, `6m0s`, `23h59m1s`."""
    left_s = max(0, -int(-(moment.astimezone(UTC) - now).total_seconds() // 1))
    hours, rest_s = divmod(left_s, 3600)
    minutes, seconds = divmod(rest_s, 60)
    if hours:
        return b"%dh%dm%ds" % (hours, minutes, seconds)
    return b"%dm%ds" % (minutes, seconds) if minutes else b"%ds" % seconds
