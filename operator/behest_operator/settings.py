"""Settings of the operator's processes: members of a structure are variables of the environment, and their help.

Each member is `BEHEST_<MEMBER IN CAPITALS>`; what it means is its description, which is also in `--help`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from behest_ledger.sealing import SealingError, key_from_text
from behest_ledger.store.keeper import Policy
from behest_operator.gateway_login import GatewayLogin
from behest_operator.webhook_certificates import WebhookCertificates

_POSTGRESQL = "^postgres(ql)?://"
_BIND = r"^[^ ]+:[0-9]{1,5}$"
_S = TypeVar("_S", bound=msgspec.Struct)


class SettingsError(ValueError):
    """A setting is missing or malformed; the message names it."""


class OperatorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What `behest operator` is told."""

    master_key_file: Annotated[str, Meta(description="a file with 32 bytes in base64: keys of providers are sealed")]
    database_url: Annotated[
        str, Meta(pattern=_POSTGRESQL, description="the ledger, by its owner's role: postgresql://...")
    ] = ""
    database_url_file: Annotated[str, Meta(description="a file that holds BEHEST_DATABASE_URL, instead of it")] = ""
    sidecar_database_url: Annotated[
        str, Meta(pattern=_POSTGRESQL, description="the ledger as sidecars reach it; default: as the operator does")
    ] = ""
    namespaces: Annotated[
        tuple[str, ...], Meta(description="those that are looked after, with commas between them; default: all")
    ] = ()
    grace_hours: Annotated[
        float, Meta(ge=0, le=10_000, description="how long a request of a lost sidecar waits for its journal")
    ] = 24.0
    policy: Annotated[
        Policy, Meta(description="what it is charged then: its last checkpoint, or all that was on hold")
    ] = "checkpoint"
    webhook_configuration: Annotated[
        str, Meta(description="the webhook's object, where its certificate is the operator's to look after")
    ] = ""
    webhook_namespace: Annotated[str, Meta(description="with it: the webhook's namespace")] = ""
    webhook_secret: Annotated[str, Meta(description="with it: the Secret that the webhook mounts")] = ""
    webhook_service: Annotated[str, Meta(description="with it: the Service that the API server calls")] = ""
    gateway_namespace: Annotated[str, Meta(description="the gateway's namespace, where there is a gateway")] = ""
    gateway_secret: Annotated[str, Meta(description="with it: the Secret that its login is written into")] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="how much is logged")] = "info"
    liveness_bind: Annotated[str, Meta(pattern=_BIND, description="where probes connect")] = "0.0.0.0:8081"
    metrics_bind: Annotated[str, Meta(pattern=_BIND, description="where Prometheus connects; default: nowhere")] = ""

    @property
    def webhook(self) -> WebhookCertificates | None:
        """What the certificate is for that the operator looks after; None: there is none, or somebody else does."""
        if not self.webhook_configuration:
            return None
        return WebhookCertificates(
            configuration=self.webhook_configuration,
            namespace=self.webhook_namespace,
            secret=self.webhook_secret,
            service=self.webhook_service,
        )

    def gateway(self) -> GatewayLogin | None:
        """The Secret with the gateway's login; None: there is no gateway."""
        if not self.gateway_secret:
            return None
        return GatewayLogin(namespace=self.gateway_namespace, secret=self.gateway_secret, dsn=self.database_url)

    def master_key(self) -> bytes:
        """The key in `master_key_file`. Raises `SettingsError`."""
        try:
            return key_from_text(_text_of("master_key_file", self.master_key_file))
        except SealingError as error:
            raise SettingsError(f"BEHEST_MASTER_KEY_FILE: {self.master_key_file}: {error}") from None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "OperatorSettings":
        """The settings in an environment. Raises `SettingsError`."""
        given = read(cls, environment)
        if given.webhook_configuration:
            for member in ("webhook_namespace", "webhook_secret", "webhook_service"):
                if not getattr(given, member):
                    raise SettingsError(f"{_variable(member)} is not set: BEHEST_WEBHOOK_CONFIGURATION needs it")
        if bool(given.gateway_namespace) != bool(given.gateway_secret):
            raise SettingsError("BEHEST_GATEWAY_NAMESPACE and BEHEST_GATEWAY_SECRET belong together: set both or none")
        url = given.database_url
        if not url:
            if not given.database_url_file:
                raise SettingsError(f"BEHEST_DATABASE_URL is not set: {_help(cls)['database_url']}")
            text = _text_of("database_url_file", given.database_url_file)
            url = read(cls, {**environment, "BEHEST_DATABASE_URL": text}).database_url
        return msgspec.structs.replace(given, database_url=url)

    @property
    def sidecar_url(self) -> str:
        """The ledger as sidecars reach it; the login in it is not theirs."""
        return self.sidecar_database_url or self.database_url


class WebhookSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What `behest webhook` is told."""

    injection_template: Annotated[str, Meta(description="the file with the sidecar's template (JSON)")]
    webhook_tls_dir: Annotated[str, Meta(description="the folder with tls.crt and tls.key")] = "/etc/behest-webhook"
    webhook_bind: Annotated[str, Meta(pattern=_BIND, description="where the API server connects")] = "0.0.0.0:9443"
    webhook_probe_bind: Annotated[str, Meta(pattern=_BIND, description="where probes and Prometheus connect")] = (
        "0.0.0.0:9081"
    )


def read(kind: type[_S], environment: Mapping[str, str]) -> _S:
    """A structure's members from an environment. Raises `SettingsError`."""
    given: dict[str, Any] = {}
    descriptions = _help(kind)
    for field in msgspec.structs.fields(kind):
        variable = _variable(field.name)
        text = environment.get(variable, "").strip()
        if not text:
            if field.required:
                raise SettingsError(f"{variable} is not set: {descriptions[field.name]}")
            continue
        several = get_origin(_kind(field.type)) is tuple
        value = [part.strip() for part in text.split(",") if part.strip()] if several else text
        try:
            given[field.name] = msgspec.convert(value, field.type, strict=False)
        except msgspec.ValidationError:
            # A URL has a password in it, also one that is misspelt.
            shown = "what it holds" if "DATABASE_URL" in variable else repr(text)
            raise SettingsError(f"{variable}: {shown} is not {_expected(field.type)}") from None
    return kind(**given)


def help_text(kind: type[msgspec.Struct]) -> str:
    """What `--help` says of the environment: each variable, its meaning and its default."""
    lines: list[str] = []
    descriptions = _help(kind)
    for field in msgspec.structs.fields(kind):
        meaning = descriptions[field.name]
        default = "" if field.required or not field.default else f" (default: {field.default})"
        lines.append(f"  {_variable(field.name)}\n      {meaning}{default}")
    return "environment:\n" + "\n".join(lines)


def _variable(member: str) -> str:
    return "BEHEST_" + member.upper()


def _help(kind: type[msgspec.Struct]) -> dict[str, str]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: str(get_args(hint)[1].description) for name, hint in hints.items()}


def _kind(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _expected(annotation: Any) -> str:
    kind, meta = get_args(annotation)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if kind is float:
        return f"a number from {meta.ge:g} to {meta.le:g}"
    return "a PostgreSQL URL: postgresql://..." if meta.pattern == _POSTGRESQL else "host:port"


def _text_of(member: str, path: str) -> str:
    try:
        text = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"{_variable(member)}: {path} cannot be read: {error}") from None
    if not text:
        raise SettingsError(f"{_variable(member)}: {path} is empty")
    return text
