"""Manifests to try things on: valid ones, and for each rule one that breaks it, with the sentence its author sees."""

from typing import Any

# The examples of the documentation: they must stay valid as they are written.
EXAMPLES = """
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {name: shop, namespace: demo}
spec:
  tenant: acme
  defaultModel: gpt-4o-mini
  allowedModels: ["gpt-4o-mini", "gpt-4o*"]
  allowedOrigins: ["http://localhost:5173", "https://*.example.com", "https://app.example.com:8443"]
  defaultTier: free
  apiKeySecretName: shop-behest-key
---
apiVersion: behest.ai/v1alpha1
kind: Upstream
metadata: {name: openai, namespace: demo}
spec:
  baseURL: https://api.openai.com/v1
  credentials: {secretKeyRef: {name: openai, key: api-key}}    # outside a cluster: {env: OPENAI_API_KEY}
  protocol: Auto                                               # Auto | HTTP1 | HTTP2
  models:
    - name: gpt-4o-mini
      prices: {input: "0.15", cacheRead: "0.075", output: "0.60"}
---
apiVersion: behest.ai/v1alpha1
kind: Tier
metadata: {name: free, namespace: demo}
spec: {number: 1, requestsPerMinute: 10, requestsPerDay: 100, tokensPerDay: 50000}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: shop-sessions, namespace: demo}
spec:
  scope: {project: shop}
  per: [session]
  limit: {amount: "0.50", currency: USD}
  window: {period: Day, timeZone: UTC}
  enforcement: Hard
  alertThresholds: [50, 80, 100]
"""


def manifest(kind: str, spec: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "behest.ai/v1alpha1",
        "kind": kind,
        "metadata": {"name": "it", "namespace": "demo"},
        "spec": spec,
        **more,
    }


def budget(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "scope": {"project": "shop"},
        "per": ["session"],
        "limit": {"amount": "0.50", "currency": "USD"},
        "window": {"period": "Day"},
    }
    spec.update(changes)
    return manifest("Budget", {name: value for name, value in spec.items() if value is not ...})


def upstream(**changes: Any) -> dict[str, Any]:
    return manifest("Upstream", {"baseURL": "https://api.openai.com/v1", **changes})


def model(**changes: Any) -> dict[str, Any]:
    return upstream(models=[{"name": "m", **changes}])


def project(**changes: Any) -> dict[str, Any]:
    return manifest("Project", changes)


def tier(**changes: Any) -> dict[str, Any]:
    return manifest("Tier", {"number": 1, **changes})


PEM = "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A\n-----END PUBLIC KEY-----\n"

