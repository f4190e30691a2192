"""Every name that telemetry uses: metrics with units, attributes and buckets, attributes of spans.

Those that begin with `gen_ai.` are OpenTelemetry's conventions for generative AI, in the two generations that are in
use: the histogram `gen_ai.client.token.usage`, and the counters `gen_ai.client.inference.usage.*` that follow it.
Buckets are the conventions' own where these have any. `docs/telemetry.md` is made from this module.
"""

from typing import Literal

import msgspec

SCOPE = "behest"
"""The instrumentation scope."""
SERVICE_NAME = "behest"
"""`service.name` of a sidecar or gateway where `OTEL_SERVICE_NAME` says no other; of others it begins so."""
OTHER = "other"
"""Stands for what is beyond a bound."""
VALUES_MAX = 200
"""Different values of one attribute; what comes after is `other`."""
SERIES_MAX = 2000
"""Attribute sets of one metric; what comes after is one set of `other`."""
VALUE_CHARS_MAX = 120

# Attributes. Ours have a prefix: Prometheus gives `namespace` and the like to what it scrapes.
PROJECT = "behest.project"
NAMESPACE = "behest.namespace"
WORKLOAD = "behest.workload"
TEAM = "behest.team"
COST_CENTER = "behest.cost_center"
OUTCOME = "behest.outcome"
REASON = "behest.reason"
OPERATION = "behest.ledger.operation"
TENANT = "behest.tenant"
BUDGET = "behest.budget"
UNIT = "behest.unit"
RESULT = "behest.result"
KIND = "behest.kind"
GEN_AI_OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
TOKEN_TYPE = "gen_ai.token.type"  # noqa: S105 - a kind of token that is no secret
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
ERROR_TYPE = "error.type"

ATTRIBUTES: dict[str, str] = {
    PROJECT: "`<namespace>/<name>` of the Project",
    NAMESPACE: "of the pod that asked, where its sidecar knows it; else the Project's",
    WORKLOAD: "`<namespace>/<name>` of the Deployment, Job or the like that asked; absent: unknown",
    TEAM: "the Project's `spec.attribution.team`",
    COST_CENTER: "the Project's `spec.attribution.costCenter`",
    OUTCOME: "how the request ended, as in the ledger",
    REASON: "why the ledger refused",
    OPERATION: "`admit`, `extend` or `settle`",
    TENANT: "whose Budget it is",
    BUDGET: "`<namespace>/<name>` of the Budget",
    UNIT: "what the Budget counts: `usd`, `tokens` or `requests`",
    RESULT: "what came of it",
    KIND: "the kind of the resource",
    GEN_AI_OPERATION: "`chat`",
    PROVIDER: "the provider, as the conventions call it; an Upstream that no price book knows, by its name",
    REQUEST_MODEL: "the model that was asked for, after defaults and tiers",
    RESPONSE_MODEL: "the model that the provider says it used",
    TOKEN_TYPE: "`input` or `output`",
    SERVER_ADDRESS: "the provider's host",
    SERVER_PORT: "the provider's port",
    ERROR_TYPE: "the outcome of a request that failed; absent where it did not",
}
"""Attributes of metrics: none of a session, a user, a thread or a request."""

# Attributes of spans, beside those above.
CONVERSATION_ID = "gen_ai.conversation.id"
ENDUSER_ID = "enduser.id"
REQUEST_ID = "behest.request_id"
COST_USD = "behest.cost_usd"
SOURCE = "behest.usage_source"
CHUNKS = "behest.chunks"
REQUEST_STREAM = "gen_ai.request.stream"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT = "gen_ai.usage.input_tokens"
USAGE_OUTPUT = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ = "gen_ai.usage.cache_read.input_tokens"
USAGE_CACHE_WRITE = "gen_ai.usage.cache_creation.input_tokens"
USAGE_REASONING = "gen_ai.usage.reasoning.output_tokens"
HTTP_METHOD = "http.request.method"
HTTP_STATUS = "http.response.status_code"
HTTP_ROUTE = "http.route"
URL_SCHEME = "url.scheme"

