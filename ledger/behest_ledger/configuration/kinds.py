"""The four kinds of resource as typed values: Project, Upstream, Tier and Budget of `behest.ai/v1alpha1`.

Attributes are in Python's spelling; the wire spells them in camelCase (`requests_per_minute` is
`requestsPerMinute`). These types say which members exist and of what type they are; `validation` says which
values make sense, and `manifests` reads text.
"""

from typing import Any, ClassVar, Literal, TypeAlias

import msgspec

API_VERSION = "behest.ai/v1alpha1"

KindName: TypeAlias = Literal["Project", "Upstream", "Tier", "Budget"]

_SPELLED_OTHERWISE = {"base_url": "baseURL", "jwks_url": "jwksURL"}


def wire_name(attribute: str) -> str:
    """How the wire spells an attribute: camelCase, with URL in capitals as Kubernetes does."""
    if attribute in _SPELLED_OTHERWISE:
        return _SPELLED_OTHERWISE[attribute]
    first, *rest = attribute.split("_")
    return first + "".join(word.capitalize() for word in rest)


class _Part(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename=wire_name,
):
    """A part of a manifest: immutable, no unknown members, camelCase on the wire."""


class Metadata(_Part, frozen=True, kw_only=True):
    """Which thing a manifest is about."""

    name: str
    """A DNS-1123 subdomain, unique for its kind in the namespace."""
    namespace: str = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


# Project


class Attribution(_Part, frozen=True, kw_only=True):
    """Who pays inside the organisation; bounded values, so they may label metrics."""

    team: str | None = None
    cost_center: str | None = None


class Memory(_Part, frozen=True, kw_only=True):
    """How much of a thread is remembered."""

    window: int | None = None
    """How many stored messages go before a request's own; absent: 40."""
    window_bytes: int | None = None
    """How large these may be together, in bytes of JSON; absent: 65536, some 16,000 tokens."""
    retention_days: int | None = None
    """After how many days without a message a thread is deleted; absent: as the keeper says, 90."""


class TrustedIssuer(_Part, frozen=True, kw_only=True):
    """An external OpenID issuer whose tokens this project accepts."""

    issuer: str
    jwks_url: str
    audience: str
    claims: dict[str, str] = {}
    """Our claim name -> the issuer's claim name, for example `uid: sub`."""


class SigningKey(_Part, frozen=True, kw_only=True):
    """The public half of a key with which the tenant's own backend signs tokens."""

    kid: str
    public_key: str
    """A public key in PEM form. Private keys are refused."""


class ProjectSpec(_Part, frozen=True, kw_only=True):
    """What a project may use, who may call for it, and what is assumed when a request does not say."""

    tenant: str | None = None
    """Absent: the namespace."""
    attribution: Attribution | None = None
    require_session: bool = False
    """Refuse requests that name no session."""
    slug: str | None = None
    default_model: str | None = None
    """Used where a request names no model, an empty one, or `default`."""
    allowed_models: list[str] = []
    """Names and globs; empty allows whatever the project's upstreams serve."""
    allowed_origins: list[str] = []
    """Exact origins, `https://*.example.com`, or `*`; empty allows no browser of another origin."""
    system_prompt: str | None = None
    memory: Memory | None = None
    default_tier: str | None = None
    """The Tier of users whose token names none; absent: no tier."""
    trusted_issuers: list[TrustedIssuer] = []
    signing_keys: list[SigningKey] = []
    suspended: bool = False
    """The kill switch: new requests are 403 and live streams end."""
    api_key_secret_name: str | None = None
    """Kubernetes only: the Secret into which the operator writes an API key."""


# Upstream


class SecretKeyRef(_Part, frozen=True, kw_only=True):
    """One key of a Kubernetes Secret in the manifest's namespace."""

    name: str
    key: str


class Credentials(_Part, frozen=True, kw_only=True):
    """Where the provider's API key comes from: a Secret, or outside a cluster an environment variable."""

    secret_key_ref: SecretKeyRef | None = None
    env: str | None = None


