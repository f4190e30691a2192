"""The client of the Kubernetes API, against a server on a socket of this machine."""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from behest_operator.kubernetes import Credentials, Kubernetes, KubernetesError


def served(
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]],
    work: Callable[[Kubernetes, Credentials], Awaitable[None]],
    *,
    token_file: Path | None = None,
) -> None:
    async def main() -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        _, port = runner.addresses[0][:2]
        credentials = Credentials(
            server=f"http://127.0.0.1:{port}/", context=ssl.create_default_context(), token="t", token_file=token_file
        )
        try:
            async with Kubernetes(credentials) as kubernetes:
                await work(kubernetes, credentials)
        finally:
            await runner.cleanup()

    asyncio.run(main())


def test_each_call_is_what_the_api_server_expects(tmp_path: Path) -> None:
    seen: list[tuple[str, str, str, str, str]] = []
    token_file = tmp_path / "token"

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append(
            (
                request.method,
                request.path,
                request.headers["Authorization"],
                request.headers.get("Content-Type", ""),
                await request.text(),
            )
        )
        return web.json_response({"kind": "Thing"})

    async def work(kubernetes: Kubernetes, _: Credentials) -> None:
        token_file.write_text("first\n")
        assert await kubernetes.get("/a") == {"kind": "Thing"}
        token_file.write_text("second\n")
        await kubernetes.create("/a", {"b": 1})
        await kubernetes.replace("/a", {"b": 2})
        await kubernetes.merge("/a", {"b": None})
        await kubernetes.delete("/a")

    served(handle, work, token_file=token_file)
    assert seen == [
        ("GET", "/a", "Bearer first", "", ""),
        ("POST", "/a", "Bearer second", "application/json", '{"b": 1}'),
        ("PUT", "/a", "Bearer second", "application/json", '{"b": 2}'),
        ("PATCH", "/a", "Bearer second", "application/merge-patch+json", '{"b": null}'),
        ("DELETE", "/a", "Bearer second", "", ""),
    ]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (403, json.dumps({"message": "budgets is forbidden"}), "403: budgets is forbidden"),
        (409, "{}", "409: Conflict"),
        (502, "<html>bad gateway</html>", "502: <html>bad gateway</html>"),
        (503, "", "503: Service Unavailable"),
        (500, "[1]", r"500: \[1\]"),
    ],
)
def test_a_refusal_is_an_error_with_its_status_whoever_wrote_it(status: int, body: str, message: str) -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=body)

    async def work(kubernetes: Kubernetes, _: Credentials) -> None:
        with pytest.raises(KubernetesError, match=message) as caught:
            await kubernetes.get("/a")
        assert caught.value.status == status

    served(handle, work)


def test_what_is_not_there_is_nothing_to_get_and_nothing_to_delete() -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "not found"}, status=404)

    async def work(kubernetes: Kubernetes, _: Credentials) -> None:
        assert await kubernetes.get("/a") is None
        await kubernetes.delete("/a")
        with pytest.raises(KubernetesError, match="not found"):
            await kubernetes.merge("/a", {})

    served(handle, work)


@pytest.mark.parametrize("text", ["", "no json", "[]"])
def test_an_answer_that_is_no_object_is_an_error(text: str) -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(text=text)

    async def work(kubernetes: Kubernetes, _: Credentials) -> None:
        with pytest.raises(KubernetesError, match="GET /a: "):
            await kubernetes.get("/a")

    served(handle, work)


def test_a_server_that_is_away_or_hangs_up_is_an_error_without_a_status(tmp_path: Path) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def work(kubernetes: Kubernetes, credentials: Credentials) -> None:
        with pytest.raises(KubernetesError) as caught:
            await kubernetes.get("/a")
        assert caught.value.status == 0
        credentials.server = "http://127.0.0.1:1"
        with pytest.raises(KubernetesError) as caught:
            await kubernetes.get("/a")
        assert caught.value.status == 0
        assert "127.0.0.1:1" in str(caught.value)

    served(handle, work)


def test_a_token_file_that_is_gone_is_an_error_and_no_crash(tmp_path: Path) -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.json_response({})

    async def work(kubernetes: Kubernetes, _: Credentials) -> None:
        with pytest.raises(KubernetesError, match="token"):
            await kubernetes.get("/a")

    served(handle, work, token_file=tmp_path / "token")


def test_outside_a_pod_kubeconfig_says_where_the_api_server_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with pytest.raises(KubernetesError, match="KUBECONFIG is not set"):
        Credentials.find()
    path = tmp_path / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "b",
                "clusters": [{"name": "c", "cluster": {"server": "https://api.example.com:6443/"}}],
                "users": [{"name": "u", "user": {"token": "secret"}}],
                "contexts": [{"name": "b", "context": {"cluster": "c", "user": "u"}}],
            }
        )
    )
    monkeypatch.setenv("KUBECONFIG", str(path))
    found = Credentials.find()
    assert (found.server, found.headers()) == ("https://api.example.com:6443", {"Authorization": "Bearer secret"})


@pytest.mark.parametrize("text", ["users:\n- {user: {token: sec: ret}}", 'token: "secret', "token: !secret"])
def test_a_kubeconfig_that_cannot_be_read_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(KubernetesError, match=r"kubeconfig is no YAML, line \d$") as caught:
        Credentials.find()
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "a: [", "current-context: x", "- 1"])
def test_a_kubeconfig_that_says_nothing_useful_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(KubernetesError, match="kubeconfig"):
        Credentials.find()
    path.write_text(text)
    with pytest.raises(KubernetesError, match="kubeconfig"):
        Credentials.find()
