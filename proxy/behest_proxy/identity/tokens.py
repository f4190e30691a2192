"""Verification of bearer tokens: JWS compact, one algorithm per key, strict JSON, every claim checked."""

import base64
import binascii
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, cast, get_args

import jwt
import msgspec

from behest_proxy.errors import Forbidden, InvalidToken
from behest_proxy.identity.caller import (
    Caller,
    Role,
    is_clean_text,
    is_session_id,
    is_tier,
    least_role,
)
from behest_proxy.identity.external import Trust, Trusts, external_caller
from behest_proxy.identity.keys import Algorithm, KeySet, VerificationKey, is_kid
from behest_proxy.identity.reserved import is_reserved_user_id
from behest_proxy.identity.strict_json import json_object

__all__ = ["AUDIENCE", "ISSUERS", "TOKEN_BYTES_MAX", "TokenVerifier", "is_token_shaped"]

AUDIENCE = "behest"
ISSUERS = frozenset({"https://api.behest.ai", "https://api.behest.app", "behest"})
"""The issuers that published clients write; a deployment adds its own."""

TOKEN_BYTES_MAX = 8 * 1024
SCOPES_MAX = 64
TIME_MAX_S = 253_402_300_799
"""The end of the year 9999: no later time is meant."""

_ALGORITHMS = {name: jwt.get_algorithm_by_name(name) for name in get_args(Algorithm)}
"""Looked up once: PyJWT makes all that it knows anew for each look."""

_API_KEY_MESSAGE = "An API key is not a bearer token here: exchange it for one at POST /v1/auth/mint."
_PARTS = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")


Place = tuple[str, str]
"""A project: (tenant id, project id)."""


class _Verified(msgspec.Struct, frozen=True):
    """A token whose signature and claims were checked; only time and the project's owner can change that."""

    caller: Caller
    not_before_s: float
    expires_s: float
    is_bound: bool
    """Whether its key is bound to a tenant, so that the project must be that tenant's."""
    key: VerificationKey
    keys_url: str | None = None
    """Where an external issuer's key came from."""


