"""Credit for streams that run: extensions batched into one commit, and the rest of a window handed on.

When a window runs out, many streams ask at once and all are refused, each still holding a reserve that it will give
back when it ends. Cutting all of them would leave that money unspent. So the refused stand in line: the first is told
no, and as soon as its settlement is acknowledged the next one asks again, with what has become free. One after the
other they end, and the last leaves (almost) nothing.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

from behest_ledger.holds import Answer, Extension, Gone, Granted, Refused
from behest_ledger.store.errors import LedgerConflictError, LedgerError, LedgerUnavailableError

logger = logging.getLogger(__name__)

BATCH_ITEMS_MAX = 200
LINE_WAIT_S = 5.0
"""How long a refused stream stands in a line that does not move before its refusal counts. A line moves when a hold
that ended has given back what it had: thousands may stand in it and be served one after the other."""
PATIENCE_S = 5.0
"""How long a stream that stands still waits for a ledger that gives no answer."""
RETRY_S = 0.1
CONFLICT_ATTEMPTS_MAX = 5

ExtendCall = Callable[[Sequence[Extension]], Awaitable[dict[UUID, Answer]]]
AnswerCall = Callable[[Answer | LedgerError], None]


class Account:
    """One open hold, as the desk sees it."""

    __slots__ = ("ended", "request_id", "seq", "tenant_id", "windows")

    def __init__(self, tenant_id: str, request_id: UUID, windows: tuple[int, ...]) -> None:
        self.tenant_id = tenant_id
        self.request_id = request_id
        self.windows = windows
        self.seq = 0
        self.ended = False


class _Ask:
    __slots__ = (
        "account",
        "answer",
        "is_over",
        "may_wait",
        "need_tokens",
        "patience",
        "refusal",
        "seq",
        "timer",
        "want_tokens",
    )

    def __init__(
        self, account: Account, need_tokens: int, want_tokens: int, may_wait: bool, answer: AnswerCall
    ) -> None:
        self.account = account
        self.need_tokens = need_tokens
        self.want_tokens = want_tokens
        self.may_wait = may_wait
        self.answer = answer
        self.seq = 0
        """Its number in its request, once it was sent: what is sent again has the same, and moves nothing twice."""
        self.timer: asyncio.TimerHandle | None = None
        """While it stands in line."""
        self.patience: asyncio.TimerHandle | None = None
        """While the ledger owes it an answer."""
        self.refusal: Refused | None = None
        self.is_over = False

    def was_answered(self) -> None:
        """An answer came that is not the last word: it will be another question that is asked next."""
        self.seq = 0
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

    def end(self) -> None:
        """Nothing comes after this."""
        self.is_over = True
        for timer in (self.timer, self.patience):
            if timer is not None:
                timer.cancel()


class CreditDesk:
    """Asks the ledger for more credit on behalf of all streams of this process."""

    def __init__(self, extend: ExtendCall) -> None:
        self._extend = extend
        self._asks: deque[_Ask] = deque()
        self._accounts: dict[UUID, Account] = {}
        self._lines: dict[int, deque[_Ask]] = {}
        self._releasing: dict[int, int] = {}
        """Per window: local holds that have ended and are not settled yet. Their rest is about to be free."""
        self._moved_s: dict[int, float] = {}
        """Per window with a line: when somebody last gave money back to it."""
        self._released_in: dict[int, asyncio.Event] = {}
        """Per window: somebody waits for the next that gives money back to it."""
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def open(self, tenant_id: str, request_id: UUID, windows: tuple[int, ...]) -> Account:
        """Begin to serve an admitted request."""
        account = Account(tenant_id, request_id, windows)
        self._accounts[request_id] = account
        return account

    def ask(self, account: Account, *, need_tokens: int, want_tokens: int, may_wait: bool, answer: AnswerCall) -> None:
        """Ask for at least `need_tokens`, at best `want_tokens`; `answer` is called once, later, with what came.

        `may_wait` says that a refusal would end the stream, so that it may stand in line first; and that it may be
        asked again, for up to `PATIENCE_S`, of a ledger that gives no answer. A `LedgerError` means that it gave none:
        the result is unknown.
        """
        self._put(_Ask(account, need_tokens, want_tokens, may_wait, answer))

    def ended(self, account: Account) -> None:
        """The request has ended and its settlement is on its way: what it still held is about to be free."""
        account.ended = True
        for window in account.windows:
            self._releasing[window] = self._releasing.get(window, 0) + 1

    @property
    def releasing(self) -> frozenset[int]:
        """The windows that something which has ended here is about to give its rest back to."""
        return frozenset(self._releasing)

    async def released(self, window: int, timeout_s: float, *, since: frozenset[int] = frozenset()) -> bool:
        """Wait for the next request that has ended here to give its rest of a window back.

        `since` is what was `releasing` when the books were asked: nobody waits for who was settled before their answer.
        False: none is about to, or not in time. True: what the books have refused they may grant now.
        """
        if window not in self._releasing:
            return window in since
        event = self._released_in.setdefault(window, asyncio.Event())
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        return True

    def settled(self, request_id: UUID) -> None:
        """The settlement was acknowledged: the next in each line may try again."""
        account = self._accounts.pop(request_id, None)
        if account is None or not account.ended:
            return
        now_s = asyncio.get_running_loop().time()
        for window in account.windows:
            if window in self._lines:
                self._moved_s[window] = now_s
        self._released(account)

    def never_settled(self, request_id: UUID) -> None:
        """The settlement was put aside: what its hold still has does not come back. Nobody waits for it any more."""
        account = self._accounts.pop(request_id, None)
        if account is not None and account.ended:
            self._released(account)

    def _released(self, account: Account) -> None:
        for window in account.windows:
            left = self._releasing[window] - 1
            if left:
                self._releasing[window] = left
            else:
                del self._releasing[window]
            if (event := self._released_in.pop(window, None)) is not None:
                event.set()
            self._next_in_line(window)

    def limits_changed(self) -> None:
        """A limit may have been raised: everybody who stands in a line tries again, as if for the first time."""
        lines, self._lines = self._lines, {}
        for line in lines.values():
            for ask in line:
                ask.refusal = None
                if not ask.account.ended:
                    self._put(ask)

    async def aclose(self) -> None:
        """Stop asking. Nobody is answered any more."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for ask in [*self._asks, *(ask for line in self._lines.values() for ask in line)]:
            ask.end()
        self._asks.clear()
        self._lines.clear()

    def _put(self, ask: _Ask) -> None:
        if ask.may_wait and ask.patience is None:
            ask.patience = asyncio.get_running_loop().call_later(PATIENCE_S, self._silent_too_long, ask)
        self._asks.append(ask)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="credit desk")

    async def _run(self) -> None:
        # One batch in flight; what comes meanwhile is the next batch, so batches grow with the load.
        try:
            while self._asks:
                batch: dict[UUID, _Ask] = {}
                later: deque[_Ask] = deque()
                while self._asks and len(batch) < BATCH_ITEMS_MAX:
                    ask = self._asks.popleft()
                    if ask.account.ended or ask.is_over:
                        continue
                    if ask.account.request_id in batch:
                        later.append(ask)
                        continue
                    if not ask.seq:
                        ask.account.seq += 1
                        ask.seq = ask.account.seq
                    batch[ask.account.request_id] = ask
                self._asks.extendleft(reversed(later))
                if batch:
                    await self._send(batch)
        finally:
            self._task = None

    async def _send(self, batch: dict[UUID, _Ask]) -> None:
        extensions = [
            Extension(
                tenant_id=ask.account.tenant_id,
                request_id=ask.account.request_id,
                seq=ask.seq,
                need_tokens=ask.need_tokens,
                want_tokens=ask.want_tokens,
            )
            for ask in batch.values()
        ]
        try:
            answers = await self._extended(extensions)
        except LedgerError as error:
            logger.warning("asking for credit for %d streams failed: %s", len(batch), error)
            may_come_back = isinstance(error, (LedgerConflictError, LedgerUnavailableError))
            again = [ask for ask in batch.values() if may_come_back and ask.patience is not None]
            for ask in batch.values():
                if ask not in again:
                    self._deliver(ask, error)
            if again:
                self._asks.extendleft(reversed(again))
                await asyncio.sleep(RETRY_S)
        except Exception as error:
            # Whatever it was, nobody is left without an answer.
            logger.exception("asking for credit failed in an unknown way")
            for ask in batch.values():
                self._deliver(ask, LedgerUnavailableError(f"{type(error).__name__}: {error}"))
        else:
            for request_id, ask in batch.items():
                self._deliver(ask, answers.get(request_id, Gone()))

    async def _extended(self, extensions: Sequence[Extension]) -> dict[UUID, Answer]:
        for attempt in range(1, CONFLICT_ATTEMPTS_MAX):
            try:
                return await self._extend(extensions)
            except LedgerConflictError:
                await asyncio.sleep(0.005 * 2**attempt)
        return await self._extend(extensions)

    def _deliver(self, ask: _Ask, answer: Answer | LedgerError) -> None:
        if ask.is_over:
            return
        stood_in = ask.refusal.window_id if ask.refusal is not None else None
        waits = isinstance(answer, Refused) and ask.may_wait and self._stand_in_line(ask, answer)
        if not waits:
            self._answer(ask, answer)
        # Did it come through where it stood, the next in that line may find something too: it got money there, or what
        # it lacks is another window's.
        if stood_in is not None and (
            isinstance(answer, Granted) or (isinstance(answer, Refused) and answer.window_id != stood_in)
        ):
            self._next_in_line(stood_in)

    def _answer(self, ask: _Ask, answer: Answer | LedgerError) -> None:
        ask.end()
        if not ask.account.ended:
            try:
                ask.answer(answer)
            except Exception:
                logger.exception("a stream failed on its answer")

    def _silent_too_long(self, ask: _Ask) -> None:
        if not self._closed:
            self._answer(ask, LedgerUnavailableError(f"no answer within {PATIENCE_S:g} s"))

    def _stand_in_line(self, ask: _Ask, refusal: Refused) -> bool:
        """Whether the refusal can wait: somebody of ours is about to give money of that window back."""
        if refusal.reason != "quota" or not self._releasing.get(refusal.window_id):
            return False
        if ask.timer is None:
            ask.timer = asyncio.get_running_loop().call_later(LINE_WAIT_S, self._waited_enough, ask)
        line = self._lines.setdefault(refusal.window_id, deque())
        # Who stood in this line before keeps the place at its head.
        if ask.refusal is not None and ask.refusal.window_id == refusal.window_id:
            line.appendleft(ask)
        else:
            line.append(ask)
        ask.refusal = refusal
        ask.was_answered()
        return True

    def _waited_enough(self, ask: _Ask) -> None:
        if ask.refusal is not None:
            loop = asyncio.get_running_loop()
            due_s = self._moved_s.get(ask.refusal.window_id, -LINE_WAIT_S) + LINE_WAIT_S
            if due_s > loop.time():
                ask.timer = loop.call_at(due_s, self._waited_enough, ask)
                return
        ask.may_wait = False
        if ask.refusal is None:
            return
        line = self._lines.get(ask.refusal.window_id)
        if line is not None and ask in line:
            line.remove(ask)
            if not line:
                del self._lines[ask.refusal.window_id]
            self._answer(ask, ask.refusal)

    def _next_in_line(self, window: int) -> None:
        line = self._lines.get(window)
        while line:
            ask = line.popleft()
            if not ask.account.ended:
                self._put(ask)
                break
        if not line:
            self._lines.pop(window, None)
        if window not in self._releasing and window not in self._lines:
            self._moved_s.pop(window, None)
