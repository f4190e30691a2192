"""The description of what clients see (OpenAPI 3.1): `GET /openapi.json`, and the page that is made of it.

Answers that have a type of their own are described from it; the rest is kept by hand,
and tried against the running system.
"""

from collections.abc import Mapping
from typing import Any, get_args

import msgspec

from behest_ledger.focus.columns import VERSIONS
from behest_ledger.focus.csv_file import CsvFile
from behest_ledger.focus.parquet_file import ParquetFile
from behest_ledger.store.usage import SESSIONS_MAX, Granularity
from behest_proxy.app.billing import FORMATS
from behest_proxy.app.thread_endpoints import LIMIT_DEFAULT, LIMIT_MAX
from behest_proxy.identity.caller import ROLES
from behest_proxy.identity.mint import TTL_DEFAULT_S, TTL_MAX_S, TTL_MIN_S, MintAnswer

Schema = dict[str, Any]

_ERRORS = {
    "400": "what is asked is malformed or impossible: `validation_error`, `unpriced_model`, `no_provider_key`",
    "401": "`invalid_token`",
    "402": "a budget cannot pay: `quota_exceeded`",
    "403": "another tenant, project, session or role, or something is suspended: `forbidden`",
    "404": "`not_found`",
    "409": "the thread's broken reply cannot be continued so: `cannot_continue`; a key is another request's:"
    " `conflict`; its request runs elsewhere: `in_progress`",
    "413": "`request_too_large`",
    "429": "a tier's rate, or the provider's, is used up: `rate_limited`, `upstream_rate_limited`",
    "500": "our fault: `server_error`",
    "502": "the provider refused, broke off, or could not be reached: `server_error`, `upstream_error`",
    "503": "`ledger_unavailable`, `draining`",
    "504": "`upstream_timeout`",
}


def _object(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **optional}, "required": [*required]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_USD: Schema = {"type": "number", "minimum": 0, "description": "USD, with every digit"}
_TIME: Schema = {"type": "string", "format": "date-time"}
_COSTS = {"requests": _COUNT, "input_tokens": _COUNT, "output_tokens": _COUNT, "cost_usd": _USD}
_TIME_PARAMETER: Schema = {
    "type": "string",
    "description": "RFC 3339, or without an offset, or a plain date",
    "examples": ["2026-04-01T00:00:00Z", "2026-04-01"],
}
_MESSAGE = _object(
    {"role": {"enum": ["system", "developer", "user", "assistant", "tool"]}},
    content={"type": ["string", "array", "null"], "items": {"type": "object"}},
)

SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        {
            "error": _object(
                {"code": _TEXT, "message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}},
                details={"type": "object"},
            )
        }
    ),
    "MintRequest": _object(
        {"user_id": {"type": "string", "minLength": 1, "maxLength": 255}},
        role={"type": "string", "examples": list(ROLES), "description": "capped at the API key's role"},
        ttl={"type": "integer", "minimum": TTL_MIN_S, "maximum": TTL_MAX_S, "default": TTL_DEFAULT_S},
        session_id={"type": "string", "pattern": "^[!-~]{1,255}$"},
        tier={"type": ["integer", "string"], "description": "a Tier's number or name"},
    ),
    "ChatRequest": _object(
        {"messages": {"type": "array", "items": _MESSAGE, "minItems": 1}},
        model={"type": ["string", "null"], "description": "absent, empty or `default`: the project's default model"},
        stream={"type": ["boolean", "null"]},
        max_tokens={"type": ["integer", "null"], "minimum": 1},
        max_completion_tokens={"type": ["integer", "null"], "minimum": 1},
        n={"type": ["integer", "null"], "minimum": 1},
    ),
    "ChatAnswer": _object({"choices": _list({"type": "object"})}, usage={"type": "object"}),
    "Models": _object(
        {"object": {"const": "list"}, "data": _list(_object({"id": _TEXT, "object": {"const": "model"}}))}
    ),
    "Keys": _object({"keys": _list(_object({"kid": _TEXT, "kty": _TEXT}))}),
    "Budgets": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    dict.fromkeys(("budget", "unit", "limit", "spent", "held", "remaining", "window"), _TEXT)
                    | {"enforcement": {"enum": ["hard", "soft"]}, "suspended": {"type": "boolean"}, "phase": _TEXT},
                    resets_at={"type": ["string", "null"], "format": "date-time"},
                )
            ),
        }
    ),
    "Usage": _object(
        {
            "totals": _object({**_COSTS, "tokens": _COUNT}),
            "breakdown": _list(_object({"timestamp": _TIME, **_COSTS, "tokens": _COUNT})),
        }
    ),
    "Bill": _object(
        {
            **_COSTS,
            "by_model": _list(_object({"model": _TEXT, **_COSTS})),
            "by_session": _list(_object({"session_id": _TEXT, **_COSTS}))
            | {"maxItems": SESSIONS_MAX, "description": "those that cost most"},
            "sessions": {**_COUNT, "description": "how many there are"},
        }
    ),
    "Thread": _object(
        {"id": _TEXT, "object": {"const": "thread"}, "messages": _COUNT, "created_at": _TIME, "updated_at": _TIME}
    ),
    "Message": _object(
        {
            "id": {"type": "integer", "minimum": 1, "description": "counts up from 1 in a thread"},
            "role": _TEXT,
            "content": {"type": ["string", "array", "null"], "items": {"type": "object"}},
            "created_at": _TIME,
            "complete": {"type": "boolean", "description": "false: a reply that broke off, or is still under way"},
        },
        last_event_id={
            "type": "string",
            "description": "of a broken reply: as Last-Event-ID it goes on behind `content`",
        },
    ),
    "BillingUsage": _object(
        {
            "project_id": _TEXT,
            "window": _object({"from": _TIME, "to": _TIME}),
            "platform": _ref("Bill"),
            "byok": _ref("Bill"),
        }
    ),
}


