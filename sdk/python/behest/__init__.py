"""Client of Behest, the streaming gateway with hard budgets: `Behest` for asyncio, `BehestSync` for threads."""

from behest._version import __version__
from behest.async_client import Behest
from behest.async_stream import ChatStream
from behest.errors import (
    BehestAuthError,
    BehestBadRequestError,
    BehestConfigError,
    BehestConflictError,
    BehestConnectionError,
    BehestError,
    BehestForbiddenError,
    BehestNotFoundError,
    BehestQuotaError,
    BehestRateLimitError,
    BehestServerError,
)
from behest.shapes import BillingUsage, Budget, Thread, ThreadMessage, Usage
from behest.sync_client import BehestSync
from behest.sync_stream import ChatStreamSync
from behest.tokens import Token

__all__ = [
    "Behest",
    "BehestAuthError",
    "BehestBadRequestError",
    "BehestConfigError",
    "BehestConflictError",
    "BehestConnectionError",
    "BehestError",
    "BehestForbiddenError",
    "BehestNotFoundError",
    "BehestQuotaError",
    "BehestRateLimitError",
    "BehestServerError",
    "BehestSync",
    "BillingUsage",
    "Budget",
    "ChatStream",
    "ChatStreamSync",
    "Thread",
    "ThreadMessage",
    "Token",
    "Usage",
    "__version__",
]
