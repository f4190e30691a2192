"""User ids that no tenant may hand out, because in reports and roles they mean us."""

__all__ = ["RESERVED_USER_IDS", "is_reserved_user_id"]

RESERVED_USER_IDS = frozenset({"admin", "system", "dashboard-service"})
_RESERVED_PREFIX = "sys:"


def is_reserved_user_id(user_id: str) -> bool:
    """Whether the id is one of ours. `default` is not: a published client mints for it."""
    return user_id in RESERVED_USER_IDS or user_id.startswith(_RESERVED_PREFIX)
