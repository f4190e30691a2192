"""The four CustomResourceDefinitions, made from the types that `behest apply` reads.

Which members exist, their types, defaults and meanings come from `behest_ledger.configuration.kinds`; what types cannot
say is added here: bounds and patterns by path, and rules in CEL that repeat `behest_ledger.configuration.validation`.
Rules that need other resources, patterns or time zones are not repeated: the operator checks them with the same code
and says so in the condition `Accepted`.

Every list and string that a rule touches is bounded: the API server estimates what a rule costs before it takes it.
"""

import inspect
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from behest_ledger.configuration import kinds
from behest_ledger.configuration.globs import PATTERN_LENGTH_MAX
from behest_ledger.configuration.problems import MONEY_HINT
from behest_ledger.configuration.rules import LABELS_MAX, LIST_LENGTH_MAX, NAME_LENGTH_MAX, TEXT_LENGTH_MAX
from behest_ledger.configuration.validation import (
    ALERT_THRESHOLDS_MAX,
    CONCURRENCY_MAX,
    REQUESTS_MAX,
    SECONDS_MAX,
    TIER_NUMBER_MAX,
    TOKENS_MAX,
)

GROUP = "behest.ai"
VERSION = "v1alpha1"

Schema = dict[str, Any]

_DNS_PART = "[a-z0-9]([-_a-z0-9]*[a-z0-9])?"
_DNS_NAME: Schema = {"pattern": rf"^{_DNS_PART}(\.{_DNS_PART})*$", "maxLength": NAME_LENGTH_MAX}
_GLOB: Schema = {"minLength": 1, "maxLength": PATTERN_LENGTH_MAX}
_MODEL: Schema = {"pattern": r"^[!-~]+$", "maxLength": PATTERN_LENGTH_MAX}
_SHORT_TEXT: Schema = {"pattern": r"\S", "maxLength": 128}
_LONG_TEXT: Schema = {"maxLength": TEXT_LENGTH_MAX}
_URL: Schema = {"pattern": r"^https?://[^\s/?#@\\]+(/[^\s?#\\]*)?$", "maxLength": 2048}
_RATE: Schema = {"pattern": r"^[0-9]{1,9}(\.[0-9]{1,6})?$", "maxLength": 16}
_DECIMAL: Schema = {"pattern": r"^[0-9]{1,12}(\.[0-9]{1,12})?$", "maxLength": 25}
_SECONDS: Schema = {"minimum": 0, "exclusiveMinimum": True, "maximum": SECONDS_MAX}
_LABEL: Schema = {"maxLength": 63}


def _between(least: int, most: int) -> Schema:
    return {"minimum": least, "maximum": most}


