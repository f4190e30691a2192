"""Minting: an API key's backend asks for a token for one of its users. Pure: time and ids are passed in."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import msgspec

from behest_ledger.store.identity import ApiKeyRecord
from behest_proxy.errors import Forbidden, InvalidRequest, RequestTooLarge
from behest_proxy.identity.caller import capped_role, is_clean_text, is_session_id, is_tier
from behest_proxy.identity.keys import SigningKey
from behest_proxy.identity.reserved import is_reserved_user_id
from behest_proxy.identity.strict_json import json_object
from behest_proxy.identity.tokens import AUDIENCE

__all__ = ["MintAnswer", "MintRequest", "mint", "parse_mint"]

TTL_DEFAULT_S = 3600
TTL_MIN_S = 60
TTL_MAX_S = 86_400
BODY_BYTES_MAX = 16 * 1024


class MintRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller of the mint endpoint asks for, checked."""

    user_id: str
    role: str = "user"
    """As asked; what the token gets is capped at the key's role."""
    ttl_s: int = TTL_DEFAULT_S
    session_id: str | None = None
    """None: one is made."""
    tier: int | str | None = None


class MintAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of the mint endpoint: the union of both published shapes."""

    jwt: str
    access_token: str
    """The same token under its other published name."""
    token_type: str
    project_id: str
    ttl: int
    """Seconds."""
    expires_in: int
    """The same seconds under their OAuth name (RFC 6749)."""
    expires_at: str
    """RFC 3339, in UTC, whole seconds."""
    session_id: str

    def body(self) -> bytes:
        """The JSON body of the 200."""
        return msgspec.json.encode(self)


def parse_mint(body: bytes) -> MintRequest:
    """The mint request in a body. Members that we do not know are ignored: published clients may send more.

    Raises `InvalidRequest` with the member's name in `param`, and `RequestTooLarge`.
    """
    if len(body) > BODY_BYTES_MAX:
        raise RequestTooLarge(f"The body is over {BODY_BYTES_MAX} bytes.")
    try:
        members = json_object(body)
    except ValueError:
        raise InvalidRequest("The body is not a JSON object, or names a member twice.") from None
    session_id = members.get("session_id")
    if session_id is not None and not (isinstance(session_id, str) and is_session_id(session_id)):
        raise InvalidRequest("session_id must be 1-255 visible ASCII characters.", param="session_id")
    tier = members.get("tier")
    if tier is not None and not is_tier(tier):
        raise InvalidRequest("tier must be a tier's number or name.", param="tier")
    return MintRequest(
        user_id=_user_id(members),
        role=_role(members),
        ttl_s=_ttl_s(members),
        session_id=session_id,
        tier=cast("int | str | None", tier),
    )


def mint(
    request: MintRequest,
    api_key: ApiKeyRecord,
    *,
    signing_key: SigningKey | None,
    issuer: str,
    now_s: float,
    new_id: Callable[[], str],
) -> MintAnswer:
    """The token that this key may hand out for this request, signed.

    `new_id` makes the token's `jti` and, when none was asked for, the session. Raises `Forbidden` when there is no
    signing key for the tenant, or it is another tenant's: the token would be believed nowhere.
    """
    if signing_key is None or signing_key.tenant_id not in (None, api_key.tenant_id):
        raise Forbidden("This API key belongs to a tenant that is not served here.")
    issued_s = int(now_s)
    expires_s = issued_s + request.ttl_s
    session_id = request.session_id if request.session_id is not None else new_id()
    # The order of the claims is that of the published clients.
    claims: dict[str, Any] = {
        "tid": api_key.tenant_id,
        "pid": api_key.project_id,
        "uid": request.user_id,
        "role": capped_role(request.role, highest=api_key.role),
        "scp": [],
        "iss": issuer,
        "aud": AUDIENCE,
        "iat": issued_s,
        "nbf": issued_s,
        "exp": expires_s,
        "jti": new_id(),
        "sid": session_id,
    }
    if request.tier is not None:
        claims["tier"] = request.tier
    token = signing_key.sign(claims)
    return MintAnswer(
        jwt=token,
        access_token=token,
        token_type="Bearer",  # noqa: S106 - a type, no secret
        project_id=api_key.project_id,
        ttl=request.ttl_s,
        expires_in=request.ttl_s,
        expires_at=datetime.fromtimestamp(expires_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        session_id=session_id,
    )


def _user_id(members: dict[str, Any]) -> str:
    user_id = members.get("user_id")
    if user_id is None:
        raise InvalidRequest("user_id is required.", param="user_id")
    if not isinstance(user_id, str) or not is_clean_text(user_id):
        raise InvalidRequest("user_id must be a text of 1-255 characters without control characters.", param="user_id")
    if is_reserved_user_id(user_id):
        raise InvalidRequest("user_id is reserved.", param="user_id")
    return user_id


def _role(members: dict[str, Any]) -> str:
    role = members.get("role")
    if role is None:
        return "user"
    if not isinstance(role, str) or not is_clean_text(role):
        raise InvalidRequest("role must be a text of 1-255 characters.", param="role")
    return role


def _ttl_s(members: dict[str, Any]) -> int:
    ttl = members.get("ttl")
    if ttl is None:
        return TTL_DEFAULT_S
    if not isinstance(ttl, int) or isinstance(ttl, bool) or not TTL_MIN_S <= ttl <= TTL_MAX_S:
        raise InvalidRequest(f"ttl must be a whole number of seconds from {TTL_MIN_S} to {TTL_MAX_S}.", param="ttl")
    return ttl