# What is wrong with it, and the whole sentence that its author sees.
INVALID: list[tuple[dict[str, Any], str]] = [
    (
        budget(limit={"amount": -1, "currency": "USD"}),
        'Budget demo/it: spec.limit.amount: must be a decimal string such as "5.00", got -1',
    ),
    (
        budget(limit={"amount": 5.0, "currency": "USD"}),
        'Budget demo/it: spec.limit.amount: must be a decimal string such as "5.00", got 5.0',
    ),
    (
        budget(limit={"amount": "-1", "currency": "USD"}),
        'Budget demo/it: spec.limit.amount: must be a decimal string such as "5.00", got "-1"',
    ),
    (
        budget(limit={"amount": "1e3", "currency": "USD"}),
        'Budget demo/it: spec.limit.amount: must be a decimal string such as "5.00", got "1e3"',
    ),
    (
        budget(limit={"amount": "0.00", "currency": "USD"}),
        "Budget demo/it: spec.limit.amount: must be more than zero; spec.suspended stops everything",
    ),
    (budget(limit={"amount": "1"}), "Budget demo/it: spec.limit.currency: is required with amount: USD"),
    (budget(limit={"currency": "USD"}), "Budget demo/it: spec.limit.amount: is required with currency"),
    (
        budget(limit={"amount": "1", "currency": "EUR"}),
        'Budget demo/it: spec.limit.currency: must be USD, got "EUR"',
    ),
    (
        budget(limit={}),
        (
            "Budget demo/it: spec.limit: must be in exactly one unit: amount with currency, tokens, or requests;"
            " got none of them"
        ),
    ),
    (
        budget(limit={"tokens": 5, "requests": 5}),
        (
            "Budget demo/it: spec.limit: must be in exactly one unit: amount with currency, tokens, or requests;"
            " got tokens and requests"
        ),
    ),
    (budget(limit={"tokens": 0}), "Budget demo/it: spec.limit.tokens: must be from 1 to 1000000000000000, got 0"),
    (budget(limit={"tokens": "5"}), 'Budget demo/it: spec.limit.tokens: must be a whole number, got "5"'),
    (budget(limit={"tokens": True}), "Budget demo/it: spec.limit.tokens: must be a whole number, got True"),
    (budget(limit={"requests": 1, "tokenKind": "Both"}), "Budget demo/it: spec.limit.tokenKind: goes with tokens only"),
    (
        budget(limit={"tokens": 1, "tokenKind": "Reasoning"}),
        'Budget demo/it: spec.limit.tokenKind: must be Both, Input or Output, got "Reasoning"',
    ),
    (budget(limit=...), "Budget demo/it: spec.limit: is required"),
    (budget(window=...), "Budget demo/it: spec.window: is required"),
    (budget(window={}), "Budget demo/it: spec.window.period: is required"),
    (
        budget(window={"period": "Fortnight"}),
        'Budget demo/it: spec.window.period: must be Day, Hour, Lifetime, Minute, Month or Week, got "Fortnight"',
    ),
    (
        budget(window={"period": "Lifetime", "alignment": "Rolling"}),
        (
            "Budget demo/it: spec.window.alignment: must be Calendar for the period Lifetime,"
            " which neither begins nor ends"
        ),
    ),
    (
        budget(window={"period": "Day", "timeZone": "Mars/Olympus"}),
        (
            'Budget demo/it: spec.window.timeZone: must be an IANA time zone such as "UTC" or "Europe/Berlin",'
            ' got "Mars/Olympus"'
        ),
    ),
    (
        budget(window={"period": "Day", "timeZone": "../../etc/passwd"}),
        (
            'Budget demo/it: spec.window.timeZone: must be an IANA time zone such as "UTC" or "Europe/Berlin",'
            ' got "../../etc/passwd"'
        ),
    ),
    # To PostgreSQL it is an offset that knows no summer.
    (
        budget(window={"period": "Day", "timeZone": "CET"}),
        ('Budget demo/it: spec.window.timeZone: must be an IANA time zone such as "UTC" or "Europe/Berlin", got "CET"'),
    ),
    (budget(alertThresholds=[0]), "Budget demo/it: spec.alertThresholds[0]: must be from 1 to 100, got 0"),
    (
        budget(alertThresholds=[80, 50]),
        "Budget demo/it: spec.alertThresholds: must ascend without repetition, got [80, 50]",
    ),
    (
        budget(alertThresholds=list(range(1, 12))),
        "Budget demo/it: spec.alertThresholds: has 11 values, at most 10 are allowed",
    ),
    (budget(alertThresholds=[50, "80"]), 'Budget demo/it: spec.alertThresholds[1]: must be a whole number, got "80"'),
    (
        budget(scope={}, per=[]),
        (
            "Budget demo/it: spec.scope: is empty, and so is spec.per: say what the budget binds,"
            " for example {project: shop}"
        ),
    ),
    (budget(per=["session", "session"]), "Budget demo/it: spec.per: names something twice: session, session"),
    (budget(per=["none", "session"]), "Budget demo/it: spec.per: none stands alone"),
    (
        budget(per=["pod"]),
        (
            "Budget demo/it: spec.per[0]: must be model, namespace, none, project, session, tier, user or workload,"
            ' got "pod"'
        ),
    ),
    (
        budget(scope={"namespace": "other"}),
        (
            "Budget demo/it: spec.scope.namespace: must be demo, the budget's own, unless spec.scope.tenant is given,"
            ' got "other"'
        ),
    ),
    (
        budget(scope={"project": "other/shop"}),
        (
            "Budget demo/it: spec.scope.project: its namespace must be demo, the budget's own,"
            ' unless spec.scope.tenant is given, got "other/shop"'
        ),
    ),
    (
        budget(scope={"workloadSelector": {"matchLabels": {}}}),
        "Budget demo/it: spec.scope.workloadSelector.matchLabels: must name at least one label",
    ),
    (
        budget(scope={"projects": "shop"}),
        'Budget demo/it: spec.scope: has no member "projects"; did you mean project?',
    ),
    (
        budget(scope={"user": "*a" * 9}),
        f'Budget demo/it: spec.scope.user: must have at most 8 stars, got "{"*a" * 9}"',
    ),
    (budget(enforcement="hard"), 'Budget demo/it: spec.enforcement: must be Hard or Soft, got "hard"'),
    (budget(suspended="yes"), 'Budget demo/it: spec.suspended: must be true or false, got "yes"'),
    (budget(limits={}), 'Budget demo/it: spec: has no member "limits"; did you mean limit?'),
    (
        upstream(baseURL="api.openai.com"),
        (
            "Upstream demo/it: spec.baseURL: must be an absolute http or https URL such as"
            ' "https://api.openai.com/v1", got "api.openai.com"'
        ),
    ),
    (
        upstream(baseURL="ftp://files.example.com"),
        (
            "Upstream demo/it: spec.baseURL: must be an absolute http or https URL such as"
            ' "https://api.openai.com/v1", got "ftp://files.example.com"'
        ),
    ),
    (
        upstream(baseURL="https://user:secret@api.example.com"),
        "Upstream demo/it: spec.baseURL: must not contain credentials: use spec.credentials",
    ),
    (
        upstream(baseURL="https://api.example.com/v1?key=1"),
        "Upstream demo/it: spec.baseURL: must have no query and no fragment",
    ),
    (
        upstream(baseURL="https://api.example.com:99999"),
        (
            "Upstream demo/it: spec.baseURL: must be an absolute http or https URL such as"
            ' "https://api.openai.com/v1", got "https://api.example.com:99999"'
        ),
    ),
    (upstream(credentials={}), "Upstream demo/it: spec.credentials: must have exactly one of secretKeyRef and env"),
    (
        upstream(credentials={"env": "sk-12345"}),
        (
            "Upstream demo/it: spec.credentials.env: must be the name of an environment variable such as"
            " OPENAI_API_KEY, with KEY or TOKEN in it and not BEHEST_ before it"
        ),
    ),
    (
        upstream(baseURL="https://user:sec/ret@api.example.com"),
        ('Upstream demo/it: spec.baseURL: must be an absolute http or https URL such as "https://api.openai.com/v1"'),
    ),
    (
        upstream(credentials={"secretKeyRef": {"name": "sk-12345-ABC", "key": "api-key"}}),
        "Upstream demo/it: spec.credentials.secretKeyRef.name: must be the name of a Secret, not the key itself",
    ),
    (
        upstream(credentials={"secretKeyRef": {"name": "openai", "key": "sk 12345"}}),
        "Upstream demo/it: spec.credentials.secretKeyRef.key: must be a key of a Secret, not what it holds",
    ),
    (
        upstream(credentials={"env": "BEHEST_DATABASE_URL"}),
        (
            "Upstream demo/it: spec.credentials.env: must be the name of an environment variable such as"
            " OPENAI_API_KEY, with KEY or TOKEN in it and not BEHEST_ before it"
        ),
    ),
    (
        upstream(credentials={"env": "BEHEST_MASTER_KEY_FILE"}),
        (
            "Upstream demo/it: spec.credentials.env: must be the name of an environment variable such as"
            " OPENAI_API_KEY, with KEY or TOKEN in it and not BEHEST_ before it"
        ),
    ),
    (
        upstream(credentials={"env": "PGPASSWORD"}),
        (
            "Upstream demo/it: spec.credentials.env: must be the name of an environment variable such as"
            " OPENAI_API_KEY, with KEY or TOKEN in it and not BEHEST_ before it"
        ),
    ),
    (
        upstream(credentials={"secretKeyRef": {"name": "openai"}}),
        "Upstream demo/it: spec.credentials.secretKeyRef.key: is required",
    ),
    (upstream(protocol="HTTP3"), 'Upstream demo/it: spec.protocol: must be Auto, HTTP1 or HTTP2, got "HTTP3"'),
    (
        upstream(timeouts={"idleSeconds": 0}),
        "Upstream demo/it: spec.timeouts.idleSeconds: must be more than 0 and at most 3600, got 0",
    ),
    (
        upstream(capabilities={"continuation": "Retry"}),
        (
            "Upstream demo/it: spec.capabilities.continuation: must be ContinueFinalMessage, None, Prefix or Prompt,"
            ' got "Retry"'
        ),
    ),
    (
        upstream(models=[{"name": "m"}, {"name": "m"}]),
        'Upstream demo/it: spec.models[1].name: "m" is there twice, first in spec.models[0]',
    ),
    (model(prices={"input": "1"}), "Upstream demo/it: spec.models[0].prices.output: is required"),
    (
        model(prices={"input": 0.15, "output": "1"}),
        'Upstream demo/it: spec.models[0].prices.input: must be a decimal string such as "5.00", got 0.15',
    ),
    (
        model(prices={"input": "1", "output": "1", "cacheRead": "0.0000001"}),
        (
            "Upstream demo/it: spec.models[0].prices.cacheRead: must be a decimal string of USD per million tokens such"
            ' as "0.15", at most 6 decimal places, got "0.0000001"'
        ),
    ),
    (
        model(prices={"input": "1", "output": "1"}, free=True),
        "Upstream demo/it: spec.models[0].free: excludes prices: a free model has none",
    ),
    (
        model(hiddenTokensPerSecond=0),
        "Upstream demo/it: spec.models[0].hiddenTokensPerSecond: must be from 1 to 100000, got 0",
    ),
    (tier(number=0), "Tier demo/it: spec.number: must be from 1 to 1000, got 0"),
    (
        tier(requestsPerMinute=-1),
        "Tier demo/it: spec.requestsPerMinute: must be from 1 to 1000000000000, got -1",
    ),
    (tier(tokensPerDay=1.5), "Tier demo/it: spec.tokensPerDay: must be a whole number, got 1.5"),
    (tier(models={"gpt-4o": 4}), "Tier demo/it: spec.models: must be a string, got 4: write it in quotes"),
    (
        project(defaultModel="o4-mini", allowedModels=["gpt-*"]),
        'Project demo/it: spec.defaultModel: "o4-mini" is not among spec.allowedModels',
    ),
    (
        project(allowedOrigins=["https://app.example.com/"]),
        (
            'Project demo/it: spec.allowedOrigins[0]: must be an origin such as "https://app.example.com" or'
            ' "https://*.example.com", got "https://app.example.com/"'
        ),
    ),
    (
        project(allowedOrigins=["https://*.com"]),
        'Project demo/it: spec.allowedOrigins[0]: "https://*.com" would allow a whole top-level domain',
    ),
    (
        project(allowedOrigins=["null"]),
        (
            'Project demo/it: spec.allowedOrigins[0]: must be an origin such as "https://app.example.com" or'
            ' "https://*.example.com", got "null"'
        ),
    ),
    (
        project(signingKeys=[{"kid": "a", "publicKey": PEM.replace("PUBLIC", "PRIVATE")}]),
        (
            "Project demo/it: spec.signingKeys[0].publicKey: is a private key: give its public half, and replace"
            " the key, it has been seen"
        ),
    ),
    (
        project(signingKeys=[{"kid": "a", "publicKey": PEM}, {"kid": "a", "publicKey": PEM}]),
        'Project demo/it: spec.signingKeys[1].kid: "a" is there twice, first in spec.signingKeys[0]',
    ),
    (
        project(trustedIssuers=[{"issuer": "https://a.example", "jwksURL": "https://a.example/k", "audience": ""}]),
        (
            "Project demo/it: spec.trustedIssuers[0].audience: must not be empty: tokens meant for others would be"
            " accepted"
        ),
    ),
    (project(memory={"window": -1}), "Project demo/it: spec.memory.window: must be from 0 to 10000, got -1"),
    (project(tenant=None, slug=7), "Project demo/it: spec.slug: must be a string, got 7: write it in quotes"),
    (
        project() | {"metadata": {"name": "Shop", "namespace": "demo"}},
        "Project demo/Shop: metadata.name: must be lower-case letters, digits, '-' and '.', got \"Shop\"",
    ),
    (
        project() | {"metadata": {"namespace": "demo"}},
        "Project: metadata.name: is required",
    ),
    (
        project() | {"metadata": {"name": "it", "namespace": "demo", "labels": {"a": 1}}},
        "Project demo/it: metadata.labels: must be a string, got 1: write it in quotes",
    ),
    (
        project() | {"apiVersion": "behest.ai/v1"},
        'Project demo/it: apiVersion: must be behest.ai/v1alpha1, got "behest.ai/v1"',
    ),
    (
        project() | {"kind": "Secret"},
        'Secret demo/it: kind: must be Project, Upstream, Tier or Budget, got "Secret"',
    ),
    (
        project() | {"spec": None},
        "Project demo/it: spec: must be a mapping, got None",
    ),
    (
        project() | {"data": {}},
        'Project demo/it: has no member "data"; there are apiVersion, kind, metadata and spec',
    ),
]

