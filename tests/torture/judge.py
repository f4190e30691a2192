"""What must be true after a round: the ledger's rows against what clients received and what the provider sent."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torture.client import StreamEnd
from torture.recordings import Recording

READ_CHUNKS_MAX = 64
"""Chunks that a killed sidecar may have charged for and taken along: what one read of the provider brings."""


@dataclass(kw_only=True)
class Figures:
    """What was seen, of one round or of all."""

    streams: Counter[str] = field(default_factory=Counter[str])
    """How many ended how."""
    received_tokens: int = 0
    charged_tokens: int = 0
    killed_streams: int = 0
    killed_received_tokens: int = 0
    killed_charged_tokens: int = 0
    killed_excess_chunks_max: int = 0
    cancelled_received_tokens: int = 0
    cancelled_charged_tokens: int = 0
    overshoot_pico: int = 0
    """The most by which spent + held + suspense ever stood above the highest limit of a window, overruns included."""
    fullest_percent: float = 0.0
    """How much of its limit the fullest window spent at most."""
    settled_again: int = 0
    """Settlements that were sent once more afterwards."""
    samples: int = 0
    """How often the windows were looked at while the round went on."""

    def add(self, other: "Figures") -> None:
        """Add a round to the sum."""
        self.streams += other.streams
        for name in (
            "received_tokens",
            "charged_tokens",
            "killed_streams",
            "killed_received_tokens",
            "killed_charged_tokens",
            "cancelled_received_tokens",
            "cancelled_charged_tokens",
            "samples",
            "settled_again",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("killed_excess_chunks_max", "overshoot_pico", "fullest_percent"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


@dataclass(frozen=True, kw_only=True)
class Charged:
    """A row of `ledger.request`."""

    request_id: str
    outcome: str
    source: str
    output_tokens: int
    amount_pico: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Charged":
        """From the database's row."""
        return cls(
            request_id=row["request_id"],
            outcome=row["outcome"],
            source=row["source"],
            output_tokens=row["output_tokens"],
            amount_pico=int(row["amount_pico"]),
        )


def judge_streams(
    ends: Sequence[StreamEnd],
    *,
    rows: Mapping[str, Charged],
    sim: Sequence[Mapping[str, Any]],
    killed: Mapping[int, bool],
    figures: Figures,
) -> list[str]:
    """Every sentence that is not true of these streams. `rows`: the ledger's new rows; `killed`: by stream number."""
    findings: list[str] = []
    matched = {one for end in ends for one in end.refused_ids}
    findings += [
        f"{rows[one]}: was refused, and costs output" for one in matched & set(rows) if rows[one].output_tokens
    ]
    last = [seen for seen in sim if seen["id"] not in matched]
    by_number = {seen["body"]["sim"]["seed"]: seen for seen in last if seen["body"] and "sim" in seen["body"]}
    if len(by_number) != len(last):
        findings.append(f"the provider saw {len(last)} requests of {len(by_number)} streams")
    for end in ends:
        seen = by_number.get(end.plan.number)
        request_id = end.request_id or (seen["id"] if seen else "")
        row = rows.get(request_id)
        matched.add(request_id)
        sent_tokens = int(seen["output_tokens_sent"]) if seen else 0
        problem = _problem(end, row, sent_tokens=sent_tokens, killed=killed[end.plan.number])
        if problem:
            findings.append(
                f"stream {end.plan.number} ({request_id or 'no id'}): {problem}; received {end.received_tokens}"
                f" (done {end.done}, left {end.left}, status {end.status}, code {end.code}), sent {sent_tokens},"
                f" killed {killed[end.plan.number]}, row {row}, plan {end.plan}"
            )
        _count(end, row, killed=killed[end.plan.number], figures=figures)
    for row in rows.values():
        if row.request_id not in matched and row.output_tokens:
            findings.append(f"{row}: nobody received anything of it, and the provider never saw it")
    return findings


