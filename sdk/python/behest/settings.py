"""What a client is made of: its arguments over the environment over defaults. Nothing here does I/O."""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from behest.errors import BehestConfigError

__all__ = ["Settings", "resolve"]

BASE_URL_DEFAULT = "https://api.behest.ai"
USER_ID_DEFAULT = "default"
TTL_DEFAULT_S = 3600
ISSUER_DEFAULT = "https://api.behest.ai"
AUDIENCE_DEFAULT = "behest"

_PREFIX_API_KEY = "behest_sk_live_"
_PREFIX_SIGNING_KEY = "behest_pk_"
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a client knows of itself. Nothing of the key is shown by `repr`."""

    mode: Literal["api_key", "signing"]
    key: str
    """The API key, or the private key as PEM."""
    base_url: str
    """Without a slash at its end, and without `/v1`."""
    user_id: str
    """Whose calls are those that name no user."""
    ttl_s: int
    tier: int | str | None
    issuer: str
    audience: str
    kid: str
    """The name under which the public key is registered; like the next two, only for local signing."""
    tenant_id: str
    project_id: str

    def __repr__(self) -> str:
        return f"Settings(mode={self.mode!r}, base_url={self.base_url!r}, user_id={self.user_id!r})"


def resolve(
    *,
    key: str | None = None,
    base_url: str | None = None,
    user_id: str | None = None,
    ttl_s: int | None = None,
    tier: int | str | None = None,
    issuer: str | None = None,
    audience: str | None = None,
    kid: str | None = None,
    tenant_id: str | None = None,
    project_id: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings of a client: what is given wins over `BEHEST_...` of the environment.

    Raises `BehestConfigError` naming what lacks or cannot be used, never with any of the key.
    """

    def told(given: str | None, name: str, default: str = "") -> str:
        return given or environment.get(name, "").strip() or default

    mode, secret = _key(told(key, "BEHEST_KEY"))
    found = Settings(
        mode=mode,
        key=secret,
        base_url=_base_url(told(base_url, "BEHEST_BASE_URL", BASE_URL_DEFAULT)),
        user_id=told(user_id, "BEHEST_USER_ID", USER_ID_DEFAULT),
        ttl_s=ttl_s if ttl_s is not None else _seconds(told(None, "BEHEST_TTL", str(TTL_DEFAULT_S))),
        tier=tier if tier is not None else _tier(told(None, "BEHEST_TIER")),
        issuer=told(issuer, "BEHEST_ISSUER", ISSUER_DEFAULT),
        audience=told(audience, "BEHEST_AUDIENCE", AUDIENCE_DEFAULT),
        kid=told(kid, "BEHEST_KID"),
        tenant_id=told(tenant_id, "BEHEST_TENANT_ID"),
        project_id=told(project_id, "BEHEST_PROJECT_ID"),
    )
    if mode == "signing":
        named = {"BEHEST_KID": found.kid, "BEHEST_TENANT_ID": found.tenant_id, "BEHEST_PROJECT_ID": found.project_id}
        missing = [name for name, value in named.items() if not value]
        if missing:
            raise BehestConfigError(f"signing tokens here also needs {', '.join(missing)}", code="missing_env")
    return found


def _key(text: str) -> tuple[Literal["api_key", "signing"], str]:
    """An API key, or a private key: bare base64 of a PEM, `behest_pk_` and a PEM, or a PEM."""
    text = text.strip()
    if not text:
        raise BehestConfigError("there is no key: set BEHEST_KEY, or pass key=", code="missing_env")
    if text.startswith(_PREFIX_API_KEY):
        return "api_key", text
    pem = text.removeprefix(_PREFIX_SIGNING_KEY)
    if not _is_pem(pem):
        try:
            pem = base64.b64decode("".join(text.split()), validate=True).decode("ascii")
        except (binascii.Error, ValueError):
            pem = ""
    if _is_pem(pem):
        return "signing", pem
    raise BehestConfigError(
        "the key (BEHEST_KEY) is neither an API key (behest_sk_live_...) nor a private key as PEM or base64 of a PEM",
        code="bad_key_format",
    )


def _is_pem(text: str) -> bool:
    return text.lstrip().startswith("-----BEGIN ") and "PRIVATE KEY-----" in text


def _base_url(text: str) -> str:
    """Both `https://host` and `https://host/v1` are meant the same."""
    text = text.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    if not text.startswith(("https://", "http://")):
        raise BehestConfigError(
            "the base URL (BEHEST_BASE_URL) must begin with https:// or http://", code="bad_base_url"
        )
    return text


def _seconds(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise BehestConfigError("BEHEST_TTL is not a whole number of seconds", code="bad_ttl")
    return int(text)


def _tier(text: str) -> int | str | None:
    """A tier's number or name."""
    return int(text) if _NUMBER.fullmatch(text) else text or None