def _keyed_by(member: str) -> Schema:
    """A list in which no value of a member is there twice."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [member]}


def _rules(*rules: tuple[str, str]) -> Schema:
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


_ANY_SCOPE = " || ".join(f"has(self.scope.{field.encode_name})" for field in msgspec.structs.fields(kinds.BudgetScope))

# What types cannot say, by "<Kind>.<path in its spec>"; "[]" stands for the items of a list, "{}" for a map's values.
_MORE: dict[str, Schema] = {
    "Project.tenant": _DNS_NAME,
    "Project.slug": _DNS_NAME,
    "Project.defaultTier": _DNS_NAME,
    "Project.apiKeySecretName": _DNS_NAME,
    "Project.systemPrompt": _LONG_TEXT,
    "Project.attribution.team": _SHORT_TEXT,
    "Project.attribution.costCenter": _SHORT_TEXT,
    "Project.defaultModel": _MODEL,
    "Project.allowedModels[]": _GLOB,
    "Project.allowedOrigins[]": {
        "pattern": r"^(\*|http://[^\s/?#@*]+|https://(\*\.)?[^\s/?#@*]+)$",
        "maxLength": 300,
    },
    "Project.memory.window": _between(0, 10_000),
    "Project.memory.windowBytes": _between(0, 8 * 1024 * 1024),
    "Project.memory.retentionDays": _between(1, 3650),
    "Project.trustedIssuers": _keyed_by("issuer"),
    "Project.trustedIssuers[].issuer": _URL,
    "Project.trustedIssuers[].jwksURL": {"pattern": r"^https?://[^\s/?#@\\]+(/[^\s#\\]*)?$", "maxLength": 2048},
    "Project.trustedIssuers[].audience": {"minLength": 1, "maxLength": 2048},
    "Project.signingKeys": _keyed_by("kid"),
    "Project.signingKeys[].kid": {"pattern": "^[A-Za-z0-9_-][A-Za-z0-9_.:~-]*$", "maxLength": 128},
    "Project.signingKeys[].publicKey": {
        "pattern": r"^\s*-----BEGIN (RSA )?PUBLIC KEY-----[A-Za-z0-9+/=\s]+-----END (RSA )?PUBLIC KEY-----\s*$",
        "maxLength": TEXT_LENGTH_MAX,
    },
    "Upstream.baseURL": _URL,
    "Upstream.credentials": _rules(
        ("has(self.secretKeyRef) != has(self.env)", "must have exactly one of secretKeyRef and env")
    ),
    "Upstream.credentials.env": {
        "pattern": "^[A-Za-z_][A-Za-z0-9_]*$",
        "maxLength": 128,
        **_rules(
            ("self.contains('KEY') || self.contains('TOKEN')", "must have KEY or TOKEN in it, such as OPENAI_API_KEY"),
            ("!self.startsWith('BEHEST_')", "must not begin with BEHEST_: those are Behest's own settings"),
        ),
    },
    "Upstream.credentials.secretKeyRef.name": _DNS_NAME,
    "Upstream.credentials.secretKeyRef.key": {"pattern": "^[-._a-zA-Z0-9]+$", "maxLength": 253},
    "Upstream.timeouts.connectSeconds": _SECONDS,
    "Upstream.timeouts.firstByteSeconds": _SECONDS,
    "Upstream.timeouts.idleSeconds": _SECONDS,
    "Upstream.models": _keyed_by("name"),
    "Upstream.models[]": _rules(
        ("!(has(self.prices) && has(self.free) && self.free)", "free excludes prices: a free model has none")
    ),
    "Upstream.models[].name": _GLOB,
    "Upstream.models[].upstreamName": {"pattern": r"^[!-)+->@-~]+$", "maxLength": PATTERN_LENGTH_MAX},
    "Upstream.models[].provider": _DNS_NAME,
    "Upstream.models[].hiddenTokensPerSecond": _between(1, 100_000),
    "Upstream.models[].contextLimit": _between(1, 100_000_000),
    "Upstream.models[].outputLimit": _between(1, 100_000_000),
    "Upstream.models[].prices.input": _RATE,
    "Upstream.models[].prices.output": _RATE,
    "Upstream.models[].prices.cacheRead": _RATE,
    "Upstream.models[].prices.cacheWrite": _RATE,
    "Upstream.models[].prices.reasoning": _RATE,
    "Upstream.models[].prices.audioInput": _RATE,
    "Upstream.models[].prices.audioOutput": _RATE,
    "Upstream.models[].prices.request": _DECIMAL,
    "Tier.number": _between(1, TIER_NUMBER_MAX),
    "Tier.requestsPerMinute": _between(1, REQUESTS_MAX),
    "Tier.requestsPerDay": _between(1, REQUESTS_MAX),
    "Tier.tokensPerDay": _between(1, TOKENS_MAX),
    "Tier.concurrency": _between(1, CONCURRENCY_MAX),
    "Tier.systemPrompt": _LONG_TEXT,
    "Tier.models{}": _MODEL,
    "Budget": _rules(
        (
            "size(self.per) > 0 && !('none' in self.per) || " + _ANY_SCOPE,
            "spec.scope is empty, and so is spec.per: say what the budget binds, for example {project: shop}",
        ),
    ),
    "Budget.scope.tenant": _DNS_NAME,
    "Budget.scope.namespace": _GLOB,
    "Budget.scope.project": _GLOB,
    "Budget.scope.user": _GLOB,
    "Budget.scope.session": _GLOB,
    "Budget.scope.model": _GLOB,
    "Budget.scope.tier": _GLOB,
    "Budget.scope.workloadSelector.matchLabels": {"minProperties": 1},
    "Budget.scope.workloadSelector.matchLabels{}": _LABEL,
    "Budget.per": {
        "maxItems": 8,
        "x-kubernetes-list-type": "set",
        **_rules(("!('none' in self) || size(self) == 1", "none stands alone")),
    },
    "Budget.limit": _rules(
        (
            "[has(self.amount) || has(self.currency), has(self.tokens), has(self.requests)].filter(it, it).size() == 1",
            "must be in exactly one unit: amount with currency, tokens, or requests",
        ),
        ("!has(self.amount) || has(self.currency)", "currency is required with amount: USD"),
        ("!has(self.currency) || has(self.amount)", "amount is required with currency"),
        ("!has(self.tokenKind) || has(self.tokens)", "tokenKind goes with tokens only"),
        (
            " && ".join(f"has(self.{name}) == has(oldSelf.{name})" for name in ("amount", "tokens", "requests")),
            "the unit is immutable: make a new Budget",
        ),
    ),
    "Budget.limit.amount": {
        "pattern": r"^[0-9]{1,12}(\.[0-9]{1,12})?$",
        "maxLength": 25,
        **_rules(
            ("self.matches('^[0-9]{1,12}([.][0-9]{1,12})?$')", MONEY_HINT),
            ("self.matches('[1-9]')", "must be more than zero; spec.suspended stops everything"),
        ),
    },
    "Budget.limit.tokens": _between(1, TOKENS_MAX),
    "Budget.limit.requests": _between(1, REQUESTS_MAX),
    "Budget.window": _rules(
        (
            "!(self.period == 'Lifetime' && self.alignment == 'Rolling')",
            "alignment must be Calendar for the period Lifetime, which neither begins nor ends",
        ),
        (
            "self.period == oldSelf.period && self.alignment == oldSelf.alignment && self.timeZone == oldSelf.timeZone",
            "period, alignment and timeZone are immutable: make a new Budget",
        ),
    ),
    "Budget.window.timeZone": {"pattern": r"^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}$", "maxLength": 64},
    "Budget.alertThresholds": {
        "maxItems": ALERT_THRESHOLDS_MAX,
        **_rules(
            (
                "self.all(i, i >= 1 && i <= 100) && self.all(i, self.filter(j, j == i).size() == 1) && self.isSorted()",
                "must be percents from 1 to 100 that ascend without repetition",
            )
        ),
    },
}

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "format": "int64"}
_CONDITIONS: Schema = {
    "type": "array",
    "description": "What the operator found, as Kubernetes' API conventions have it.",
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["type"],
    "items": {
        "type": "object",
        "required": ["type", "status", "lastTransitionTime", "reason", "message"],
        "properties": {
            "type": {"type": "string", "maxLength": 316},
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "reason": {"type": "string", "minLength": 1, "maxLength": 1024},
            "message": {"type": "string", "maxLength": 32768},
            "lastTransitionTime": {"type": "string", "format": "date-time"},
            "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
        },
    },
}
_STATUS: dict[str, dict[str, Schema]] = {
    "Project": {
        "projectID": {"type": "string", "description": "How the ledger calls it: <namespace>/<name>."},
        "tenant": {"type": "string", "description": "The tenant that it belongs to."},
        "apiKey": {
            "type": "object",
            "description": "The Secret that holds the project's API key.",
            "properties": {"secretName": _TEXT, "key": _TEXT},
        },
    },
    "Upstream": {
        "pricedModels": {**_COUNT, "description": "Listed models that have a price or are free."},
        "priceVersion": {"type": "string", "description": "The version of the price book that prices the others."},
    },
    "Tier": {},
    "Budget": {
        "phase": {"type": "string", "enum": ["Active", "Warning", "Exhausted", "Suspended", "Pending"]},
        "scope": {"type": "string", "description": "The scope in one line."},
        "limit": {"type": "string", "description": "The limit with its unit."},
        "spent": {"type": "string", "description": "Over all current windows, in the limit's unit."},
        "held": {"type": "string", "description": "Reserved for requests that run, and for those of lost sidecars."},
        "remaining": {"type": "string", "description": "Of the fullest subject; of the budget itself without `per`."},
        "windowEndsAt": {"type": "string", "format": "date-time"},
        "alertedAt": {
            "type": "string",
            "format": "date-time",
            "description": "Thresholds that were reached until then were told as Events.",
        },
        "overrun": {"type": "string", "description": "Charged beyond what the budget could pay."},
        "subjects": {
            "type": "object",
            "description": "How many values of `per` have a current window, and how many of those cannot pay any more.",
            "properties": {"active": _COUNT, "exhausted": _COUNT},
        },
        "biggest": {
            "type": "array",
            "description": "The subjects that used most.",
            "maxItems": 5,
            "items": {
                "type": "object",
                "properties": {
                    "subject": {"type": "object", "maxProperties": 8, "additionalProperties": {"type": "string"}},
                    "spent": _TEXT,
                    "held": _TEXT,
                },
            },
        },
    },
}
_COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "Project": [
        ("Tenant", "string", ".status.tenant"),
        ("Default Model", "string", ".spec.defaultModel"),
        ("Accepted", "string", ".status.conditions[?(@.type=='Accepted')].status"),
    ],
    "Upstream": [
        ("URL", "string", ".spec.baseURL"),
        ("Protocol", "string", ".spec.protocol"),
        ("Accepted", "string", ".status.conditions[?(@.type=='Accepted')].status"),
    ],
    "Tier": [
        ("Number", "integer", ".spec.number"),
        ("Requests/min", "integer", ".spec.requestsPerMinute"),
        ("Tokens/day", "integer", ".spec.tokensPerDay"),
        ("Accepted", "string", ".status.conditions[?(@.type=='Accepted')].status"),
    ],
    "Budget": [
        ("Scope", "string", ".status.scope"),
        ("Limit", "string", ".status.limit"),
        ("Spent", "string", ".status.spent"),
        ("Held", "string", ".status.held"),
        ("Remaining", "string", ".status.remaining"),
        ("Window", "string", ".spec.window.period"),
        ("Phase", "string", ".status.phase"),
    ],
}
_SHORT_NAMES = {"Project": "bproj", "Upstream": "bup", "Tier": "btier", "Budget": "bbud"}
_SPECS: dict[str, type[msgspec.Struct]] = {
    "Project": kinds.ProjectSpec,
    "Upstream": kinds.UpstreamSpec,
    "Tier": kinds.TierSpec,
    "Budget": kinds.BudgetSpec,
}
KINDS = tuple(_SPECS)


def definition(kind: str) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind."""
    plural = kind.lower() + "s"
    model = getattr(kinds, kind)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [_SHORT_NAMES[kind]],
                "categories": ["behest"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": type_, "jsonPath": path} for name, type_, path in _COLUMNS[kind]
                    ]
                    + [{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}],
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "description": _line(inspect.getdoc(model) or ""),
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "metadata": {"type": "object"},
                                "spec": _of_type(_SPECS[kind], kind),
                                "status": _status(kind),
                            },
                        }
                    },
                }
            ],
        },
    }


