"""Which values of a manifest make sense: the rules that types alone cannot say, as plain functions.

Each rule yields what it found wrong as (path, reason), so that one look at a manifest tells everything. Nothing
here depends on other resources or on what is stored; that is `plan`.
"""

import itertools
import re
from collections.abc import Iterator
from typing import assert_never

from behest_ledger.configuration.globs import is_pattern, matches_any
from behest_ledger.configuration.kinds import (
    Budget,
    BudgetLimit,
    BudgetScope,
    Manifest,
    Metadata,
    ModelEntry,
    Prices,
    Project,
    ProjectSpec,
    Tier,
    TierSpec,
    Upstream,
    UpstreamSpec,
    wire_name,
)
from behest_ledger.configuration.problems import MONEY_HINT, Problem, shown
from behest_ledger.configuration.rules import (
    DNS_LABEL,
    DNS_SUBDOMAIN,
    NAME_LENGTH_MAX,
    TEXT_LENGTH_MAX,
    absolute_url,
    address_of,
    dns_name,
    few,
    glob,
    globs,
    holds_a_key,
    in_range,
    is_host,
    is_zone,
    labels_of,
    long_text,
    model_name,
    short_text,
    split_url,
    unique,
)

LABEL_LENGTH_MAX = 63
TOKENS_MAX = 10**15
REQUESTS_MAX = 10**12
CONCURRENCY_MAX = 100_000
TIER_NUMBER_MAX = 1000
SECONDS_MAX = 3600
ALERT_THRESHOLDS_MAX = 10
ISSUER_CLAIMS = ("uid", "sid", "tier", "pid")
"""What of an external issuer's token may be taken over; never a role."""

_KID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.:~-]{0,127}")
_DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")
_RATE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")
_PUBLIC_PEM = re.compile(r"\s*-----BEGIN (RSA )?PUBLIC KEY-----[A-Za-z0-9+/=\s]+-----END (RSA )?PUBLIC KEY-----\s*")


def problems_of_metadata(metadata: Metadata) -> list[Problem]:
    """Names as Kubernetes has them (DNS-1123), so that a manifest which applies here applies there."""
    problems: list[Problem] = []
    if len(metadata.name) > NAME_LENGTH_MAX or not DNS_SUBDOMAIN.fullmatch(metadata.name):
        problems.append(
            ("metadata.name", f"must be lower-case letters, digits, '-' and '.', got {shown(metadata.name)}")
        )
    if len(metadata.namespace) > LABEL_LENGTH_MAX or not DNS_LABEL.fullmatch(metadata.namespace):
        problems.append(
            (
                "metadata.namespace",
                f"must be at most 63 lower-case letters, digits and '-', got {shown(metadata.namespace)}",
            )
        )
    problems += labels_of("metadata.labels", metadata.labels)
    return problems


def problems_of(manifest: Manifest) -> list[Problem]:
    """Everything that is wrong with a manifest's values; its metadata is checked apart."""
    match manifest:
        case Project():
            return list(_project(manifest.spec))
        case Upstream():
            return list(_upstream(manifest.spec))
        case Tier():
            return list(_tier(manifest.spec))
        case Budget():
            return list(_budget(manifest))
        case _:
            assert_never(manifest)


# Project