SPAN_ATTRIBUTES: dict[str, str] = {
    CONVERSATION_ID: "the session",
    ENDUSER_ID: "the user",
    REQUEST_ID: "`X-Request-Id`, also the id in the ledger",
    COST_USD: "what was charged, a decimal as text",
    SOURCE: "who counted: `provider`, `local`, `estimate` or `none`",
    CHUNKS: "chunks that were forwarded",
    REQUEST_STREAM: "whether a stream was asked for",
    FINISH_REASONS: "why the provider stopped, a choice each",
    TIME_TO_FIRST_CHUNK: "seconds from the call to the provider to the first bytes of its answer",
    USAGE_INPUT: "all input tokens, cached ones included",
    USAGE_OUTPUT: "all output tokens, reasoning included",
    USAGE_CACHE_READ: "input tokens that were read from the provider's cache",
    USAGE_CACHE_WRITE: "input tokens that were written into it",
    USAGE_REASONING: "output tokens that were reasoning",
    HTTP_METHOD: "of the request",
    HTTP_STATUS: "of the answer",
    HTTP_ROUTE: "the path, as the API's description has it",
    URL_SCHEME: "`http` or `https`",
}

PROVIDER_NAMES = {
    "aws": "aws.bedrock",
    "azure": "azure.ai.openai",
    "google": "gcp.gen_ai",
    "mistral": "mistral_ai",
    "x-ai": "x_ai",
}
"""The price book's ids where the conventions have another word; others are the same."""

InstrumentKind = Literal["counter", "histogram", "gauge"]
Teller = Literal["sidecar", "keeper", "operator", "webhook"]


class Instrument(msgspec.Struct, frozen=True, kw_only=True):
    """One metric."""

    name: str
    kind: InstrumentKind
    unit: str
    """UCUM, as OpenTelemetry has it; in braces what is counted."""
    description: str
    attributes: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, included."""
    scale: int = 1
    """What is counted is divided by it: money is counted in whole pico-USD and told in USD."""
    teller: Teller = "sidecar"

    @property
    def prometheus_name(self) -> str:
        """Its name in Prometheus, without the suffix of counters: as OpenTelemetry's specification translates it."""
        words = self.name.replace(".", "_")
        unit = _PROMETHEUS_UNITS.get(self.unit, self.unit)
        return words if unit.startswith("{") or not unit else f"{words}_{unit}"

    @property
    def series_name(self) -> str:
        """What a query of Prometheus calls it; a histogram's has `_bucket`, `_sum` or `_count` behind it."""
        return self.prometheus_name + ("_total" if self.kind == "counter" else "")


_PROMETHEUS_UNITS = {"s": "seconds", "1": "ratio"}

ATTRIBUTION = (PROJECT, NAMESPACE, WORKLOAD, TEAM, COST_CENTER)
CALL = (*ATTRIBUTION, GEN_AI_OPERATION, PROVIDER, REQUEST_MODEL, RESPONSE_MODEL, SERVER_ADDRESS, SERVER_PORT)
SPENT = (*ATTRIBUTION, PROVIDER, REQUEST_MODEL)
OF_BUDGET = (TENANT, BUDGET, UNIT)

_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_CHUNK_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_CHUNK_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_OWN_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_CANCEL_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0)
_ROUND_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 200)


def _counter(name: str, unit: str, description: str, attributes: tuple[str, ...], **more: object) -> Instrument:
    return Instrument(name=name, kind="counter", unit=unit, description=description, attributes=attributes, **more)  # type: ignore[arg-type]


def _histogram(
    name: str,
    unit: str,
    description: str,
    attributes: tuple[str, ...],
    bounds: tuple[float, ...],
    teller: Teller = "sidecar",
) -> Instrument:
    return Instrument(
        name=name,
        kind="histogram",
        unit=unit,
        description=description,
        attributes=attributes,
        bounds=bounds,
        teller=teller,
    )


def _gauge(name: str, unit: str, description: str, attributes: tuple[str, ...], teller: Teller) -> Instrument:
    return Instrument(name=name, kind="gauge", unit=unit, description=description, attributes=attributes, teller=teller)