VALID: list[dict[str, Any]] = [
    budget(),
    budget(limit={"tokens": 1000, "tokenKind": "Output"}),
    budget(limit={"requests": 10}, window={"period": "Minute", "alignment": "Rolling"}),
    budget(window={"period": "Month", "timeZone": "America/Argentina/Buenos_Aires"}, enforcement="Soft"),
    budget(scope={"tenant": "acme", "model": "gpt-4o*", "user": "a?b*"}, per=["none"], alertThresholds=[1, 50, 100]),
    budget(scope={}, per=["project", "workload"], suspended=True),
    budget(scope={"workloadSelector": {"matchLabels": {"app": "web", "example.com/part-of": ""}}}),
    upstream(),
    upstream(protocol="HTTP2", timeouts={"connectSeconds": 0.5, "idleSeconds": 3600}, credentials={"env": "KEY_1"}),
    upstream(credentials={"secretKeyRef": {"name": "openai", "key": "api-key"}}, byok=True),
    upstream(baseURL="http://vllm.internal:8000/v1", capabilities={"streams": False, "continuation": "None"}),
    model(prices={"input": "0.000001", "output": "999999999", "request": "0.000000000001"}),
    model(free=True, visibleOnly=False, contextLimit=1, outputLimit=100_000_000, hiddenTokensPerSecond=1),
    project(),
    project(
        tenant="acme",
        attribution={"team": "Zoë & co", "costCenter": "42"},
        allowedOrigins=["*", "https://*.example.com", "http://localhost:5173", "https://[::1]:8443"],
        memory={"window": 0, "retentionDays": 1},
        systemPrompt="Be brief.\nBe kind.",
        signingKeys=[{"kid": "a", "publicKey": PEM}],
        trustedIssuers=[
            {"issuer": "https://id.example.com", "jwksURL": "https://id.example.com/jwks?v=1", "audience": "x"}
        ],
    ),
    tier(),
    tier(requestsPerMinute=1, requestsPerDay=10**12, tokensPerDay=1, concurrency=100_000, models={"default": "gpt-4o"}),
]
