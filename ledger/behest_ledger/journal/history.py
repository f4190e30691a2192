"""What an earlier life left: records and slots, in any order and any number of copies, as unfinished requests.

Pure. Everything is joined so that order and repetition do not matter: an acknowledgement finishes a request whenever
it is read, grants and progress are totals of which the highest counts, and of copies the first is kept.
"""

from uuid import UUID

import msgspec

from behest_ledger.holds import Settlement
from behest_ledger.journal.records import Acknowledged, Admitted, Carried, Ended, Extended, Progress, Record


class Unfinished(msgspec.Struct, frozen=True, kw_only=True):
    """A request whose settlement is not known to be in the books. It has an admission, a settlement or both."""

    request_id: UUID
    admitted: Admitted | None = None
    """None: its record was damaged."""
    settlement: Settlement | None = None
    """None: it had not ended."""
    progress: Progress | None = None
    """None: no slot names it. Then nothing is known of what was sent."""
    granted_tokens: int = 0


class History:
    """Collects records and slots."""

    def __init__(self) -> None:
        self._requests: dict[UUID, Unfinished] = {}
        self._acknowledged: set[UUID] = set()

    def add(self, record: Record) -> None:
        """Take in one record."""
        request_id = record.request_id
        known = self._requests.get(request_id)
        if known is None:
            known = Unfinished(request_id=request_id)
        match record:
            case Acknowledged():
                self._acknowledged.add(request_id)
                self._requests.pop(request_id, None)
                return
            case Admitted():
                known = msgspec.structs.replace(known, admitted=known.admitted or record)
            case Ended(settlement=settlement):
                known = msgspec.structs.replace(known, settlement=known.settlement or settlement)
            case Extended(granted_tokens=granted_tokens):
                known = msgspec.structs.replace(known, granted_tokens=max(known.granted_tokens, granted_tokens))
            case Carried(progress=progress):
                known = _farther(known, progress)
        if request_id not in self._acknowledged:
            self._requests[request_id] = known

    def add_slot(self, request_id: UUID, progress: Progress) -> None:
        """Take in what a slot says."""
        if request_id not in self._acknowledged:
            known = self._requests.get(request_id) or Unfinished(request_id=request_id)
            self._requests[request_id] = _farther(known, progress)

    def unfinished(self) -> list[Unfinished]:
        """What has to be settled, the oldest first."""
        left = [one for one in self._requests.values() if one.admitted is not None or one.settlement is not None]
        return sorted(left, key=lambda one: one.request_id)

    @property
    def orphans(self) -> int:
        """Requests that something names, but that cannot be settled from here."""
        return sum(one.admitted is None and one.settlement is None for one in self._requests.values())


def _farther(known: Unfinished, progress: Progress) -> Unfinished:
    joined = progress if known.progress is None else known.progress.joined(progress)
    return msgspec.structs.replace(known, progress=joined)
