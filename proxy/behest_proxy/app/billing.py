"""`GET /v1/billing/export`: a project's bill as a file, while it is read from the books."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from behest_ledger.billing import BillingPeriodError, BillingRow, hours_between
from behest_ledger.configuration.snapshot import ProjectEntry
from behest_ledger.focus.columns import VERSIONS, Version
from behest_ledger.focus.csv_file import CsvFile
from behest_ledger.focus.parquet_file import ParquetFile, ParquetMissingError
from behest_ledger.store.billing import billing_rows, hours_over
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.pool import asking, open_pool
from behest_proxy.app.callers import caller_of, project_of
from behest_proxy.app.context import context_of
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.usage import ledger_away, moment_param
from behest_proxy.errors import Forbidden, InvalidRequest, RateLimited

HOURS_MAX = 24 * 366
FORMATS = ("focus-csv", "focus-parquet")
_SUFFIXES = {"focus-csv": "csv", "focus-parquet": "parquet"}
_BUSY_S = 5


class BillingExport:
    """The endpoint. One export runs at a time: it has a connection of its own, beside the two that requests use."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._is_running = False

    async def export(self, request: Request) -> Response:
        """For the role admin. What is wrong, and a ledger that is away, is said before anything is sent."""
        project = self._asked_by(request)
        begin, end = await self._period(request)
        name, version, by_session = _form(request)
        try:
            file: Any = CsvFile(version) if name == "focus-csv" else ParquetFile(version)
        except ParquetMissingError as error:
            raise InvalidRequest(f"format: {error}; or ask for focus-csv", param="format") from None
        if self._is_running:
            raise RateLimited("another export runs here: ask again when it is done", retry_after_s=_BUSY_S)
        self._is_running = True
        content = self._content(file, project, begin, end, by_session=by_session)
        try:
            first = await anext(content, b"")
        except LedgerError:
            raise ledger_away() from None
        title = re.sub(r"[^a-z0-9.-]+", "-", project.project_id.lower())
        return StreamingResponse(
            _after(first, content),
            media_type=file.media_type,
            headers={
                "content-disposition": f'attachment; filename="{title}-{begin:%Y%m%dT%H}.{_SUFFIXES[name]}"',
                "cache-control": "no-store",
            },
        )

    def _asked_by(self, request: Request) -> ProjectEntry:
        context = context_of(request.scope)
        caller = caller_of(self._gateway, context, request.scope["headers"], time.time())
        project = project_of(self._gateway, caller, context)
        if not caller.has_role("admin"):
            raise Forbidden("only a token with the role admin may export the bill")
        return project

    async def _period(self, request: Request) -> tuple[datetime, datetime]:
        utc = ZoneInfo("UTC")
        begin, end = moment_param(request, "from", utc), moment_param(request, "to", utc)
        if begin is None or end is None:
            try:
                async with asking(self._gateway.pool) as connection:
                    over = await hours_over(connection)
            except LedgerError:
                raise ledger_away() from None
            begin, end = begin or over.replace(day=1, hour=0), end or over
        return _checked(begin, end)

    async def _content(
        self, file: Any, project: ProjectEntry, begin: datetime, end: datetime, *, by_session: bool
    ) -> AsyncIterator[bytes]:
        settings = self._gateway.settings
        pool: Any = None
        try:
            pool = await open_pool(
                self._gateway.mounted.database_url,
                size=1,
                application_name=f"{settings.name} export",
                pooler=settings.database_pooler,
            )
            async with pool.acquire() as connection:
                pieces = billing_rows(
                    connection, begin, end, project=(project.tenant_id, project.project_id), by_session=by_session
                )
                async for _, rows in pieces:
                    for part in _small(rows):
                        if written := file.written(part):
                            yield written
                        await asyncio.sleep(0)  # streams go before a bill
            if written := file.ended():
                yield written
        finally:
            self._is_running = False
            if pool is not None:
                pool.terminate()


async def _after(first: bytes, content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        yield first
        async for piece in content:
            yield piece
    finally:
        await content.aclose()  # type: ignore[attr-defined]


def _small(rows: list[BillingRow], size: int = 100) -> list[list[BillingRow]]:
    """Pieces that take a millisecond or two to write."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _checked(begin: datetime, end: datetime) -> tuple[datetime, datetime]:
    try:
        hours = hours_between(begin, end) if begin != end else 0
    except BillingPeriodError as error:
        raise InvalidRequest(f"from, to: {error}", param="from") from None
    if hours > HOURS_MAX:
        raise InvalidRequest(f"from: at most {HOURS_MAX // 24} days are exported at once", param="from")
    return begin, end


def _form(request: Request) -> tuple[str, Version, bool]:
    asked = request.query_params
    name = asked.get("format") or FORMATS[0]
    if name not in FORMATS:
        raise InvalidRequest(f"format: must be {' or '.join(FORMATS)}", param="format")
    wanted = asked.get("focus_version") or VERSIONS[0]
    versions: dict[str, Version] = {version: version for version in VERSIONS}
    version = versions.get(wanted)
    if version is None:
        raise InvalidRequest(f"focus_version: must be {' or '.join(VERSIONS)}", param="focus_version")
    by_session = asked.get("per_session") or "false"
    if by_session not in ("true", "false"):
        raise InvalidRequest("per_session: must be true or false", param="per_session")
    return name, version, by_session == "true"
