"""The sidecar's settings: read from the environment once, in one place."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from behest_proxy.app.lent_keys import lent_keys_in
from behest_proxy.identity.addresses import networks_in
from behest_proxy.identity.workload import Workload, labels_from

HOLDER_TTL_MIN_S = 3.0
MODERATION_MAX_MS = 20.0


class SettingsError(ValueError):
    """A setting is missing or malformed; the message names it and says what it must be."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Each field is the environment variable `BEHEST_<FIELD IN CAPITALS>`."""

    database_url: str
    """PostgreSQL 15 or newer, with the ledger's schema: `postgresql://user:password@host:port/database`."""
    database_url_file: Path | None = None
    """A file that holds `database_url`, instead of it; read again when it changes."""
    signing_key_file: Path
    """The private key that signs minted tokens: RSA, EC P-256 or Ed25519, unencrypted PEM."""
    database_pooler: Literal["none", "transaction", "session"] = "none"
    """What is between here and PostgreSQL: `none`, `transaction` or `session` (PgBouncer's `pool_mode`)."""
    data_key_file: Path | None = None
    """The tenant's key (32 bytes in base64) under which keys of providers are sealed in the ledger."""
    master_key_file: Path | None = None
    """Instead of `data_key_file` for a gateway that serves all tenants: the key that theirs come out of."""
    provider_key_env: str = ""
    """The variables that Upstreams may name as their key (`credentials: {env: ...}`), each with the tenant whose
    Upstreams may, or with the one address that everybody's may send it to, such as
    `ACME_OPENAI_KEY=acme, OPENAI_API_KEY=https://api.openai.com`. `*`: all with KEY or TOKEN in their names, for
    everybody: only where nobody else writes Upstreams. Empty: none."""
    bind: str = "127.0.0.1:8080"
    """Where clients connect: HTTP/1.1 and HTTP/2 (prior knowledge; ALPN under TLS)."""
    pod_bind: str | None = None
    """Loopback only: where the containers of the same pod connect; a bearer that is no token means the workload."""
    workload_namespace: str = ""
    """With `pod_bind`: the pod's namespace."""
    workload_name: str = ""
    """With `pod_bind`: the name of the workload that the pod belongs to."""
    workload_project: str = ""
    """With `pod_bind`: the project that pays for the workload's own requests."""
    workload_labels: str = ""
    """The pod's labels, a JSON object: budgets may select by them."""
    admin_bind: str = "127.0.0.1:8081"
    """Where probes and Prometheus connect: `/healthz`, `/readyz`, `/metrics`. Never reachable for clients."""
    page: Literal["auto", "on", "off"] = "auto"
    """The built-in page at `admin_bind`, for this machine's own loopback only. `auto`: on, but not in a pod beside
    other containers, which share that loopback (`workload_name` is set)."""
    tls_cert_file: Path | None = None
    """Certificate chain, PEM. With `tls_key_file` clients connect by TLS."""
    tls_key_file: Path | None = None
    """The certificate's private key, PEM."""
    host_suffix: str = ""
    """Such as `example.com`: requests to `<slug>.example.com` are for the project with that slug, and no other's token
    or API key is good there. Other hosts leave the project to the token."""
    address_rate: float = 0
    """Requests a second that one client address may send, before anybody asks who it is; five seconds' worth may come
    at once. 0: no such limit, as where many clients share an address."""
    trusted_proxies: str = ""
    """Networks of the proxies before us, such as `10.0.0.0/8, 2001:db8::/32`: their word on the client's address counts
    for `address_rate`."""
    forwarded_header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for"
    """The one header in which those proxies say it. They must overwrite or append to what clients send in it."""
    issuer: str = "behest"
    """`iss` of minted tokens; tokens of this issuer are accepted too."""
    journal_dir: Path | None = None
    """A folder that survives a crash of the process: what the ledger has not acknowledged yet is kept there."""
    body_bytes_max: int = 10 * 1024 * 1024
    """The largest request body; above it is 413."""
    edge_connections_max: int = 10_000
    """Client connections at once; beyond, a new one is closed at once (metric `behest.connections.refused`). A
    connection is a file descriptor, and so is each HTTP/1.1 connection to a provider: keep below `ulimit -n`."""
    edge_streams_max: int = 1024
    """Requests at once on an HTTP/2 connection; more are refused (REFUSED_STREAM: clients repeat them)."""
    edge_resets_max: int = 1000
    """Streams that a client may reset at once on an HTTP/2 connection, and a thirtieth of it each second in the long
    run; beyond, the connection ends with ENHANCE_YOUR_CALM."""
    edge_control_frames_max: int = 2000
    """PING, SETTINGS, PRIORITY, CONTINUATION and next to empty DATA frames that may come at once on an HTTP/2
    connection, and a tenth of it each second in the long run; beyond, the same."""
    edge_header_bytes_max: int = 64 * 1024
    """The largest head of a request: request line and headers; with HTTP/2 the header list."""
    edge_idle_timeout_s: float = 75.0
    """A connection without a request is closed after so long. Longer than that of the load balancer before us, which
    would otherwise send a request into a closing connection."""
    edge_head_timeout_s: float = 10.0
    """From a request's first byte to its whole head (HTTP/1.1)."""
    edge_body_timeout_s: float = 120.0
    """From the beginning of a request's body to its end."""
    keep_alive_s: float = 15.0
    """After so long without a chunk the client gets a comment, so that nothing in between gives up."""
    client_stall_s: float = 60.0
    """A client that reads nothing for so long is cut."""
    moderation_ms: float = 6.0
    """While many streams speak at once, what providers say is taken up so many milliseconds apart, all of it together:
    a wake-up costs more than a chunk. Single streams never wait. 0: never; at most 20."""
    drain_s: float = 2.0
    """After SIGTERM live streams may go on for so long; then they end with `draining`."""
    holder_ttl_s: float = 120.0
    """After so long without a word to the ledger this process counts as dead: streams outlive a shorter outage, and
    what it held waits for its journal after a longer one. At least 3."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged."""
    log_format: Literal["text", "json"] = "text"
    """How lines are logged: `text` for people, `json` for machines, an object each."""
    name: str = "behest"
    """How this process calls itself in the ledger."""

    @property
    def shows_page(self) -> bool:
        """Whether the admin listener has the built-in page."""
        return self.page == "on" or (self.page == "auto" and not self.workload_name)

    @property
    def workload(self) -> Workload | None:
        """The workload that this sidecar runs beside; None: no pod said so."""
        if not self.workload_name:
            return None
        project = self.workload_project
        return Workload(
            namespace=self.workload_namespace,
            name=self.workload_name,
            project_id=project if "/" in project else f"{self.workload_namespace}/{project}",
            labels=labels_from(self.workload_labels or "{}"),
        )