class TokenVerifier:
    """Turns bearer tokens into callers.

    Does no I/O and reads no clock. Verified tokens are remembered by their SHA-256, at most `cache_size` of
    them, until they expire or the keys change. For one thread.
    """

    def __init__(
        self,
        keys: KeySet,
        issuers: Iterable[str] = ISSUERS,
        audience: str = AUDIENCE,
        leeway_s: float = 30,
        cache_size: int = 4096,
        *,
        project_belongs: Callable[[str, str], bool] | None = None,
        external_key: Callable[[str, str], VerificationKey | None] = lambda _keys_url, _kid: None,
    ) -> None:
        """`project_belongs(tenant_id, project_id)` tells whose a project is; it is asked for every token
        whose key is bound to a tenant, cached or not. Without it such tokens are refused.
        `external_key(keys_url, kid)` tells the key that an external issuer publishes there now.
        """
        self._trusts = Trusts()
        self._external_key = external_key
        self._keys = keys
        self._issuers = frozenset(issuers)
        self._audience = audience
        self._leeway_s = leeway_s
        self._cache_size = cache_size
        self._project_belongs = project_belongs
        self._cache: OrderedDict[bytes, _Verified] = OrderedDict()

    @property
    def keys(self) -> KeySet:
        """The keys believed now."""
        return self._keys

    @property
    def cached_count(self) -> int:
        """How many verified tokens are remembered."""
        return len(self._cache)

    def use_keys(self, keys: KeySet) -> bool:
        """Believe these keys from now on. Returns whether they differ from those before.

        If they do, nothing verified before counts any more: a revoked kid ends its tokens here.
        """
        if keys == self._keys:
            return False
        self._keys = keys
        self._cache.clear()
        return True

    def use_trusts(self, trusts: Trusts) -> None:
        """Believe these external issuers from now on."""
        if trusts != self._trusts:
            self._trusts = trusts
            self._cache.clear()

    def wanted_key(self, token: str, place: Place | None = None) -> tuple[str, str] | None:
        """The URL and kid of the external key that `verify` will ask for; None: it asks for none.

        Nothing in the token is believed here: what it names can be one of the URLs that are trusted anyway.
        """
        if not self._trusts or len(token) > TOKEN_BYTES_MAX or not token.isascii():
            return None
        verified = self._cache.get(_digest(token.encode("ascii"), place))
        if verified is not None:
            return None if verified.keys_url is None else (verified.keys_url, verified.key.kid)
        match = _PARTS.fullmatch(token)
        try:
            if match is None or not self._trusts.of((claims := _json_object(match[2], "payload")).get("iss")):
                return None
            kid = _json_object(match[1], "header").get("kid")
            return (self._trusts.one_for(claims, place).keys_url, kid) if isinstance(kid, str) else None
        except InvalidToken:
            return None

    def verify(self, token: str, now_s: float, place: Place | None = None) -> Caller:
        """The caller whom this token proves, at this time (Unix seconds).

        `place`: the project whose host the request came to; a token of an external issuer may not say it itself.

        Raises `InvalidToken` saying what is wrong, never with any of the token; `Forbidden` when the key's
        tenant does not own the project.
        """
        if token.startswith("behest_sk_"):
            raise InvalidToken(_API_KEY_MESSAGE)
        if len(token) > TOKEN_BYTES_MAX:
            raise InvalidToken(f"The token is over {TOKEN_BYTES_MAX} bytes.")
        if not token.isascii():
            raise InvalidToken("The token is not a JWT.")
        data = token.encode("ascii")
        # The digest is kept, not the token: its size is fixed, and no credential stays in memory.
        digest = _digest(data, place)
        # Out and in again makes it the youngest; what fails a check below stays out.
        verified = self._cache.pop(digest, None)
        if verified is None or not self._is_believed(verified):
            verified = self._checked(token, data, place)
        self._check_times(verified, now_s)
        self._check_project(verified)
        self._cache[digest] = verified
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return verified.caller

    def _check_times(self, verified: _Verified, now_s: float) -> None:
        if now_s >= verified.expires_s + self._leeway_s:
            raise InvalidToken("The token has expired: mint a new one.")
        if now_s < verified.not_before_s - self._leeway_s:
            raise InvalidToken("The token is not valid yet (nbf or iat is in the future).")

    def _check_project(self, verified: _Verified) -> None:
        if not verified.is_bound:
            return
        caller = verified.caller
        if self._project_belongs is None or not self._project_belongs(caller.tenant_id, caller.project_id):
            raise Forbidden(
                "The token's project (pid) does not belong to the tenant of the key that signed it.",
                details={"reason": "wrong_project"},
            )

    def _is_believed(self, verified: _Verified) -> bool:
        """Whether an external issuer still publishes the key; ours clear the cache when they change."""
        url = verified.keys_url
        return url is None or self._external_key(url, verified.key.kid) == verified.key

    def _checked(self, token: str, data: bytes, place: Place | None) -> _Verified:
        """Everything but the times: shape, header, key, signature, claims."""
        match = _PARTS.fullmatch(token)
        if match is None:
            raise InvalidToken("The token is not a JWT.")
        header = _json_object(match[1], "header")
        # Whose key it is depends on whom the token speaks for; nothing else of it is believed before the signature.
        claims = _json_object(match[2], "payload")
        issuer = claims.get("iss")
        trust: Trust | None = None
        if self._trusts.of(issuer) and issuer not in self._issuers:
            trust = self._trusts.one_for(claims, place)
        key = self._key_of(header, claims.get("tid"), trust)
        # PyJWT's algorithm objects take the key as it is: neither the header's alg nor anything else in the
        # token has a say in how it is verified.
        if not _ALGORITHMS[key.algorithm].verify(data[: match.end(2)], key.public_key, _decoded(match[3], "signature")):
            raise InvalidToken("The token's signature is wrong.")
        return self._verified(claims, key) if trust is None else _verified_external(trust, claims, key)

    def _key_of(self, header: dict[str, Any], tenant_id: object, trust: Trust | None) -> VerificationKey:
        # RFC 7515 section 4.1.11: who does not understand a critical extension must refuse; we know none.
        if "crit" in header:
            raise InvalidToken("The token's header has critical extensions (crit) that are not understood.")
        kid = header.get("kid")
        if not isinstance(kid, str):
            raise InvalidToken("The token's header names no key (kid).")
        if trust is None and not is_kid(kid):
            raise InvalidToken("The token's kid is not one that a key can have.")
        key = self._keys.get(kid, tenant_id) if trust is None else self._external_key(trust.keys_url, kid)
        if key is None:
            raise InvalidToken("The token's kid names no key that is valid here: unknown or revoked.")
        if header.get("alg") != key.algorithm:
            raise InvalidToken(f"The token's alg is not that of its key, {key.algorithm}.")
        return key

    def _verified(self, claims: dict[str, Any], key: VerificationKey) -> _Verified:
        if _text(claims, "iss") not in self._issuers:
            raise InvalidToken("The token's issuer (iss) is not accepted here.")
        self._check_audience(claims.get("aud"))
        tenant_id = _text(claims, "tid")
        if key.tenant_id is not None and tenant_id != key.tenant_id:
            raise InvalidToken("The token's tenant (tid) is not the one its key may speak for.")
        expires_s = _expiry(claims)
        user_id = _text(claims, "uid")
        role: Role = "user"
        scopes = _scopes(claims)
        if key.kind == "own":
            role = least_role(_optional_text(claims, "role") or "user")
        else:
            # A tenant vouches for its users, not for rights: whatever it claims is taken away here.
            _optional_text(claims, "role")
            scopes = ()
            if is_reserved_user_id(user_id):
                raise InvalidToken("The token's user (uid) is reserved.")
        caller = Caller(
            tenant_id=tenant_id,
            project_id=_text(claims, "pid"),
            user_id=user_id,
            role=role,
            scopes=scopes,
            session_id=_session_id(claims),
            tier=_tier(claims),
            token_id=_optional_text(claims, "jti"),
            kid=key.kid,
            expires_at=int(expires_s),
        )
        not_before_s = _not_before(claims)
        return _Verified(caller, not_before_s, expires_s, key.tenant_id is not None, key)

    def _check_audience(self, audience: object) -> None:
        # RFC 7519 section 4.1.3: one string or an array of strings.
        if isinstance(audience, str):
            accepted = audience == self._audience
        elif isinstance(audience, list):
            members = cast("list[object]", audience)
            if not all(isinstance(member, str) for member in members):
                raise InvalidToken("The token's claim aud is neither a string nor a list of strings.")
            accepted = self._audience in members
        else:
            raise InvalidToken("The token's claim aud is missing, or neither a string nor a list of strings.")
        if not accepted:
            raise InvalidToken("The token is for another audience (aud).")