def _problem(end: StreamEnd, row: Charged | None, *, sent_tokens: int, killed: bool) -> str:
    """What is wrong with one stream; empty where nothing is."""
    received = end.received_tokens
    if end.fault:
        return end.fault
    if end.plan.recording is not None:
        return _problem_of_recording(end, end.plan.recording, row, killed=killed)
    if row is None:
        if end.status == 200 or received or sent_tokens:
            return "the books do not know it"
        return ""
    charged = row.output_tokens
    if end.status not in (200, None) and row.amount_pico and not _killed_before_its_answer(row):
        return "a refused request was charged"
    if charged < received:
        return "charged less than was received"
    if charged > sent_tokens:
        return "charged more than the provider sent"
    if end.done:
        return "" if charged == received else "read to its end, and charged otherwise than received"
    if end.left:
        return ""
    if not killed:
        return "" if end.status not in (200, None) or not (end.status or row.amount_pico) else "broken without a kill"
    if charged > received + READ_CHUNKS_MAX * end.plan.tokens_per_chunk:
        return "charged more than a read above what was received before the kill"
    return ""


def _problem_of_recording(end: StreamEnd, recording: Recording, row: Charged | None, *, killed: bool) -> str:
    received = end.received_tokens
    if row is None:
        return "the books do not know it" if end.status == 200 or received else ""
    charged = row.output_tokens
    most = max(recording.counted_tokens, recording.provider_tokens or 0)
    if end.status not in (200, None) and row.amount_pico and not _killed_before_its_answer(row):
        return "a refused request was charged"
    if charged > most:
        return "charged more than the provider sent"
    if row.source == "provider":
        # It may be the usage so far, where the provider tells it in the middle.
        whole = end.done and end.code is None
        return "not charged what the provider bills" if whole and charged != recording.provider_tokens else ""
    if charged < received:
        return "charged less than was received"
    if end.done:
        return "" if charged == received else "read to its end, and charged otherwise than received"
    if end.left or killed:
        return ""
    return "" if end.status not in (200, None) or not (end.status or row.amount_pico) else "broken without a kill"


def _killed_before_its_answer(row: Charged) -> bool:
    """What was suspended while it waited for the provider is answered with 403, and costs its input."""
    return row.outcome == "killed" and row.output_tokens == 0


def _count(end: StreamEnd, row: Charged | None, *, killed: bool, figures: Figures) -> None:
    name = "unreachable" if end.status is None and row is None else f"{end.status} {end.code}"
    figures.streams[row.outcome if row is not None else name] += 1
    charged = row.output_tokens if row is not None else 0
    figures.received_tokens += end.received_tokens
    figures.charged_tokens += charged
    if end.left:
        figures.cancelled_received_tokens += end.received_tokens
        figures.cancelled_charged_tokens += charged
    elif killed and not end.done and end.plan.recording is None:
        figures.killed_streams += 1
        figures.killed_received_tokens += end.received_tokens
        figures.killed_charged_tokens += charged
        excess = -(-(charged - end.received_tokens) // end.plan.tokens_per_chunk)
        figures.killed_excess_chunks_max = max(figures.killed_excess_chunks_max, excess)


class Ceilings:
    """The highest limit that each budget's windows ever had: what no balance may pass."""

    def __init__(self) -> None:
        self._now_pico: dict[str, int] = {}
        self._highest_pico: dict[tuple[str, str], int] = {}

    def set_limit(self, budget: str, limit_pico: int) -> None:
        """A limit that is about to be written: whether it will be is not known when the database dies."""
        self._now_pico[budget] = limit_pico
        for key, highest in self._highest_pico.items():
            if key[0] == budget:
                self._highest_pico[key] = max(highest, limit_pico)

    def begin(self, budget: str, subject: str) -> None:
        """From now on there may be a window of this subject."""
        self._highest_pico.setdefault((budget, subject), self._now_pico[budget])

    def highest_pico(self, budget: str, subject: str) -> int:
        """The highest so far. Raises `KeyError` for a window that nobody expected."""
        return self._highest_pico[budget, subject]


def judge_windows(windows: Sequence[Mapping[str, Any]], ceilings: Ceilings, figures: Figures) -> list[str]:
    """Every window that stands above the highest limit it ever had, or has an overrun."""
    findings: list[str] = []
    for window in windows:
        highest = ceilings.highest_pico(window["budget"], window["subject"])
        overrun = int(window["overrun"])
        used = int(window["spent"]) + int(window["held"]) + int(window["suspense"])
        over = max(used - highest, 0) + overrun
        figures.overshoot_pico = max(figures.overshoot_pico, over)
        if highest:
            figures.fullest_percent = max(figures.fullest_percent, 100 * int(window["spent"]) / highest)
        if over:
            findings.append(f"window {dict(window)} passed its highest limit {highest} by {over} pico-USD")
    return findings