class Timeouts(_Part, frozen=True, kw_only=True):
    """How long an upstream may be silent. A live stream has no total limit."""

    connect_seconds: float | None = None
    first_byte_seconds: float | None = None
    idle_seconds: float | None = None


class Capabilities(_Part, frozen=True, kw_only=True):
    """What the provider's wire can do."""

    streams: bool = True
    usage_in_stream: bool = True
    """Sends a usage chunk at the end of a stream when asked to."""
    continuous_usage: bool = False
    """Sends cumulative usage in every chunk."""
    continuation: Literal["Prefix", "ContinueFinalMessage", "Prompt", "None"] = "Prompt"
    """How a broken reply is continued."""


class Prices(_Part, frozen=True, kw_only=True):
    """USD per million tokens by class, as decimal strings; `request` is USD per request."""

    input: str
    output: str
    cache_read: str | None = None
    cache_write: str | None = None
    reasoning: str | None = None
    audio_input: str | None = None
    audio_output: str | None = None
    request: str | None = None


class ModelEntry(_Part, frozen=True, kw_only=True):
    """A model, or a glob of models, that an upstream serves, and what differs from what is known about it."""

    name: str
    """What clients ask for; `*` and `?` are globs."""
    upstream_name: str | None = None
    """What the provider calls it; absent: the name that the client asked for."""
    provider: str | None = None
    """Whose prices apply, by the price book's provider id; absent: by the base URL, then by the model."""
    prices: Prices | None = None
    """Instead of the price book."""
    free: bool = False
    """Costs nothing, and that is meant."""
    price_context: dict[str, str] = {}
    """How the price book's prices are meant where the caller does not say: `service_tier: priority`,
    `processing: batch`, `route: ...`, for an account or endpoint that is billed so."""
    visible_only: bool | None = None
    """True: the provider bills no more output than it shows; absent: as known for the model."""
    hidden_tokens_per_second: int | None = None
    """How fast hidden output is assumed to grow when such a reply is cut short."""
    context_limit: int | None = None
    """Tokens of input at most."""
    output_limit: int | None = None
    """Tokens of output at most."""


class UpstreamSpec(_Part, frozen=True, kw_only=True):
    """A provider's endpoint and what it serves."""

    base_url: str
    """Including the version, as the OpenAI SDKs take it: `https://api.openai.com/v1`."""
    credentials: Credentials | None = None
    byok: bool = False
    """Calls use the tenant's own stored provider key; the provider bills such usage, not the platform."""
    protocol: Literal["Auto", "HTTP1", "HTTP2"] = "Auto"
    timeouts: Timeouts = Timeouts()
    capabilities: Capabilities = Capabilities()
    models: list[ModelEntry] = []
    """Empty: any model that no other upstream of the namespace lists."""


# Tier


class TierSpec(_Part, frozen=True, kw_only=True):
    """What a class of users may do, per (project, user)."""

    number: int
    """The token's `tier` may be this number or the name."""
    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_day: int | None = None
    concurrency: int | None = None
    """Streams at once."""
    system_prompt: str | None = None
    """Instead of the project's."""
    models: dict[str, str] = {}
    """Model asked for -> model used; `default` replaces the project's default model."""


# Budget


class WorkloadSelector(_Part, frozen=True, kw_only=True):
    """Pods, by all of these labels."""

    match_labels: dict[str, str]


class BudgetScope(_Part, frozen=True, kw_only=True):
    """What a budget binds; every member that is given must match. Values may be globs, except `tenant`."""

    tenant: str | None = None
    """Binds every namespace of the tenant; absent: this namespace only."""
    namespace: str | None = None
    project: str | None = None
    """A project's name, in this namespace, or `<namespace>/<name>`."""
    user: str | None = None
    session: str | None = None
    model: str | None = None
    tier: str | None = None
    workload_selector: WorkloadSelector | None = None