def _query(name: str, schema: Schema, text: str) -> Schema:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


_FROM = _query("from", _TIME_PARAMETER, "the begin, included (default: 30 days before `to`)")
_FROM_BY_TIME = _query("from", _TIME_PARAMETER, "the begin, included (default: 30 days before `to`, by the minute 7)")
_TO = _query("to", _TIME_PARAMETER, "the end, not included (default: now)")
_THREAD = {"name": "thread_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_LIMIT = _query("limit", {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT}, "how many")
_VISIBLE: Schema = {"type": "string", "pattern": "^[!-~]{1,255}$"}
_SESSION = {
    "name": "X-Session-Id",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "description": "whose budget pays; must be the token's `sid` where that has one",
}


def _header(name: str, schema: Schema, text: str) -> Schema:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


_KEPT = (
    _header(
        "Idempotency-Key", _VISIBLE, "the same call with the same key within 24 hours gets the same answer, once paid"
    ),
    _header(
        "X-Thread-Id", _VISIBLE, "the thread that this belongs to, by the client's own name; made by its first call"
    ),
    _header("X-Event-Ids", {"enum": ["1"]}, "events of the stream bear ids"),
    _header(
        "Last-Event-ID",
        {"type": "string", "pattern": "^[0-9a-f]{32}-[0-9]{1,9}$"},
        "the last id that was read of the thread's last reply: what comes behind it is asked for",
    ),
)


def _operation(
    name: str,
    text: str,
    answer: Schema,
    *,
    security: str | None = "token",
    errors: str = "",
    parameters: tuple[Schema, ...] = (),
    body: str | None = None,
    stream: bool = False,
    media_types: tuple[str, ...] = ("application/json",),
    empty: bool = False,
) -> Schema:
    content: Schema = {media_type: {"schema": answer} for media_type in media_types}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    codes = sorted({*errors.split(), *(("401", "403", "503") if security else ())})
    operation: Schema = {
        "operationId": name,
        "summary": text,
        "security": [{security: []}] if security else [],
        "responses": {
            **({"204": {"description": "done"}} if empty else {"200": {"description": "as asked", "content": content}}),
            **{code: {"$ref": f"#/components/responses/{code}"} for code in codes},
        },
    }
    if parameters:
        operation["parameters"] = list(parameters)
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    return operation


def _export() -> Schema:
    return _operation(
        "billingExport",
        "The project's bill as FOCUS, in hours of UTC; for the role admin",
        {"type": "string"},
        errors="400 429",
        parameters=(
            _query("from", _TIME_PARAMETER, "the first hour (default: the first of this month)"),
            _query("to", _TIME_PARAMETER, "the hour after the last (default: the end of the last that is over)"),
            _query("format", {"enum": list(FORMATS), "default": FORMATS[0]}, "the form of the file"),
            _query("focus_version", {"enum": list(VERSIONS), "default": VERSIONS[0]}, "of the specification"),
            _query("per_session", {"enum": ["true", "false"], "default": "false"}, "a row for each user and session"),
        ),
        media_types=(CsvFile.media_type.partition(";")[0], ParquetFile.media_type),
    )


def _thread_paths() -> dict[str, Any]:
    thread: dict[str, Any] = {"errors": "404", "parameters": (_THREAD,)}
    behind = _query("before", _VISIBLE, "a thread's id: those behind it")
    earlier = _query(
        "before", {"type": "integer", "minimum": 1, "maximum": 10**9 - 1}, "a message's id: those before it"
    )
    return {
        "/v1/threads": {
            "get": _operation(
                "threads",
                "The caller's threads, the one that was used last first",
                _list(_ref("Thread")),
                errors="400",
                parameters=(_LIMIT, behind),
            )
        },
        "/v1/threads/{thread_id}": {
            "get": _operation("thread", "One of them", _ref("Thread"), **thread),
            "delete": _operation("deleteThread", "Delete it and all that was said in it", {}, empty=True, **thread),
        },
        "/v1/threads/{thread_id}/messages": {
            "get": _operation(
                "messages",
                "What was said last, in its order",
                _list(_ref("Message")),
                errors="400 404 500",
                parameters=(_THREAD, _LIMIT, earlier),
            )
        },
    }


def _paths() -> dict[str, Any]:
    mint = "An API key becomes a short-lived token for one user"
    granularity = {"enum": list(get_args(Granularity)), "default": "day"}
    chat = _operation(
        "chat",
        "OpenAI Chat Completions, streamed or not; what is not described here goes to the provider as it is",
        _ref("ChatAnswer"),
        errors="400 402 404 409 413 429 500 502 504",
        parameters=(_SESSION, *_KEPT),
        body="ChatRequest",
        stream=True,
    )
    minting: dict[str, Any] = {"security": "api_key", "errors": "400 413 429", "body": "MintRequest"}
    usage = (
        _FROM_BY_TIME,
        _TO,
        _query("user_id", _TEXT, "another user's: for the roles admin and dashboard-service"),
        _query("granularity", granularity, "the pieces of the breakdown"),
        _query("tz", {"type": "string", "default": "UTC", "examples": ["Europe/Berlin"]}, "where days begin"),
    )
    return {
        "/v1/chat/completions": {"post": chat},
        "/v1/auth/mint": {"post": _operation("mint", mint, _ref("MintAnswer"), **minting)},
        "/auth/v1/auth/mint": {"post": _operation("mintAlias", "The same", _ref("MintAnswer"), **minting)},
        "/.well-known/jwks.json": {
            "get": _operation("keys", "The public halves of the keys that sign tokens", _ref("Keys"), security=None)
        },
        "/v1/models": {"get": _operation("models", "The models that the project may use", _ref("Models"))},
        "/v1/budgets": {
            "get": _operation(
                "budgets",
                "The budgets that bind the caller, and what is left of them",
                _ref("Budgets"),
                errors="400",
                parameters=(_SESSION,),
            )
        },
        "/v1/usage": {
            "get": _operation("usage", "What was used, by time", _ref("Usage"), errors="400", parameters=usage)
        },
        "/v1/billing/usage": {
            "get": _operation(
                "billingUsage",
                f"What was used, by model, session (the {SESSIONS_MAX} that cost most) and whose key paid",
                _ref("BillingUsage"),
                errors="400",
                parameters=(_FROM, _TO),
            )
        },
        "/v1/billing/export": {"get": _export()},
        **_thread_paths(),
        "/openapi.json": {"get": _operation("description", "This", {"type": "object"}, security=None)},
    }


def openapi_document() -> dict[str, Any]:
    """The whole description."""
    _, typed = msgspec.json.schema_components([MintAnswer], ref_template="#/components/schemas/{name}")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Behest",
            "version": "1",
            "description": "Every answer has `X-Request-Id` and `X-Trace-Id`; every error the one envelope.",
        },
        "paths": _paths(),
        "components": {
            "schemas": {**SCHEMAS, **typed},
            "responses": {
                code: {"description": text, "content": {"application/json": {"schema": _ref("Error")}}}
                for code, text in _ERRORS.items()
            },
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "api_key": {"type": "http", "scheme": "bearer", "description": "behest_sk_live_..."},
            },
        },
    }


def reference_page() -> str:
    """The page docs/api.md."""
    lines = ["# What clients may ask", "", "Made from `GET /openapi.json`, which says it for programs.", ""]
    who = {"token": "a token", "api_key": "an API key", None: "nothing"}
    for path, operations in openapi_document()["paths"].items():
        for method, operation in operations.items():
            security = next(iter(operation["security"][0]), None) if operation["security"] else None
            codes = ", ".join(f"`{code}`" for code in operation["responses"])
            lines += [f"## {method.upper()} {path}", "", f"{operation['summary']}. Needs {who[security]}.", ""]
            for parameter in operation.get("parameters", ()):
                text = f": {parameter['description']}" if "description" in parameter else ""
                lines.append(f"- `{parameter['name']}` ({parameter['in']}){text}")
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                schema = SCHEMAS[content.rpartition("/")[2]]
                for name, member in schema["properties"].items():
                    text = f": {member['description']}" if "description" in member else ""
                    needed = ", required" if name in schema["required"] else ""
                    lines.append(f"- `{name}` (body{needed}){text}")
            if lines[-1]:
                lines.append("")
            lines += [f"Answers: {codes}.", ""]
    return "\n".join(lines)
