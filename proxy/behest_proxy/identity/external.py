"""External issuers (OpenID Connect): who trusts whose tokens, what their key sets say, whom a token makes the caller.

An external issuer vouches for who somebody is, never for rights: the role is `user`, scopes are none.
"""

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

import msgspec
from jwt import algorithms

from behest_proxy.errors import InvalidToken
from behest_proxy.identity.caller import Caller, is_clean_text, is_session_id, is_tier
from behest_proxy.identity.keys import UnusableKeyError, VerificationKey, algorithm_of
from behest_proxy.identity.reserved import is_reserved_user_id
from behest_proxy.identity.strict_json import json_object

__all__ = ["KEYS_BYTES_MAX", "Trust", "Trusts", "external_caller", "keys_in"]

KEYS_BYTES_MAX = 256 * 1024
KEYS_MAX = 64
_KID_LENGTH_MAX = 255
_USER_CLAIM = "sub"
_FROM_JWK: Mapping[str, Any] = {
    "RSA": algorithms.RSAAlgorithm.from_jwk,
    "EC": algorithms.ECAlgorithm.from_jwk,
    "OKP": algorithms.OKPAlgorithm.from_jwk,
}


class Trust(msgspec.Struct, frozen=True, kw_only=True):
    """One project's word that it believes an issuer."""

    tenant_id: str
    project_id: str
    issuer: str
    keys_url: str
    audience: str
    claims: Mapping[str, str] = {}
    """Our name of a claim -> the issuer's; `uid` is `sub` unless it is said otherwise."""

    @property
    def place(self) -> tuple[str, str]:
        """(tenant id, project id)."""
        return self.tenant_id, self.project_id

    def fits(self, claims: Mapping[str, Any], place: tuple[str, str] | None) -> bool:
        """Whether a token may be for this project: its audience, the host it came to, the project it names."""
        audience = claims.get("aud")
        if self.audience != audience and not (isinstance(audience, list) and self.audience in cast("Any", audience)):
            return False
        if place is not None and place != self.place:
            return False
        named = self.claims.get("pid")
        return named is None or claims.get(named) in (self.project_id, self.project_id.partition("/")[2])


class Trusts:
    """All of them at one moment."""

    def __init__(self, trusts: Iterable[Trust] = ()) -> None:
        by_issuer: dict[str, list[Trust]] = {}
        for trust in trusts:
            by_issuer.setdefault(trust.issuer, []).append(trust)
        self._by_issuer = MappingProxyType(by_issuer)

    def of(self, issuer: object) -> list[Trust]:
        """Who trusts this issuer."""
        return self._by_issuer.get(issuer, []) if isinstance(issuer, str) else []

    @property
    def keys_urls(self) -> frozenset[str]:
        """Where their keys are."""
        return frozenset(trust.keys_url for trusts in self._by_issuer.values() for trust in trusts)

    def one_for(self, claims: Mapping[str, Any], place: tuple[str, str] | None) -> Trust:
        """The one project that a token can be for. Raises `InvalidToken` where there is none, or more."""
        found = [trust for trust in self.of(claims.get("iss")) if trust.fits(claims, place)]
        if not found:
            raise InvalidToken("No project here trusts the token's issuer (iss) for its audience (aud).")
        if len(found) > 1:
            raise InvalidToken("Several projects trust the token's issuer for its audience: call the project's host.")
        return found[0]

    def __bool__(self) -> bool:
        return bool(self._by_issuer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trusts) and self._by_issuer == other._by_issuer

    __hash__ = None  # type: ignore[assignment]  # equal by value, and nobody needs one


def keys_in(document: bytes) -> dict[str, VerificationKey]:
    """The usable public keys of a JWK set (RFC 7517), by kid. What we cannot use is passed over.

    Raises `ValueError` for what is no JWK set, and for one with no usable key: that is a broken issuer, and what it
    said before is better.
    """
    if len(document) > KEYS_BYTES_MAX:
        raise ValueError(f"over {KEYS_BYTES_MAX} bytes")
    members = json_object(document).get("keys")
    if not isinstance(members, list):
        raise ValueError("not a JWK set")  # noqa: TRY004 - a wrong document, not a wrong argument
    listed = cast("list[object]", members)
    if len(listed) > KEYS_MAX:
        raise ValueError(f"more than {KEYS_MAX} keys")
    found: dict[str, VerificationKey] = {}
    twice: set[str] = set()
    for member in listed:
        key = _key_in(cast("dict[str, Any]", member)) if isinstance(member, dict) else None
        if key is None:
            continue
        if key.kid in found:
            twice.add(key.kid)
        found[key.kid] = key
    for kid in twice:
        del found[kid]
    if not found:
        raise ValueError("no key that can be used")
    return found


def _key_in(member: dict[str, Any]) -> VerificationKey | None:
    kid, from_jwk = member.get("kid"), _FROM_JWK.get(str(member.get("kty")))
    if from_jwk is None or not isinstance(kid, str) or not 0 < len(kid) <= _KID_LENGTH_MAX:
        return None
    # Who publishes a private key has no key any more.
    if "d" in member or member.get("use", "sig") != "sig":
        return None
    try:
        public_key = from_jwk(json.dumps(member))
        algorithm = algorithm_of(public_key)
    except UnusableKeyError:
        return None
    except Exception:  # noqa: BLE001 - PyJWT's and cryptography's own lists of exceptions are open
        return None
    if member.get("alg", algorithm) != algorithm:
        return None
    return VerificationKey(kid=kid, tenant_id=None, kind="tenant", algorithm=algorithm, public_key=public_key)


def external_caller(trust: Trust, claims: Mapping[str, Any], *, kid: str, expires_at: int) -> Caller:
    """The caller in an external token whose signature was checked. Raises `InvalidToken`."""

    def taken(ours: str, default: str | None = None) -> Any:
        name = trust.claims.get(ours, default)
        return None if name is None else claims.get(name)

    user_id, session_id, tier = taken("uid", _USER_CLAIM), taken("sid"), taken("tier")
    if not isinstance(user_id, str) or not is_clean_text(user_id):
        raise InvalidToken("The token's claim for the user is not a text of 1-255 characters.")
    if is_reserved_user_id(user_id):
        raise InvalidToken("The token's user is reserved.")
    if session_id is not None and not (isinstance(session_id, str) and is_session_id(session_id)):
        raise InvalidToken("The token's claim for the session is not 1-255 visible ASCII characters.")
    if tier is not None and not is_tier(tier):
        raise InvalidToken("The token's claim for the tier is neither a number nor a name.")
    token_id = claims.get("jti")
    return Caller(
        tenant_id=trust.tenant_id,
        project_id=trust.project_id,
        user_id=user_id,
        session_id=session_id,
        tier=tier,
        token_id=token_id if isinstance(token_id, str) and is_clean_text(token_id) else None,
        kid=kid,
        expires_at=expires_at,
    )