def from_environment(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings in the environment.

    Raises `SettingsError` for what is missing or malformed.
    """
    environment = os.environ if environment is None else environment
    given: dict[str, Any] = {}
    for field in fields(Settings):
        variable = "BEHEST_" + field.name.upper()
        text = environment.get(variable, "").strip()
        if text:
            given[field.name] = _parsed(variable, text, str(field.type))
    if "database_url_file" in given and "database_url" not in given:
        given["database_url"] = secret_in(given["database_url_file"], "BEHEST_DATABASE_URL_FILE")
    for required in ("database_url", "signing_key_file"):
        if required not in given:
            raise SettingsError(f"BEHEST_{required.upper()} is not set: {_MEANING[required]}")
    if ("tls_cert_file" in given) != ("tls_key_file" in given):
        raise SettingsError("BEHEST_TLS_CERT_FILE and BEHEST_TLS_KEY_FILE belong together: set both or none")
    if given.get("holder_ttl_s", HOLDER_TTL_MIN_S) < HOLDER_TTL_MIN_S:
        raise SettingsError(f"BEHEST_HOLDER_TTL_S must be at least {HOLDER_TTL_MIN_S:g}: it is renewed each second")
    if not 0 <= given.get("moderation_ms", 0) <= MODERATION_MAX_MS:
        raise SettingsError(f"BEHEST_MODERATION_MS must be a number from 0 to {MODERATION_MAX_MS:g}")
    if given.get("address_rate", 0) < 0:
        raise SettingsError("BEHEST_ADDRESS_RATE must be a number from 0")
    for name, number in given.items():
        if name.startswith("edge_") and not number > 0:
            raise SettingsError(f"BEHEST_{name.upper()} must be above 0, not {number:g}")
    try:
        networks_in(given.get("trusted_proxies", ""))
    except ValueError as error:
        raise SettingsError(f"BEHEST_TRUSTED_PROXIES must be networks such as 10.0.0.0/8: {error}") from None
    try:
        lent_keys_in(given.get("provider_key_env", ""))
    except ValueError as error:
        raise SettingsError(f"BEHEST_PROVIDER_KEY_ENV: {error}") from None
    _check_workload(given)
    return Settings(**given)


def secret_in(path: Path, variable: str) -> str:
    """The text of a mounted file, without the line end that editors add. Raises `SettingsError`."""
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"{variable}: {path} cannot be read: {error}") from None
    if not text:
        raise SettingsError(f"{variable}: {path} is empty")
    return text


def _check_workload(given: Mapping[str, Any]) -> None:
    if "data_key_file" in given and "master_key_file" in given:
        raise SettingsError("BEHEST_DATA_KEY_FILE and BEHEST_MASTER_KEY_FILE exclude each other: set one")
    try:
        labels_from(given.get("workload_labels", "{}"))
    except ValueError as error:
        raise SettingsError(f"BEHEST_WORKLOAD_LABELS {error}") from None
    if "pod_bind" not in given:
        return
    for needed in ("workload_namespace", "workload_name", "workload_project"):
        if not given.get(needed):
            raise SettingsError(f"BEHEST_{needed.upper()} is not set: BEHEST_POD_BIND needs to know whose pod it is")
    host = given["pod_bind"].rpartition(":")[0]
    if host not in ("127.0.0.1", "[::1]", "localhost"):
        raise SettingsError(f"BEHEST_POD_BIND must be on loopback, not {host!r}: whoever connects there needs no token")


_CHOICES = {str(field.type): get_args(field.type) for field in fields(Settings) if "Literal" in str(field.type)}
_MEANING = {
    "database_url": "the ledger's PostgreSQL, such as postgresql://behest:secret@127.0.0.1:5432/behest",
    "signing_key_file": "the file with the private key that signs tokens (PEM)",
}


def _parsed(variable: str, text: str, kind: str) -> Any:
    choices: tuple[str, ...] = _CHOICES.get(kind, ())
    if choices and text not in choices:
        raise SettingsError(f"{variable} must be one of {', '.join(choices)}, not {text!r}")
    try:
        if "Path" in kind:
            return Path(text)
        if "int" in kind:
            return int(text)
        if "float" in kind:
            return float(text)
    except ValueError:
        raise SettingsError(f"{variable} must be a number, not {text!r}") from None
    return text
