"""Who may call, with everything real: keys that tenants register, hosts that name projects, what is suspended."""

import asyncio
import contextlib
import textwrap
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from behest_ledger.store.configuration import apply_text
from behest_proxy.app.asgi import client_app
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.settings import Settings
from behest_proxy.identity.keys import KeySet, SigningKey
from stack import Project, Stack, wait_until

BACKEND = SigningKey.generate()
OTHER = SigningKey.generate()


def with_keys(project: Project, keys: dict[str, SigningKey], more: str = "") -> str:
    """The project's manifest with these keys of its tenant's backend."""
    listed = "".join(
        f"  - kid: {kid}\n    publicKey: |\n{textwrap.indent(key.public_pem(), ' ' * 6)}" for kid, key in keys.items()
    )
    return f"""
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: app, namespace: {project.namespace}}}
spec:
  tenant: {project.namespace}
  defaultModel: gpt-4o-mini
{more}
  signingKeys: {"" if keys else "[]"}
{listed}"""


def locally_signed(project: Project, *, key: SigningKey = BACKEND, kid: str = "backend", **changes: Any) -> str:
    """What a tenant's backend signs with PyJWT alone. A change to None takes a claim away."""
    now_s = int(time.time())
    claims = {
        "tid": project.namespace,
        "pid": project.project_id,
        "uid": "u1",
        "role": "admin",
        "scp": ["everything"],
        "iss": "https://api.behest.ai",
        "aud": "behest",
        "iat": now_s,
        "nbf": now_s,
        "exp": now_s + 600,
        "jti": "t1",
        "sid": "s1",
        **changes,
    }
    given = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(given, key.private_pem(), algorithm="RS256", headers={"kid": kid})


def answer_to(stack: Stack, token: str, path: str = "/v1/models", host: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}", **({"Host": host} if host else {})}
    return httpx.get(stack.base_url + path, headers=headers)


def chat(stack: Stack, token: str) -> httpx.Response:
    return httpx.post(
        stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {token}"},
        json={"messages": [{"role": "user", "content": "Hi"}], "sim": {"output_tokens": 2}, "max_tokens": 5},
        timeout=30,
    )


def test_a_backend_that_signs_for_itself_is_believed_until_its_key_is_taken_away(stack: Stack) -> None:
    project = stack.project()
    token = locally_signed(project)
    assert answer_to(stack, token).status_code == 401
    stack.apply(with_keys(project, {"backend": BACKEND}))
    assert chat(stack, token).status_code == 200
    assert project.settled()[0]["user_id"] == "u1"
    taken_away_s = time.monotonic()
    stack.run(apply_text(stack.dsn, with_keys(project, {})))
    wait_until(lambda: answer_to(stack, token).status_code == 401, what="the end of the key", timeout_s=10)
    # The promise is minutes; it is one poll, with much room for a loaded machine.
    assert time.monotonic() - taken_away_s < 5


def test_a_legacy_token_of_eight_claims_is_believed(stack: Stack) -> None:
    project = stack.project()
    stack.apply(with_keys(project, {"backend": BACKEND}))
    token = locally_signed(project, role=None, scp=None, jti=None, sid=None)
    assert chat(stack, token).status_code == 200
    assert project.settled()[0]["session_id"] == "none"


def test_a_locally_signed_token_has_the_role_user_whatever_it_claims(stack: Stack) -> None:
    project = stack.project()
    stack.apply(with_keys(project, {"backend": BACKEND}))
    assert chat(stack, locally_signed(project, uid="u2")).status_code == 200
    project.settled()
    end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
    own = answer_to(stack, locally_signed(project, uid="u1", role="admin"), f"/v1/billing/usage?to={end}").json()
    assert own["platform"]["requests"] == 0
    everybodys = answer_to(stack, project.mint(role="admin"), f"/v1/billing/usage?to={end}").json()
    assert everybodys["platform"]["requests"] == 1
    assert answer_to(stack, locally_signed(project, uid="admin")).status_code == 401


