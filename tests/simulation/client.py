"""The clients of a simulated world: they read, stall, and leave."""

from collections.abc import Callable, Sequence

from simulation.request import TOKEN, Asked
from simulation.world import Process, WrongError

_TOKEN = TOKEN.encode()


class Client:
    """A `DirectStream` whose other end is a script. What is written is checked the moment it is written."""

    def __init__(self, process: Process, asked: Asked, may_spend: Callable[[], bool]) -> None:
        """`may_spend` says whether the ledger still believes what this process holds to be its own."""
        self.on_gone: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.paused = False
        self.gone = False
        self._process = process
        self._asked = asked
        self._may_spend = may_spend
        self._over = False
        self._written = 0
        if asked.leaves_after_s is not None:
            process.arrives(asked.leaves_after_s, self.leave)

    def begin(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """The head."""
        self._process.boundary()

    def write(self, data: bytes) -> None:
        """Bytes for the client."""
        self._process.boundary()
        asked = self._asked
        if self._over:
            self._wrong(f"request {asked.number}: something was written after the end")
        tokens = data.count(_TOKEN)
        if tokens and not self._may_spend():
            self._wrong(f"request {asked.number}: {tokens} tokens were passed on by a holder that was fenced")
        asked.handed += tokens
        if not self.gone:
            asked.received += tokens
            self._written += len(data)
            if asked.stalls_after_bytes is not None and self._written > asked.stalls_after_bytes:
                asked.stalls_after_bytes = None
                self.paused = True
                self._process.arrives(asked.stalls_for_s, self._reads_on)
        self._process.boundary()

    def end(self) -> None:
        """The end, as it should be."""
        self._process.boundary()
        self._over = True
        self._asked.ended = True

    def reset(self) -> None:
        """The end, as it should not be."""
        self._process.boundary()
        self._over = True
        self._asked.ended = True

    def leave(self) -> None:
        """The client is gone."""
        if not self._over and not self.gone:
            self.gone = True
            self._asked.ended = True
            if self.on_gone is not None:
                self.on_gone()

    def _wrong(self, what: str) -> None:
        # Told beside the exception: who calls may catch it.
        self._process.world.wrong.append(what)
        raise WrongError(what)

    def _reads_on(self) -> None:
        if self.paused and not self._over:
            self.paused = False
            if self.on_resume is not None:
                self.on_resume()