def _status(kind: str) -> Schema:
    return {
        "type": "object",
        "description": "What the operator and the ledger say about it.",
        "properties": {
            "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
            "conditions": _CONDITIONS,
            **_STATUS[kind],
        },
    }


def _of_type(annotation: Any, path: str) -> Schema:
    """The schema of a type at a path, with what `_MORE` adds there."""
    schema = _plain(annotation, path)
    return {**schema, **_MORE.get(path, {})}


def _plain(annotation: Any, path: str) -> Schema:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        (inner,) = (item for item in get_args(annotation) if item is not type(None))
        return _plain(inner, path)
    if origin is Literal:
        return {"type": "string", "enum": list(get_args(annotation))}
    if origin is list:
        return {"type": "array", "maxItems": LIST_LENGTH_MAX, "items": _of_type(get_args(annotation)[0], path + "[]")}
    if origin is dict:
        values = {"maxLength": PATTERN_LENGTH_MAX, **_of_type(get_args(annotation)[1], path + "{}")}
        return {"type": "object", "maxProperties": LABELS_MAX, "additionalProperties": values}
    if annotation is str:
        return {"type": "string"}
    if annotation is bool:
        return {"type": "boolean"}
    if annotation is int:
        return {"type": "integer", "format": "int64"}
    if annotation is float:
        return {"type": "number"}
    return _of_struct(annotation, path)