def test_one_kid_of_two_tenants_is_two_keys_and_neither_speaks_for_the_other(stack: Stack) -> None:
    one, other = stack.project(), stack.project()
    stack.apply(with_keys(one, {"backend": BACKEND}))
    stack.apply(with_keys(other, {"backend": OTHER}))
    assert answer_to(stack, locally_signed(one)).status_code == 200
    assert answer_to(stack, locally_signed(other, key=OTHER)).status_code == 200
    assert answer_to(stack, locally_signed(other)).status_code == 401
    assert answer_to(stack, locally_signed(one, key=OTHER)).status_code == 401
    # Their own name and the other's project: the key is good, the project is not theirs.
    stolen = answer_to(stack, locally_signed(one, pid=other.project_id))
    assert (stolen.status_code, stolen.json()["error"]["details"]["reason"]) == (403, "wrong_project")


def test_a_projects_own_host_is_for_its_own_tokens_and_keys(stack: Stack) -> None:
    one, other = stack.project(), stack.project()
    slug = f"shop-{one.namespace}"
    stack.apply(with_keys(one, {}, f"  slug: {slug}"))
    host = f"{slug}.behest.test"
    for mine in (host, host.upper(), f"{host}:8080", "behest.test", "127.0.0.1", "unknown.behest.test"):
        assert answer_to(stack, one.mint(), host=mine).status_code == 200, mine
    refused = answer_to(stack, other.mint(), host=host)
    assert (refused.status_code, refused.json()["error"]["details"]["reason"]) == (403, "wrong_project")
    for theirs in ("behest.test", "127.0.0.1", f"x.{host}", f"{host}.example.com"):
        assert answer_to(stack, other.mint(), host=theirs).status_code == 200, theirs
    for project, status in ((one, 200), (other, 403)):
        minted = httpx.post(
            stack.base_url + "/v1/auth/mint",
            json={"user_id": "u1"},
            headers={"Authorization": f"Bearer {project.api_key}", "Host": host},
        )
        assert minted.status_code == status


def test_a_slug_that_two_projects_claim_is_nobodys(stack: Stack) -> None:
    one, squatter = stack.project(), stack.project()
    slug = f"wanted-{one.namespace}"
    stack.apply(with_keys(one, {}, f"  slug: {slug}"))
    stack.apply(with_keys(squatter, {}, f"  slug: {slug}"))
    assert answer_to(stack, one.mint(), host=f"{slug}.behest.test").status_code == 200


SUSPENSIONS = {
    "user": "{scope: {user: u1}",
    "session": "{scope: {session: s1}",
    "tenant": "{scope: {tenant: NAMESPACE}",
}


