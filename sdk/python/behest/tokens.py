"""Tokens of users: whose they are, how one is signed here or asked for, and which ones are kept. No I/O, no clock."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from behest.errors import BehestConfigError, BehestServerError
from behest.settings import Settings

__all__ = ["Identity", "Signer", "Token", "TokenCache", "mint_body", "minted"]

MARGIN_S = 60
"""A token is replaced so long before it ends, or at half of its life if that is shorter than two margins."""
CACHE_SIZE_DEFAULT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """For whom a token is. Tokens are kept by it."""

    user_id: str
    session_id: str | None = None
    """None: the session that this client made for the user, or makes now."""
    role: str | None = None
    """None: `user`."""
    tier: int | str | None = None
    ttl_s: int = 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A token and what is known of it."""

    value: str
    session_id: str
    ttl_s: int
    expires_at_s: float
    """Unix seconds, by this machine's clock."""

    def __repr__(self) -> str:
        return f"Token(session_id={self.session_id!r}, expires_at_s={self.expires_at_s})"


def mint_body(identity: Identity, session_id: str) -> dict[str, Any]:
    """What is asked of `POST /v1/auth/mint`."""
    asked = {"user_id": identity.user_id, "ttl": identity.ttl_s, "session_id": session_id}
    return asked | {name: value for name in ("role", "tier") if (value := getattr(identity, name)) is not None}


def minted(answer: object, *, session_id: str, ttl_s: int, now_s: float) -> Token:
    """The token of a mint's answer; it ends so long after `now_s`, the time *before* the question.

    So nobody's clock but our own counts. Raises `BehestServerError` when the answer is none.
    """
    members: Mapping[str, Any] = answer if isinstance(answer, dict) else {}
    value = members.get("jwt") or members.get("access_token")
    if not isinstance(value, str) or not value:
        raise BehestServerError("the answer of the mint endpoint has no token", code="invalid_answer")
    told_s = members.get("ttl")
    ttl_s = told_s if isinstance(told_s, int) and told_s > 0 else ttl_s
    return Token(value=value, session_id=session_id, ttl_s=ttl_s, expires_at_s=now_s + ttl_s)


class Signer:
    """Signs tokens with the backend's own private key. Its public half is in the Project's `signingKeys`."""

    def __init__(self, settings: Settings) -> None:
        """Raises `BehestConfigError` when the key is none that the gateway believes."""
        self._settings = settings
        try:
            key = load_pem_private_key(settings.key.encode(), password=None)
        except (ValueError, TypeError) as error:
            raise BehestConfigError(f"the private key cannot be read: {error}", code="bad_key_format") from None
        self._algorithm: Literal["RS256", "ES256", "EdDSA"]
        self._key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
        if isinstance(key, rsa.RSAPrivateKey):
            self._algorithm, self._key = "RS256", key
        elif isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
            self._algorithm, self._key = "ES256", key
        elif isinstance(key, ed25519.Ed25519PrivateKey):
            self._algorithm, self._key = "EdDSA", key
        else:
            raise BehestConfigError("the private key is neither RSA nor P-256 nor Ed25519", code="bad_key_format")

    def sign(self, identity: Identity, *, session_id: str, token_id: str, now_s: float) -> Token:
        """A token for this identity. The gateway gives it the role `user`, whatever it says."""
        settings, issued_s = self._settings, int(now_s)
        claims: dict[str, Any] = {
            "tid": settings.tenant_id,
            "pid": settings.project_id,
            "uid": identity.user_id,
            "role": identity.role or "user",
            "scp": [],
            "iss": settings.issuer,
            "aud": settings.audience,
            "iat": issued_s,
            "nbf": issued_s,
            "exp": issued_s + identity.ttl_s,
            "jti": token_id,
            "sid": session_id,
        }
        if identity.tier is not None:
            claims["tier"] = identity.tier
        value = jwt.encode(claims, self._key, algorithm=self._algorithm, headers={"kid": settings.kid})
        return Token(value=value, session_id=session_id, ttl_s=identity.ttl_s, expires_at_s=now_s + identity.ttl_s)


class TokenCache:
    """The tokens that are good, at most so many; the one that was used longest ago goes first. For one thread."""

    def __init__(self, *, size: int, new_session_id: Callable[[], str]) -> None:
        self._size = size
        self._new_session_id = new_session_id
        self._tokens: OrderedDict[Identity, Token] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    def get(self, identity: Identity, now_s: float) -> Token | None:
        """The token for this identity; None where there is none, or it ends soon."""
        token = self._tokens.get(identity)
        if token is None:
            return None
        self._tokens.move_to_end(identity)
        margin_s = min(MARGIN_S, token.ttl_s / 2)
        return token if now_s < token.expires_at_s - margin_s else None

    def session_for(self, identity: Identity) -> str:
        """The session of the next token for this identity.

        A session that was made here stays when its token is replaced: a budget per session does not begin anew.
        """
        if identity.session_id is not None:
            return identity.session_id
        last = self._tokens.get(identity)
        return last.session_id if last is not None else self._new_session_id()

    def put(self, identity: Identity, token: Token) -> None:
        """Keep this token."""
        self._tokens[identity] = token
        self._tokens.move_to_end(identity)
        if len(self._tokens) > self._size:
            self._tokens.popitem(last=False)

    def refuse(self, identity: Identity, value: str) -> None:
        """This token was not believed: it is used no more. Its session stays."""
        token = self._tokens.get(identity)
        if token is not None and token.value == value:
            self._tokens[identity] = Token(value="", session_id=token.session_id, ttl_s=token.ttl_s, expires_at_s=0.0)