def _of_struct(model: type[msgspec.Struct], path: str) -> Schema:
    hints = get_type_hints(model)
    meanings = _meanings(model)
    properties: dict[str, Schema] = {}
    required: list[str] = []
    for field in msgspec.structs.fields(model):
        name = field.encode_name
        schema = _of_type(hints[field.name], f"{path}.{name}")
        if meaning := meanings.get(field.name):
            schema = {"description": meaning, **schema}
        if field.required:
            required.append(name)
        else:
            default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
            if default is not None and default != [] and default != {}:
                schema["default"] = {} if isinstance(default, msgspec.Struct) else default
            elif default == []:
                schema["default"] = []
        properties[name] = schema
    described = {"description": _line(inspect.getdoc(model) or "")} if inspect.getdoc(model) else {}
    needed = {"required": required} if required else {}
    return {"type": "object", **described, **needed, "properties": properties}


def _meanings(model: type[msgspec.Struct]) -> Mapping[str, str]:
    """The docstrings of a type's members: what is documented there is documented here."""
    found = re.findall(r'^    (\w+): .*\n    """((?:.|\n)*?)"""', inspect.getsource(model), re.MULTILINE)
    return {name: _line(meaning) for name, meaning in found}


def _line(text: str) -> str:
    return " ".join(text.split())


def written(kind: str) -> str:
    """The definition as the text of a file."""
    head = "# Made by `python -m behest_operator.crds`: change behest_operator/crds.py or the ledger's kinds instead.\n"
    return head + yaml.safe_dump(definition(kind), sort_keys=False, width=118, allow_unicode=True)


def main() -> int:
    """Write the definitions into the folder that is named."""
    if len(sys.argv) != 2:
        print("usage: python -m behest_operator.crds FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        path = folder / f"{kind.lower()}s.yaml"
        path.write_text(written(kind), "utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
