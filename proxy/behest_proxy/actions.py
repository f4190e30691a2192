"""What an exchange asks of the world. `exchange` decides them, `app` carries them out, in their order."""

from typing import Any

import msgspec

from behest_ledger.charging import Charge, Outcome
from behest_proxy.errors import ShownError


class CallUpstream(msgspec.Struct, frozen=True):
    """Send the request to the provider: there is credit for it."""


class CancelUpstream(msgspec.Struct, frozen=True):
    """Stop the provider now."""


class Pause(msgspec.Struct, frozen=True):
    """Read no more from the provider until `Resume`."""


class Resume(msgspec.Struct, frozen=True):
    """Read on."""


class Begin(msgspec.Struct, frozen=True):
    """Begin a streamed answer: status 200."""


class Write(msgspec.Struct, frozen=True):
    """Hand bytes to the client's stream. They are paid for."""

    data: bytes
    events: int = 0
    """So many events of the answer are at its beginning; what comes behind them (`[DONE]`, an error) is none of it."""


class Keep(msgspec.Struct, frozen=True):
    """Remember events of an answer that is given as a whole. They are paid for."""

    data: bytes
    events: int


class Finish(msgspec.Struct, frozen=True):
    """The client's stream is complete, for better or worse; its last event was written."""


class Respond(msgspec.Struct, frozen=True):
    """Answer with a whole JSON body."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Fail(msgspec.Struct, frozen=True):
    """Answer with an error; nothing was sent to the client before."""

    error: ShownError


class AskCredit(msgspec.Struct, frozen=True):
    """Ask the ledger for more output tokens."""

    need_tokens: int
    want_tokens: int
    is_short: bool
    """The stream stands still until the answer, and a refusal ends it."""


class Linger(msgspec.Struct, frozen=True):
    """The client has all it wanted and left: wait a little for the provider's usage, then say `lingered`."""


class Settle(msgspec.Struct, frozen=True):
    """Write the end into the books. Comes exactly once, and last."""

    outcome: Outcome
    charge: Charge
    facts: dict[str, Any]


Action = (
    CallUpstream
    | CancelUpstream
    | Pause
    | Resume
    | Begin
    | Write
    | Keep
    | Finish
    | Respond
    | Fail
    | AskCredit
    | Linger
    | Settle
)
