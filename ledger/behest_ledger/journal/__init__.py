"""The journal: what a sidecar remembers across `kill -9`, so that what a client received is charged, and once.

After a kill: received by the client <= charged <= received + the chunks of one read per stream. After a power loss:
what the last `sync` had seen, at most about a second old. Where too little is left to say what was received, the
request is not settled from here, and its hold goes to suspense with its holder.

In which order
--------------

    slot = journal.slot(request_id)         first of all: nothing is recorded without it; NoSlot: refuse
    journal.append(Admitted.of(...))        before the ledger is asked: only a remembered hold can be freed
    admit                                   refused: append(Acknowledged), there is nothing to settle
    journal.append(Extended(...))           what was granted; again with each new total
    slot.mark_sent(), .mark_first_byte()    when they happen
    slot.store(output, reasoning, chunks)   for every read, BEFORE its chunks are handed to the client
    journal.append(Ended(settlement))       before the settlement is handed to the writer
    journal.append(Acknowledged(...))       once the books have it, with synchronous_commit = on; it frees the slot

`append` raises `JournalError` on a full disk: an admission is refused then (give its slot back), everything else goes
on, with less to tell after a kill. `sync` belongs in a thread, once a second. After `Journal.open`, every
`unfinished()` request is settled by `recovery.settlement_of` and acknowledged like any other; where that is None,
acknowledged alone, for nothing more can be done from here, and its hold goes its way. A settlement that is sent twice
moves nothing the second time, because the books know its request id: that is what makes every doubt here harmless.

The format, version 1
---------------------

One folder, mode 0700, its files 0600: `lock`, `format`, `slots`, `<number>.records`; see `folder`. A folder of another
version or byte order is put aside inside of itself, unread, and `moved_aside` tells.

`<number>.records`, the segments, with 12 digits, ascending, only ever appended to:

    frame   = magic FE C1 F8 FF | length u32 | crc32(payload, start value: length) u32 | payload      little-endian
    payload = a msgpack map with `kind`: admitted, extended, carried, ended, acknowledged; see `records`
              or bytes that begin with zero: padding, skipped

Readers skip to the next whole frame where there is none, and skip kinds that they do not know; both are counted in
`damage`. Records say what is so, never what to add, so that their order and their number do not matter: a request is
unfinished where an `admitted` or `ended` and no `acknowledged` is found.

`slots`: 64 bytes each, words of 8 bytes in the machine's order: request id (2), output, reasoning, chunks, flags, zero
(2); see `slots` for why a kill leaves nothing false in it. On opening, what the slots of unfinished requests say
becomes `carried` records, and the file is replaced by a new one.

How it stays small: a new segment is begun where the last is full, and removed, the oldest first, once all requests
that began in it are finished and what followed is durable. What lives longer is written again into the newest, beside
new records and never more than of those. More than `segments_max` files are never made. A process that begins writes
all that is unfinished into one new segment, and removes the others.
"""

from behest_ledger.journal.errors import JournalError, JournalLockedError, RecordRefusedError
from behest_ledger.journal.frames import Damage
from behest_ledger.journal.history import Unfinished
from behest_ledger.journal.journal import Journal
from behest_ledger.journal.records import Acknowledged, Admitted, Carried, Ended, Extended, Progress, Record
from behest_ledger.journal.recovery import settlement_of
from behest_ledger.journal.slots import NoSlot, Slot

__all__ = [
    "Acknowledged",
    "Admitted",
    "Carried",
    "Damage",
    "Ended",
    "Extended",
    "Journal",
    "JournalError",
    "JournalLockedError",
    "NoSlot",
    "Progress",
    "Record",
    "RecordRefusedError",
    "Slot",
    "Unfinished",
    "settlement_of",
]