TOKEN_USAGE = _histogram(
    "gen_ai.client.token.usage", "{token}", "Input and output tokens of a request.", (*CALL, TOKEN_TYPE), _TOKENS
)
DURATION = _histogram(
    "gen_ai.client.operation.duration",
    "s",
    "From the call to the provider to its end.",
    (*CALL, ERROR_TYPE),
    _DURATION_S,
)
FIRST_CHUNK = _histogram(
    "gen_ai.client.operation.time_to_first_chunk",
    "s",
    "Of a stream: from the call to the provider to the first bytes of its answer.",
    CALL,
    _FIRST_CHUNK_S,
)
PER_CHUNK = _histogram(
    "gen_ai.client.operation.time_per_output_chunk",
    "s",
    "Of a stream: the mean time between its chunks, once a request. The conventions record each chunk; nothing is"
    " recorded here while a stream runs.",
    CALL,
    _PER_CHUNK_S,
)
INPUT_TOKENS = _counter(
    "gen_ai.client.inference.usage.input_tokens", "{token}", "Input tokens, cached ones included.", CALL
)
OUTPUT_TOKENS = _counter(
    "gen_ai.client.inference.usage.output_tokens", "{token}", "Output tokens, reasoning included.", CALL
)
CACHE_READ_TOKENS = _counter(
    "gen_ai.client.inference.usage.cache_read.input_tokens",
    "{token}",
    "Input tokens read from the provider's cache.",
    CALL,
)
CACHE_WRITE_TOKENS = _counter(
    "gen_ai.client.inference.usage.cache_write.input_tokens",
    "{token}",
    "Input tokens written into the provider's cache.",
    CALL,
)
REASONING_TOKENS = _counter(
    "gen_ai.client.inference.usage.reasoning.output_tokens",
    "{token}",
    "Output tokens that were reasoning.",
    CALL,
)
COST = _counter("behest.cost", "USD", "What was charged.", (*SPENT, OUTCOME), scale=10**12)
OUTCOMES = _counter("behest.stream.outcomes", "{request}", "Requests that ended.", (*SPENT, OUTCOME))
RELEASED = _counter(
    "behest.cancel.released",
    "USD",
    "What was on hold when a client left early, less what was charged: the least that leaving saved.",
    SPENT,
    scale=10**12,
)
REFUSALS = _counter(
    "behest.admission.refusals", "{request}", "Requests that the ledger did not admit.", (*ATTRIBUTION, REASON)
)
OVERRUN = _counter(
    "behest.overrun", "{request}", "Charges beyond what their budget could pay: a provider broke its word.", (PROJECT,)
)
CANCEL_LATENCY = _histogram(
    "behest.cancel.upstream_latency",
    "s",
    "From a client's leaving to the cancel on the provider's connection.",
    (PROVIDER, SERVER_ADDRESS),
    _CANCEL_S,
)
OVERHEAD = _histogram(
    "behest.overhead",
    "s",
    "Time added to the first byte: before the call to the provider, and from its first bytes to the client's.",
    (PROJECT,),
    _OWN_S,
)
ADMISSION_LATENCY = _histogram(
    "behest.ledger.admission_latency", "s", "How long a request waited to be admitted.", (), _OWN_S
)
COMMIT_LATENCY = _histogram(
    "behest.ledger.commit_latency", "s", "One call to the ledger, with its commit.", (OPERATION,), _OWN_S
)
BATCH_SIZE = _histogram("behest.ledger.batch_size", "{item}", "Items in one call to the ledger.", (OPERATION,), _BATCH)
STREAMS_ACTIVE = _gauge(
    "behest.streams.active", "{request}", "Requests that run now.", (PROJECT, REQUEST_MODEL), "sidecar"
)
JOURNAL_LAG = _gauge(
    "behest.ledger.journal_lag", "s", "How long the oldest settlement has waited for the ledger.", (), "sidecar"
)
CONNECTIONS_REFUSED = _counter(
    "behest.connections.refused", "{connection}", "Client connections closed because there were too many.", ()
)
BACKLOG = _gauge("behest.ledger.backlog", "{request}", "Settlements that wait for the ledger.", (), "sidecar")