def _project(spec: ProjectSpec) -> Iterator[Problem]:
    yield from dns_name("spec.tenant", spec.tenant)
    yield from dns_name("spec.slug", spec.slug)
    yield from dns_name("spec.defaultTier", spec.default_tier)
    yield from dns_name("spec.apiKeySecretName", spec.api_key_secret_name)
    yield from long_text("spec.systemPrompt", spec.system_prompt)
    if spec.attribution:
        yield from short_text("spec.attribution.team", spec.attribution.team)
        yield from short_text("spec.attribution.costCenter", spec.attribution.cost_center)
    yield from globs("spec.allowedModels", spec.allowed_models)
    yield from model_name("spec.defaultModel", spec.default_model)
    if spec.default_model and spec.allowed_models and not matches_any(spec.allowed_models, spec.default_model):
        yield "spec.defaultModel", f"{shown(spec.default_model)} is not among spec.allowedModels"
    yield from few("spec.allowedOrigins", spec.allowed_origins)
    for index, origin in enumerate(spec.allowed_origins):
        if origin != "*":
            yield from _origin(f"spec.allowedOrigins[{index}]", origin)
    if spec.memory:
        yield from in_range("spec.memory.window", spec.memory.window, 0, 10_000)
        yield from in_range("spec.memory.windowBytes", spec.memory.window_bytes, 0, 8 * 1024 * 1024)
        yield from in_range("spec.memory.retentionDays", spec.memory.retention_days, 1, 3650)
    yield from few("spec.trustedIssuers", spec.trusted_issuers)
    for index, issuer in enumerate(spec.trusted_issuers):
        path = f"spec.trustedIssuers[{index}]"
        yield from absolute_url(f"{path}.issuer", issuer.issuer)
        yield from absolute_url(f"{path}.jwksURL", issuer.jwks_url, query=True)
        yield from keys_url_problems(f"{path}.jwksURL", issuer.jwks_url)
        if not issuer.audience:
            yield f"{path}.audience", "must not be empty: tokens meant for others would be accepted"
        for ours in issuer.claims:
            if ours not in ISSUER_CLAIMS:
                yield f"{path}.claims", f"may name {', '.join(ISSUER_CLAIMS)}, not {shown(ours)}"
    yield from unique("spec.trustedIssuers", "issuer", [issuer.issuer for issuer in spec.trusted_issuers])
    yield from few("spec.signingKeys", spec.signing_keys)
    for index, key in enumerate(spec.signing_keys):
        path = f"spec.signingKeys[{index}]"
        if not _KID.fullmatch(key.kid):
            yield (
                f"{path}.kid",
                f"must be 1 to 128 of A-Z a-z 0-9 _ - . : ~, the first none of the last three, got {shown(key.kid)}",
            )
        if "PRIVATE KEY" in key.public_key:
            yield (
                f"{path}.publicKey",
                "is a private key: give its public half, and replace the key, it has been seen",
            )
        elif len(key.public_key) > TEXT_LENGTH_MAX or not _PUBLIC_PEM.fullmatch(key.public_key):
            yield (
                f"{path}.publicKey",
                'must be a public key in PEM form, beginning "-----BEGIN PUBLIC KEY-----"',
            )
    yield from unique("spec.signingKeys", "kid", [key.kid for key in spec.signing_keys])


