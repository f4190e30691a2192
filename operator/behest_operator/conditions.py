"""Conditions as Kubernetes' API conventions have them: what is so, since when, and why."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

Status = Literal["True", "False", "Unknown"]
Condition = dict[str, Any]
MESSAGE_LENGTH_MAX = 4096


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One condition without its times."""

    type: str
    status: Status
    reason: str
    """One CamelCase word for programs."""
    message: str = ""
    """A sentence for people."""


def merged(found: Sequence[Condition], findings: Sequence[Finding], *, generation: int, now: str) -> list[Condition]:
    """The conditions with the findings in them; `now` (RFC 3339) is the time of those whose status changed."""
    by_type = {condition["type"]: condition for condition in found if "type" in condition}
    for finding in findings:
        before = by_type.get(finding.type, {})
        since = before.get("lastTransitionTime", now) if before.get("status") == finding.status else now
        by_type[finding.type] = {
            "type": finding.type,
            "status": finding.status,
            "reason": finding.reason,
            "message": finding.message[:MESSAGE_LENGTH_MAX],
            "lastTransitionTime": since,
            "observedGeneration": generation,
        }
    return [by_type[name] for name in sorted(by_type)]