BUDGET_LIMIT = _gauge(
    "behest.budget.limit",
    "{unit}",
    "What may be spent: the limits of a Budget's current windows, one for each of its subjects, together.",
    OF_BUDGET,
    "keeper",
)
BUDGET_SPENT = _gauge("behest.budget.spent", "{unit}", "Spent in its current windows.", OF_BUDGET, "keeper")
BUDGET_HELD = _gauge(
    "behest.budget.held", "{unit}", "On hold in them, for requests that run or wait for their journal.",
    OF_BUDGET, "keeper",
)  # fmt: skip
BUDGET_REMAINING = _gauge(
    "behest.budget.remaining",
    "{unit}",
    "Left in them: limit less spent and held. Of a soft budget it may be below zero.",
    OF_BUDGET,
    "keeper",
)
BUDGET_EXHAUSTED = _gauge(
    "behest.budget.exhausted", "{subject}", "Its subjects that can pay no other request.", OF_BUDGET, "keeper"
)
BUDGET_PERIOD = _gauge(
    "behest.budget.period", "s", "How long its window is; absent where it never ends.", OF_BUDGET, "keeper"
)
BUDGET_RESETS = _gauge(
    "behest.budget.resets_at",
    "s",
    "When its current windows end, as Unix time; absent where none does, or each at a time of its own.",
    OF_BUDGET,
    "keeper",
)
BUDGETS_UNTOLD = _gauge(
    "behest.budget.untold", "{budget}", "Budgets beyond the 2,000 that are told of.", (), "keeper"
)  # fmt: skip
SEAL_LAG = _gauge(
    "behest.ledger.seal_lag",
    "s",
    "How old the oldest is of what may be under no seal yet. Where all is well, about a minute at most.",
    (),
    "keeper",
)
HOLDERS = _gauge("behest.ledger.holders", "{process}", "Sidecars that the ledger believes.", (), "keeper")
SUSPENSE = _gauge(
    "behest.ledger.suspense", "{request}", "Requests of lost sidecars that wait for their journal.", (), "keeper"
)
SUSPENSE_AGE = _gauge(
    "behest.ledger.suspense_age", "s", "How long the first of them has waited; 0: there is none.", (), "keeper"
)
KEEPER_ROUNDS = _counter(
    "behest.keeper.rounds", "{round}",
    "The keeper's rounds: `worked`, `stood_by` (another one works) or `failed` (a step, or all of it).",
    (RESULT,), teller="keeper",
)  # fmt: skip
KEEPER_DURATION = _histogram(
    "behest.keeper.duration", "s", "A round that worked.", (), _ROUND_S, "keeper"
)  # fmt: skip
REAPED = _counter(
    "behest.keeper.reaped", "{process}", "Sidecars that were found dead and shut out.", (), teller="keeper"
)
SUSPENDED = _counter(
    "behest.keeper.suspended", "{request}", "Requests of theirs that went to suspense.", (), teller="keeper"
)
POLICY_CHARGES = _counter(
    "behest.keeper.policy_charges", "{request}", "Requests that no journal settled in time: charged by policy.", (),
    teller="keeper",
)  # fmt: skip
POLICY_COST = _counter(
    "behest.keeper.policy_cost", "USD", "What those were charged.", (), scale=10**12, teller="keeper"
)
SEALED_ROWS = _counter("behest.keeper.sealed", "{row}", "Rows that were sealed.", (), teller="keeper")
RECONCILES = _counter(
    "behest.operator.reconciles",
    "{call}",
    "Resources carried into the ledger: `accepted`, `refused`, `removed`, or `failed` and to be tried again.",
    (KIND, RESULT),
    teller="operator",
)
RECONCILE_DURATION = _histogram(
    "behest.operator.reconcile_duration", "s", "One of them.", (KIND,), _OWN_S, "operator"
)  # fmt: skip
REVIEWS = _counter(
    "behest.webhook.reviews",
    "{review}",
    "Pods that were looked at: `injected`, `left` as they are, `refused`; or `invalid`, what was no review of a pod.",
    (RESULT,),
    teller="webhook",
)
REVIEW_DURATION = _histogram(
    "behest.webhook.duration", "s", "A review, from its first byte to the answer.", (), _OWN_S, "webhook"
)  # fmt: skip
CERTIFICATE_EXPIRY = _gauge(
    "behest.webhook.certificate_expires_at",
    "s",
    "Until when the certificate that it serves is good, as Unix time.",
    (),
    "webhook",
)

INSTRUMENTS: tuple[Instrument, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Instrument)
)
"""All of them, in this module's order."""
