"""Who calls: the verified facts of a token, and what a role allows."""

import re
from typing import Literal, get_args

import msgspec

__all__ = [
    "ROLES",
    "TEXT_LENGTH_MAX",
    "Caller",
    "Role",
    "capped_role",
    "is_clean_text",
    "is_session_id",
    "is_tier",
    "least_role",
    "workload_caller",
]

Role = Literal["user", "dashboard-service", "admin"]
"""What a caller may do, in rising order.

`user` sees and spends as one end user. `dashboard-service` also reads the usage of every user of the project.
`admin` may do that and export the bill.
"""

ROLES: tuple[Role, ...] = get_args(Role)
"""The roles in rising order; each may do what those before it may."""

TEXT_LENGTH_MAX = 255
"""Characters in a user id, a session id and every other name in a token."""

TIER_NUMBER_MAX = 1_000_000
TIER_NAME_LENGTH_MAX = 63

# Control characters corrupt logs and headers, U+0000 is no PostgreSQL text, a lone surrogate is no UTF-8.
_UNCLEAN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """A caller whose token was verified. Every field may be trusted, and only these."""

    tenant_id: str
    project_id: str
    """`<namespace>/<name>`."""
    user_id: str
    """The end user for whom the tenant vouches, 1-255 characters."""
    role: Role = "user"
    scopes: tuple[str, ...] = ()
    session_id: str | None = None
    """The token's `sid`: binds the caller to this session. None leaves it to the X-Session-Id header."""
    tier: int | str | None = None
    """A tier's number or name; None means the project's default."""
    token_id: str | None = None
    """The token's `jti`."""
    kid: str | None = None
    """Whose signature was believed; None for a workload, which has no token."""
    expires_at: int | None = None
    """Unix seconds, without the leeway; None for a workload."""

    def has_role(self, role: Role) -> bool:
        """Whether the caller's role is this one or above it."""
        return ROLES.index(self.role) >= ROLES.index(role)

    @property
    def sees_every_user(self) -> bool:
        """Whether usage of the project's other users may be shown (wire contract: `GET /v1/usage`)."""
        return self.has_role("dashboard-service")


def workload_caller(*, tenant_id: str, project_id: str, namespace: str, owner: str) -> Caller:
    """The caller that a pod is when its application brings no token: user `workload:<namespace>/<owner>`."""
    return Caller(tenant_id=tenant_id, project_id=project_id, user_id=f"workload:{namespace}/{owner}")


def least_role(text: str) -> Role:
    """The role of this name; a name we do not know may do the least."""
    return text if text in ROLES else "user"


def capped_role(asked: str, *, highest: str) -> Role:
    """The lower of two roles: nobody hands out more than they have."""
    return ROLES[min(ROLES.index(least_role(asked)), ROLES.index(least_role(highest)))]


def is_clean_text(text: str) -> bool:
    """Whether the text is 1-255 characters that can be stored, logged and sent anywhere."""
    return 0 < len(text) <= TEXT_LENGTH_MAX and _UNCLEAN.search(text) is None


def is_session_id(text: str) -> bool:
    """Whether the text is a session id: 1-255 visible ASCII characters (no space)."""
    return len(text) <= TEXT_LENGTH_MAX and _VISIBLE_ASCII.fullmatch(text) is not None


def is_tier(value: object) -> bool:
    """Whether the value names a tier: a number from 0, or a name of 1-63 visible ASCII characters."""
    if isinstance(value, str):
        return len(value) <= TIER_NAME_LENGTH_MAX and _VISIBLE_ASCII.fullmatch(value) is not None
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= TIER_NUMBER_MAX