def _digest(data: bytes, place: Place | None) -> bytes:
    """What a verified token is remembered by: itself, and the host's project where it came to one."""
    return hashlib.sha256(data if place is None else data + f"\n{place[0]}\n{place[1]}".encode()).digest()


def _verified_external(trust: Trust, claims: dict[str, Any], key: VerificationKey) -> _Verified:
    expires_s = _expiry(claims)
    caller = external_caller(trust, claims, kid=key.kid, expires_at=int(expires_s))
    return _Verified(caller, _not_before(claims), expires_s, False, key, trust.keys_url)


def _expiry(claims: dict[str, Any]) -> float:
    expires_s = _time(claims, "exp")
    if expires_s is None:
        raise InvalidToken("The token has no claim exp.")
    return expires_s


def _not_before(claims: dict[str, Any]) -> float:
    return max(_time(claims, "nbf") or 0, _time(claims, "iat") or 0)


def is_token_shaped(bearer: str) -> bool:
    """Whether a bearer looks like a JWT: three base64url parts. Says nothing about whether it is valid.

    On a pod's loopback a bearer that does not is the workload itself.
    """
    return _PARTS.fullmatch(bearer) is not None


def _decoded(part: str, name: str) -> bytes:
    try:
        data = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except binascii.Error:
        raise InvalidToken(f"The token's {name} is not base64url.") from None
    # Spare bits in the last character would give one token many spellings.
    if base64.urlsafe_b64encode(data).rstrip(b"=") != part.encode("ascii"):
        raise InvalidToken(f"The token's {name} is not base64url.")
    return data


def _json_object(part: str, name: str) -> dict[str, Any]:
    data = _decoded(part, name)
    try:
        return json_object(data)
    except ValueError:
        raise InvalidToken(f"The token's {name} is not a JSON object, or names a member twice.") from None


def _optional_text(claims: dict[str, Any], name: str) -> str | None:
    value = claims.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not is_clean_text(value):
        raise InvalidToken(f"The token's claim {name} is not a text of 1-255 characters.")
    return value


def _text(claims: dict[str, Any], name: str) -> str:
    value = _optional_text(claims, name)
    if value is None:
        raise InvalidToken(f"The token has no claim {name}.")
    return value


def _time(claims: dict[str, Any], name: str) -> float | None:
    """A NumericDate (RFC 7519 section 2): whole or broken Unix seconds."""
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidToken(f"The token's claim {name} is not a number of seconds.")
    # Infinity is outside, too; NaN never came through the parser.
    if not 0 <= value <= TIME_MAX_S:
        raise InvalidToken(f"The token's claim {name} is not a time.")
    return value


def _scopes(claims: dict[str, Any]) -> tuple[str, ...]:
    """Published clients write a list; RFC 8693 writes one string with spaces."""
    value = claims.get("scp")
    if value is None:
        return ()
    scopes: object = value.split() if isinstance(value, str) else value
    refusal = InvalidToken(f"The token's claim scp is not a list of at most {SCOPES_MAX} texts.")
    if not isinstance(scopes, list):
        raise refusal
    members = cast("list[object]", scopes)
    texts = tuple(scope for scope in members if isinstance(scope, str) and is_clean_text(scope))
    if len(texts) != len(members) or len(members) > SCOPES_MAX:
        raise refusal
    return texts


def _session_id(claims: dict[str, Any]) -> str | None:
    value = claims.get("sid")
    if value is None:
        return None
    if not isinstance(value, str) or not is_session_id(value):
        raise InvalidToken("The token's claim sid is not 1-255 visible ASCII characters.")
    return value


def _tier(claims: dict[str, Any]) -> int | str | None:
    value = claims.get("tier")
    if value is None:
        return None
    if not is_tier(value):
        raise InvalidToken("The token's claim tier is neither a number nor a name.")
    return cast("int | str", value)