@pytest.mark.parametrize("what", SUSPENSIONS)
def test_who_is_suspended_by_a_budget_is_refused_and_the_others_are_not(stack: Stack, what: str) -> None:
    project = stack.project()
    spec = SUSPENSIONS[what].replace("NAMESPACE", project.namespace)
    with httpx.stream(
        "POST",
        stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {project.mint()}"},
        json={
            "stream": True,
            "messages": [{"role": "user", "content": "Hi"}],
            "sim": {"output_tokens": 1000, "chunk_interval_ms": 10},
        },
        timeout=30,
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        stack.run(
            apply_text(
                stack.dsn,
                f"""
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: blocked, namespace: {project.namespace}}}
spec: {spec}, limit: {{requests: 1000000}}, window: {{period: Lifetime}}, suspended: true}}
""",
            )
        )
        rest = [line for line in lines if line]
    assert '"code":"forbidden"' in rest[-2]
    refused = chat(stack, project.mint())
    assert (refused.status_code, refused.json()["error"]["details"]["reason"]) == (403, "suspended")
    assert refused.json()["error"]["details"]["name"] == f"{project.namespace}/blocked"
    others = chat(stack, project.mint(user="u2", session="s2"))
    assert others.status_code == (403 if what == "tenant" else 200)


class Issuer(ThreadingHTTPServer):
    """An OpenID issuer's key endpoint on loopback, which answers as a test says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), IssuersHandler)
        self.document = b""
        self.status = 200
        self.delay_s = 0.0
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/keys"


class IssuersHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        issuer = self.server
        assert isinstance(issuer, Issuer)
        issuer.asked += 1
        time.sleep(issuer.delay_s)
        self.send_response(issuer.status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(issuer.document)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(issuer.document)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def issuer() -> Generator[Issuer]:
    with Issuer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def trusting(stack: Stack, issuer: Issuer) -> Project:
    """A project that believes the issuer, which no other test's project does."""
    project = stack.project()
    stack.apply(
        with_keys(
            project,
            {},
            "  trustedIssuers:\n"
            f"  - {{issuer: 'https://issuer.example/{project.namespace}', jwksURL: '{issuer.url}', audience: shop,"
            " claims: {uid: email}}",
        )
    )
    return project


def issued(project: Project, key: SigningKey = BACKEND, **changes: Any) -> str:
    now_s = int(time.time())
    claims = {
        "iss": f"https://issuer.example/{project.namespace}",
        "aud": "shop",
        "sub": "1",
        "email": "alice@example.com",
        "iat": now_s,
        "exp": now_s + 600,
        "role": "admin",
        **changes,
    }
    return jwt.encode(claims, key.private_pem(), algorithm="RS256", headers={"kid": key.kid})


def key_set(*keys: SigningKey) -> bytes:
    return KeySet(key.verification_key() for key in keys).jwks()


def test_an_external_issuers_user_may_call_and_a_stranger_may_not(stack: Stack, issuer: Issuer) -> None:
    issuer.document = key_set(BACKEND)
    project = trusting(stack, issuer)
    assert answer_to(stack, project.mint()).status_code == 200
    assert issuer.asked == 0, "a token of ours asks no issuer"
    assert chat(stack, issued(project)).status_code == 200
    assert project.settled()[0]["user_id"] == "alice@example.com"
    for wrong in (
        issued(project, aud="other"),
        issued(project, OTHER),
        issued(project, exp=1),
        issued(project, iss="x"),
    ):
        assert answer_to(stack, wrong).status_code == 401
    assert issuer.asked == 1


def test_on_the_pods_own_loopback_an_issuers_keys_are_fetched_too_and_no_address_is_counted(
    stack: Stack, issuer: Issuer, tmp_path: Path
) -> None:
    issuer.document = key_set(BACKEND)
    project = trusting(stack, issuer)
    key_file = tmp_path / "signing.pem"
    key_file.write_bytes(stack.signing_key.private_pem())

    async def scenario() -> list[int]:
        gateway = Gateway(Settings(database_url=stack.dsn, signing_key_file=key_file, address_rate=0.2))
        await gateway.start()
        transport = httpx.ASGITransport(client_app(gateway, by_pod=True))
        headers = {"Authorization": f"Bearer {issued(project)}"}
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://pod", headers=headers) as client:
                return [(await client.get("/v1/models")).status_code for _ in range(3)]
        finally:
            await gateway.aclose()

    assert asyncio.run(scenario()) == [200, 200, 200]
    assert issuer.asked == 1


@pytest.mark.parametrize("fault", ["huge", "html", "redirect", "error", "dead", "slow"])
def test_an_issuer_that_does_not_behave_harms_only_its_own_tokens(stack: Stack, issuer: Issuer, fault: str) -> None:
    issuer.document = {"huge": b" " * 300_000 + key_set(BACKEND), "html": b"<html>"}.get(fault, key_set(BACKEND))
    issuer.status = {"redirect": 302, "error": 500}.get(fault, 200)
    issuer.delay_s = 7.0 if fault == "slow" else 0.0
    project = trusting(stack, issuer)
    if fault == "dead":
        issuer.server_close()
    own = project.mint()
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(
                httpx.get,
                stack.base_url + "/v1/models",
                timeout=20,
                headers={"Authorization": f"Bearer {issued(project)}"},
            )
            for _ in range(4)
        ]
        begun_s = time.monotonic()
        assert answer_to(stack, own).status_code == 200
        assert time.monotonic() - begun_s < 3, "who does not need the issuer does not wait for it"
        assert [answer.result().status_code for answer in asked] == [401] * 4
    assert issuer.asked <= 1, "they share one fetch"


@pytest.mark.parametrize("who", ["another project", "another user"])
def test_who_names_anothers_session_gets_one_of_its_own(stack: Stack, who: str) -> None:
    owner = stack.project()
    attacker = stack.project() if who == "another project" else owner
    theirs = owner.mint(user="ann", session="theirs")
    assert chat(stack, theirs).status_code == 200
    owner.settled()
    before = owner.budgets(theirs)["sessions"]
    named = attacker.mint(user="eve", session="theirs")
    assert attacker.budgets(named)["sessions"]["spent"] in ("0", "0.00")
    assert chat(stack, named).status_code == 200
    spent = attacker.settled(number=1 if attacker is not owner else 2)[-1]
    assert (spent["user_id"], spent["session_id"]) == ("eve", "theirs")
    assert spent["amount_pico"] > 0
    assert owner.budgets(theirs)["sessions"] == before