def keys_url_problems(path: str, url: str) -> Iterator[Problem]:
    """Who can answer for it decides who may sign: https, or this very machine; never an address of the network."""
    parts = split_url(url)
    if parts is None or not is_host(parts.hostname):
        return  # `absolute_url` says it
    host = str(parts.hostname)
    address = address_of(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return
    if parts.scheme != "https":
        yield path, "must be https, except on loopback"
    if address is not None and not address.is_global:
        yield path, "must not be an address of a private network: give the host's name"


def _origin(path: str, origin: str) -> Iterator[Problem]:
    """Scheme, host and port, nothing behind them; `https://*.` stands for every subdomain."""
    wildcard = origin.startswith("https://*.")
    parts = split_url(origin.replace("https://*.", "https://", 1) if wildcard else origin)
    if (
        parts is None
        or parts.scheme not in ("http", "https")
        or not is_host(parts.hostname)
        or "@" in parts.netloc
        or parts.netloc.lower() != parts.netloc
        or origin.endswith(("/", "?", "#", ":"))
        or parts.path
        or parts.query
        or parts.fragment
    ):
        yield (
            path,
            f'must be an origin such as "https://app.example.com" or "https://*.example.com", got {shown(origin)}',
        )
    elif wildcard and "." not in (parts.hostname or ""):
        yield path, f"{shown(origin)} would allow a whole top-level domain"


# Upstream


def _upstream(spec: UpstreamSpec) -> Iterator[Problem]:
    yield from absolute_url("spec.baseURL", spec.base_url)
    if spec.credentials:
        reference, variable = spec.credentials.secret_key_ref, spec.credentials.env
        if (reference is None) == (variable is None):
            yield "spec.credentials", "must have exactly one of secretKeyRef and env"
        # Who mistakes these for the key itself does not find it in an Event: what was given is not shown.
        if reference:
            for path, _ in dns_name("spec.credentials.secretKeyRef.name", reference.name):
                yield path, "must be the name of a Secret, not the key itself"
            if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", reference.key):
                yield "spec.credentials.secretKeyRef.key", "must be a key of a Secret, not what it holds"
        if variable is not None and not holds_a_key(variable):
            yield (
                "spec.credentials.env",
                (
                    "must be the name of an environment variable such as OPENAI_API_KEY, with KEY or TOKEN in it and"
                    " not BEHEST_ before it"
                ),
            )
    for name, seconds in (
        ("connectSeconds", spec.timeouts.connect_seconds),
        ("firstByteSeconds", spec.timeouts.first_byte_seconds),
        ("idleSeconds", spec.timeouts.idle_seconds),
    ):
        if seconds is not None and not 0 < seconds <= SECONDS_MAX:
            yield f"spec.timeouts.{name}", f"must be more than 0 and at most {SECONDS_MAX}, got {seconds:g}"
    yield from few("spec.models", spec.models)
    for index, model in enumerate(spec.models):
        yield from _model(f"spec.models[{index}]", model)
    yield from unique("spec.models", "name", [model.name for model in spec.models])


def _model(path: str, model: ModelEntry) -> Iterator[Problem]:
    yield from glob(f"{path}.name", model.name)
    yield from model_name(f"{path}.upstreamName", model.upstream_name)
    if model.upstream_name and is_pattern(model.upstream_name):
        yield f"{path}.upstreamName", f"must be one model, not a pattern, got {shown(model.upstream_name)}"
    yield from dns_name(f"{path}.provider", model.provider)
    if model.free and model.prices is not None:
        yield f"{path}.free", "excludes prices: a free model has none"
    if model.prices is not None:
        yield from _prices(f"{path}.prices", model.prices)
    yield from in_range(f"{path}.hiddenTokensPerSecond", model.hidden_tokens_per_second, 1, 100_000)
    yield from in_range(f"{path}.contextLimit", model.context_limit, 1, 100_000_000)
    yield from in_range(f"{path}.outputLimit", model.output_limit, 1, 100_000_000)


def _prices(path: str, prices: Prices) -> Iterator[Problem]:
    for attribute in prices.__struct_fields__:
        price: str | None = getattr(prices, attribute)
        if price is None:
            continue
        if attribute == "request":
            if not _DECIMAL.fullmatch(price):
                must = 'must be a decimal string of USD per request such as "0.01"'
                yield f"{path}.request", f"{must}, got {shown(price)}"
        elif not _RATE.fullmatch(price):
            must = 'must be a decimal string of USD per million tokens such as "0.15", at most 6 decimal places'
            yield f"{path}.{wire_name(attribute)}", f"{must}, got {shown(price)}"


# Tier


def _tier(spec: TierSpec) -> Iterator[Problem]:
    yield from in_range("spec.number", spec.number, 1, TIER_NUMBER_MAX)
    yield from in_range("spec.requestsPerMinute", spec.requests_per_minute, 1, REQUESTS_MAX)
    yield from in_range("spec.requestsPerDay", spec.requests_per_day, 1, REQUESTS_MAX)
    yield from in_range("spec.tokensPerDay", spec.tokens_per_day, 1, TOKENS_MAX)
    yield from in_range("spec.concurrency", spec.concurrency, 1, CONCURRENCY_MAX)
    yield from long_text("spec.systemPrompt", spec.system_prompt)
    yield from few("spec.models", spec.models)
    for asked, used in spec.models.items():
        yield from model_name("spec.models", asked)
        yield from model_name(f"spec.models.{asked}", used)


# Budget


def _budget(budget: Budget) -> Iterator[Problem]:
    spec = budget.spec
    yield from _scope(budget.namespace, spec.scope)
    per = [name for name in spec.per if name != "none"]
    if per and len(per) != len(spec.per):
        yield "spec.per", "none stands alone"
    if len(set(spec.per)) != len(spec.per):
        yield "spec.per", f"names something twice: {', '.join(spec.per)}"
    if spec.scope == BudgetScope() and not per:
        yield (
            "spec.scope",
            "is empty, and so is spec.per: say what the budget binds, for example {project: shop}",
        )
    yield from _limit(spec.limit)
    if spec.window.period == "Lifetime" and spec.window.alignment == "Rolling":
        yield (
            "spec.window.alignment",
            "must be Calendar for the period Lifetime, which neither begins nor ends",
        )
    if not is_zone(spec.window.time_zone):
        yield (
            "spec.window.timeZone",
            f'must be an IANA time zone such as "UTC" or "Europe/Berlin", got {shown(spec.window.time_zone)}',
        )
    thresholds = spec.alert_thresholds
    if len(thresholds) > ALERT_THRESHOLDS_MAX:
        yield (
            "spec.alertThresholds",
            f"has {len(thresholds)} values, at most {ALERT_THRESHOLDS_MAX} are allowed",
        )
    for index, threshold in enumerate(thresholds):
        yield from in_range(f"spec.alertThresholds[{index}]", threshold, 1, 100)
    if any(later <= earlier for earlier, later in itertools.pairwise(thresholds)):
        yield "spec.alertThresholds", f"must ascend without repetition, got {shown(thresholds)}"


def _scope(own_namespace: str, scope: BudgetScope) -> Iterator[Problem]:
    yield from dns_name("spec.scope.tenant", scope.tenant)
    for name in ("namespace", "project", "user", "session", "model", "tier"):
        value: str | None = getattr(scope, name)
        if value is not None:
            yield from glob(f"spec.scope.{name}", value)
    if scope.tenant is None:
        own = f"must be {own_namespace}, the budget's own, unless spec.scope.tenant is given"
        if scope.namespace is not None and scope.namespace != own_namespace:
            yield "spec.scope.namespace", f"{own}, got {shown(scope.namespace)}"
        if scope.project is not None and "/" in scope.project and scope.project.split("/")[0] != own_namespace:
            yield "spec.scope.project", f"its namespace {own}, got {shown(scope.project)}"
    if scope.project is not None and scope.project.count("/") > 1:
        yield "spec.scope.project", f'must be "<name>" or "<namespace>/<name>", got {shown(scope.project)}'
    if scope.workload_selector is not None:
        path = "spec.scope.workloadSelector.matchLabels"
        if not scope.workload_selector.match_labels:
            yield path, "must name at least one label"
        yield from labels_of(path, scope.workload_selector.match_labels)


def _limit(limit: BudgetLimit) -> Iterator[Problem]:
    given = [
        name
        for name, value in (
            ("amount", limit.amount if limit.amount is not None else limit.currency),
            ("tokens", limit.tokens),
            ("requests", limit.requests),
        )
        if value is not None
    ]
    if len(given) != 1:
        got = f"got {' and '.join(given)}" if given else "got none of them"
        yield "spec.limit", f"must be in exactly one unit: amount with currency, tokens, or requests; {got}"
    if limit.amount is not None:
        if not _DECIMAL.fullmatch(limit.amount):
            yield "spec.limit.amount", f"{MONEY_HINT}, got {shown(limit.amount)}"
        elif not limit.amount.strip("0."):
            yield "spec.limit.amount", "must be more than zero; spec.suspended stops everything"
        if limit.currency is None:
            yield "spec.limit.currency", "is required with amount: USD"
    elif limit.currency is not None and given == ["amount"]:
        yield "spec.limit.amount", "is required with currency"
    if limit.token_kind is not None and limit.tokens is None:
        yield "spec.limit.tokenKind", "goes with tokens only"
    yield from in_range("spec.limit.tokens", limit.tokens, 1, TOKENS_MAX)
    yield from in_range("spec.limit.requests", limit.requests, 1, REQUESTS_MAX)
