"""Bad input costs nothing and is told clearly; a provider's failures are told and charged by the table."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import jwt
import pytest

from behest_proxy.identity.keys import SigningKey
from stack import Project, Stack

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


@pytest.fixture
def untouched(project: Project) -> Iterator[None]:
    """What happens in the test must not cost anything, nor reach the provider."""

    def state() -> tuple[int, str, int]:
        (row,) = project.stack.query(
            "SELECT (SELECT count(*) FROM ledger.request WHERE project_id = $1) AS requests,"
            " (SELECT coalesce(sum(spent + held), 0)::text FROM ledger.budget_window WHERE tenant_id = $2) AS money",
            project.project_id,
            project.namespace,
        )
        return row["requests"], row["money"], len(project.stack.sim_requests())

    before = state()
    yield
    assert state() == before


def _ask(project: Project, body: Any = None, *, token: str | None = None, **more: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
    return httpx.post(
        project.stack.base_url + "/v1/chat/completions",
        content=content,
        headers={
            "Authorization": f"Bearer {project.mint() if token is None else token}",
            "Content-Type": "application/json",
            **more,
        },
        timeout=30,
    )


def _error(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) >= {"code", "message", "type", "param"}
    assert answer.headers["x-request-id"]
    assert answer.headers["x-trace-id"]
    return error


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"not json", None),
        (b"[1, 2]", None),
        (b'{"messages": [{"role": "user", "content": "x"}]', None),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": QUESTION, "stream": "yes"}, "stream"),
        ({"messages": QUESTION, "n": 0}, "n"),
        ({"messages": QUESTION, "max_tokens": -1}, "max_tokens"),
        ({"messages": QUESTION, "model": 7}, "model"),
        ({"messages": QUESTION, "Model": "gpt-4o"}, "Model"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 1, "n": 2}', "n"),
        ({"messages": QUESTION, "service_tier": 7}, "service_tier"),
        ({"messages": QUESTION, "models": ["gpt-4o"]}, "models"),
        ({"messages": QUESTION, "modalities": ["audio"]}, "modalities"),
    ],
)
def test_a_malformed_body_is_refused_by_the_name_of_its_member(project: Project, body: Any, param: str | None) -> None:
    answer = _ask(project, body)
    error = _error(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "validation_error", param)


@pytest.mark.usefixtures("untouched")
def test_a_model_without_a_price_is_refused(project: Project) -> None:
    answer = _ask(project, {"messages": QUESTION, "model": "no-such-model"})
    assert (answer.status_code, _error(answer)["code"]) == (400, "unpriced_model")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_20_mb_is_413(project: Project, chunked: bool) -> None:
    body = b'{"messages": [{"role": "user", "content": "' + b"x" * 20_000_000 + b'"}]}'

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(body), 1_000_000):
            yield body[at : at + 1_000_000]

    with httpx.Client() as client:
        answer = client.post(
            project.stack.base_url + "/v1/chat/completions",
            content=pieces() if chunked else body,
            headers={"Authorization": f"Bearer {project.mint()}"},
            timeout=30,
        )
    assert (answer.status_code, _error(answer)["code"]) == (413, "request_too_large")


@pytest.mark.usefixtures("untouched")
def test_forged_and_expired_tokens_are_refused(project: Project) -> None:
    now_s = int(time.time())
    claims = {
        "tid": project.namespace,
        "pid": project.project_id,
        "uid": "u1",
        "iss": "behest",
        "aud": "behest",
        "iat": now_s,
        "exp": now_s + 600,
    }
    ours = project.stack.signing_key
    stranger = SigningKey.generate()
    no_key: Any = None
    tokens = {
        "expired": ours.sign({**claims, "exp": now_s - 600, "iat": now_s - 1200}),
        "another key under our kid": jwt.encode(
            claims, stranger.private_pem(), algorithm="RS256", headers={"kid": ours.kid}
        ),
        "unknown kid": stranger.sign(claims),
        "alg none": jwt.encode(claims, no_key, algorithm="none", headers={"kid": ours.kid}),
        "wrong issuer": ours.sign({**claims, "iss": "https://evil.example"}),
        "wrong audience": ours.sign({**claims, "aud": "other"}),
        "nothing like a token": "abc",
        "an API key": project.api_key,
    }
    for what, token in tokens.items():
        answer = _ask(project, {"messages": QUESTION}, token=token)
        assert (answer.status_code, _error(answer)["code"]) == (401, "invalid_token"), what
        assert answer.headers["x-should-retry"] == "false"
        assert token not in answer.text, what
    assert "/v1/auth/mint" in _ask(project, token=project.api_key).text
    assert _ask(project, {"messages": QUESTION}, token=ours.sign({**claims, "pid": "other/app"})).status_code == 403


@pytest.mark.usefixtures("untouched")
def test_another_session_than_the_tokens_own_is_forbidden(project: Project) -> None:
    answer = _ask(project, {"messages": QUESTION}, **{"X-Session-Id": "another"})
    assert (answer.status_code, _error(answer)["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/models/", 404), ("PUT", "/x//y", 404)],
)
def test_unknown_routes_have_the_envelope_and_never_redirect(
    project: Project, method: str, path: str, status: int
) -> None:
    answer = httpx.request(method, project.stack.base_url + path)
    assert answer.status_code == status
    _error(answer)


def _sim(project: Project, *, stream: bool = True, **sim: Any) -> httpx.Response:
    return _ask(project, {"messages": QUESTION, "stream": stream, "sim": sim})


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("sim", "status", "code", "outcome"),
    [
        ({"status": 401}, 502, "server_error", "refused"),
        ({"status": 403}, 502, "server_error", "refused"),
        ({"status": 429, "retry_after_s": 7}, 429, "upstream_rate_limited", "refused"),
        ({"status": 500}, 502, "server_error", "upstream_error"),
        ({"body": "html"}, 502, "server_error", "upstream_error"),
        ({"reset_before_head": True}, 502, "server_error", "upstream_error"),
    ],
)
def test_a_provider_that_fails_before_its_answer_costs_nothing(
    project: Project, stream: bool, sim: dict[str, Any], status: int, code: str, outcome: str
) -> None:
    before = len(project.stack.query("SELECT 1 FROM ledger.request WHERE project_id = $1", project.project_id))
    answer = _sim(project, stream=stream, **sim)
    assert (answer.status_code, _error(answer)["code"]) == (status, code)
    if status == 429:
        assert answer.headers["retry-after"] == "7"
    row = project.settled(number=before + 1)[-1]
    assert (row["outcome"], row["amount_pico"], row["source"]) == (outcome, 0, "none")


def test_a_providers_refusal_of_the_request_passes_through(project: Project) -> None:
    answer = _sim(project, status=422)
    assert answer.status_code == 422
    assert "error" in answer.json()


def test_a_provider_that_cannot_be_reached_is_502_and_free(stack: Stack) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        project = stack.project(upstream_url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        answer = _ask(project, {"messages": QUESTION})
    assert (answer.status_code, _error(answer)["code"]) == (502, "server_error")
    row = project.settled()[-1]
    assert (row["outcome"], row["amount_pico"], row["facts"]["requests"]) == ("upstream_error", 0, 0)


def test_a_silent_provider_is_504_and_free(stack: Stack) -> None:
    project = stack.project(upstream="  timeouts: {firstByteSeconds: 0.3}")
    answer = _sim(project, head_delay_ms=5000)
    assert (answer.status_code, _error(answer)["code"]) == (504, "upstream_timeout")
    assert project.settled()[-1]["amount_pico"] == 0


@pytest.mark.parametrize(
    ("sim", "code", "outcome"),
    [
        ({"reset_after_chunks": 5}, "upstream_error", "upstream_error"),
        ({"end_after_chunks": 5}, "upstream_error", "upstream_error"),
        ({"error_event_after_chunks": 5}, "upstream_error", "upstream_error"),
        ({"error_event_after_chunks": 5, "error_event_named": True}, "upstream_error", "upstream_error"),
        ({"stall_after_chunks": 5}, "upstream_timeout", "upstream_timeout"),
    ],
)
def test_a_provider_that_fails_in_the_middle_ends_the_stream_with_an_error_and_what_came_is_charged(
    stack: Stack, sim: dict[str, Any], code: str, outcome: str
) -> None:
    project = stack.project(upstream="  timeouts: {idleSeconds: 1}" if code == "upstream_timeout" else "")
    answer = _sim(project, output_tokens=50, **sim)
    assert answer.status_code == 200
    *_, terminal, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    event = json.loads(terminal.removeprefix("data: "))
    assert event["error"]["code"] == code
    row = project.settled()[-1]
    assert (row["outcome"], row["source"], row["output_tokens"]) == (outcome, "local", 5)


def test_garbage_in_the_place_of_events_is_an_error_and_not_a_success(project: Project) -> None:
    for body in ("garbage", "bad_json", "empty"):
        answer = _sim(project, body=body)
        if answer.status_code == 200:
            assert '"error"' in answer.text, body
            assert answer.text.endswith("data: [DONE]\n\n"), body
        else:
            assert answer.status_code == 502, body
    assert project.stack.verify().findings == []


def test_no_secret_and_no_prompt_is_in_the_log(project: Project) -> None:
    secret = "a-prompt-that-nobody-may-log"
    _ask(project, {"messages": [{"role": "user", "content": secret}], "stream": True})
    _ask(project, {"messages": [{"role": "user", "content": secret}], "n": 0})
    log = project.stack.log.read_text()
    assert secret not in log
    assert project.api_key not in log
    assert "behest_sk_" not in log
    assert "eyJ" not in log, "a token"


def test_every_answer_to_a_browser_of_an_allowed_origin_can_be_read_by_it(stack: Stack) -> None:
    project = stack.project(project='  allowedOrigins: ["https://shop.example", "https://*.shop.example"]')
    url = stack.base_url + "/v1/chat/completions"
    for origin, allowed in {
        "https://shop.example": True,
        "https://eu.shop.example": True,
        "https://evilshop.example": False,
        "http://shop.example": False,
    }.items():
        preflight = httpx.options(
            url,
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,x-session-id,x-stainless-lang",
            },
        )
        assert preflight.status_code == 204
        assert (preflight.headers.get("access-control-allow-origin") == origin) is allowed, origin
        answer = httpx.post(
            url,
            headers={"Origin": origin, "Authorization": f"Bearer {project.mint()}"},
            json={"messages": QUESTION, "stream": True},
        )
        assert (answer.headers.get("access-control-allow-origin") == origin) is allowed, origin
    mint = httpx.options(stack.base_url + "/v1/auth/mint", headers={"Origin": "https://shop.example"})
    assert "access-control-allow-origin" not in mint.headers


def test_probes_are_answered_on_the_admin_port_only(stack: Stack) -> None:
    assert httpx.get(stack.admin_url + "/healthz").status_code == 200
    assert httpx.get(stack.admin_url + "/readyz").text == "ready\n"
    assert httpx.get(stack.base_url + "/readyz").status_code == 404
    assert httpx.get(stack.admin_url + "/v1/models").status_code == 404
    keys = httpx.get(stack.base_url + "/.well-known/jwks.json")
    assert keys.headers["cache-control"] == "max-age=300"
    assert [key["kid"] for key in keys.json()["keys"]] == [stack.signing_key.kid]
    assert "d" not in keys.json()["keys"][0]