class BudgetLimit(_Part, frozen=True, kw_only=True):
    """How much, in exactly one unit: money, tokens or requests."""

    amount: str | None = None
    """A decimal string."""
    currency: Literal["USD"] | None = None
    tokens: int | None = None
    token_kind: Literal["Both", "Input", "Output"] | None = None
    """Which tokens count; absent: both."""
    requests: int | None = None


class BudgetWindow(_Part, frozen=True, kw_only=True):
    """Per what time."""

    period: Literal["Lifetime", "Minute", "Hour", "Day", "Week", "Month"]
    alignment: Literal["Calendar", "Rolling"] = "Calendar"
    """Rolling begins with a subject's first request."""
    time_zone: str = "UTC"
    """An IANA name: where a calendar day begins."""


PerName: TypeAlias = Literal["none", "namespace", "project", "user", "session", "model", "tier", "workload"]


class BudgetSpec(_Part, frozen=True, kw_only=True):
    """Who may spend how much, per what time, and how strictly."""

    scope: BudgetScope = BudgetScope()
    per: list[PerName] = []
    """Every combination of these has the limit for itself; empty (or `none`): all share it."""
    limit: BudgetLimit
    window: BudgetWindow
    enforcement: Literal["Hard", "Soft"] = "Hard"
    """Soft counts and alerts, and never stops anything."""
    alert_thresholds: list[int] = []
    """Percent of the limit, ascending."""
    suspended: bool = False
    """The kill switch: whatever this budget binds is 403 and its live streams end."""


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A resource: what it is about, and what is wanted."""

    kind: ClassVar[KindName]

    metadata: Metadata
    document: int | None = msgspec.field(default=None)
    """The number of its document in the text that it was read from, from 1; None: it came as an object."""
    source: str = ""
    """The file it was read from, where that is known."""

    @property
    def namespace(self) -> str:
        """The namespace it lives in."""
        return self.metadata.namespace

    @property
    def name(self) -> str:
        """Its name in the namespace."""
        return self.metadata.name

    @property
    def qualified_name(self) -> str:
        """`<namespace>/<name>`, which is also a project's and a budget's id."""
        return f"{self.metadata.namespace}/{self.metadata.name}"


class Project(_Manifest, frozen=True, kw_only=True):
    """Applications and their users that are configured, attributed and suspended together."""

    kind: ClassVar[KindName] = "Project"
    spec: ProjectSpec


class Upstream(_Manifest, frozen=True, kw_only=True):
    """A provider endpoint that the projects of a namespace use."""

    kind: ClassVar[KindName] = "Upstream"
    spec: UpstreamSpec


class Tier(_Manifest, frozen=True, kw_only=True):
    """A class of users with its rates."""

    kind: ClassVar[KindName] = "Tier"
    spec: TierSpec


class Budget(_Manifest, frozen=True, kw_only=True):
    """A limit of money, tokens or requests."""

    kind: ClassVar[KindName] = "Budget"
    spec: BudgetSpec


Manifest: TypeAlias = Project | Upstream | Tier | Budget


def wire_spec(manifest: Manifest) -> dict[str, Any]:
    """The manifest's spec in wire form, defaults left out: what is stored."""
    return _wire(manifest.spec)


def _wire(part: msgspec.Struct) -> dict[str, Any]:
    # msgspec's own omit_defaults compares strings by identity, so that a default that was written out stays.
    written: dict[str, Any] = {}
    for field in msgspec.structs.fields(part):
        value = getattr(part, field.name)
        default = [] if field.default_factory is list else {} if field.default_factory is dict else field.default
        if value == default and not field.required:
            continue
        if isinstance(value, msgspec.Struct):
            value = _wire(value)
        elif isinstance(value, list):
            value = [_wire(item) if isinstance(item, msgspec.Struct) else item for item in value]
        written[field.encode_name] = value
    return written
