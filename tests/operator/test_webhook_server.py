"""The webhook's server on real sockets with TLS: reviews, what is none, and certificates that change under it."""

import asyncio
import base64
import json
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from behest_operator import webhook_server
from behest_operator.certificates import Certificates, renewed
from behest_operator.sidecar import Template
from behest_operator.webhook_server import run_server
from behest_proxy.cli.preflight import free_port

TEMPLATE = Template(image="registry.example.com/behest:1")


class Running:
    """A webhook on a port of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.probe_port = free_port(0), free_port(0)
        self.use(new_certificates())

    def use(self, certificates: Certificates) -> None:
        self.certificates = certificates
        (self.folder / "tls.crt").write_bytes(certificates.leaf)
        (self.folder / "tls.key").write_bytes(certificates.leaf_key)

    def client(self, *, trusts: Certificates | None = None, http2: bool = False) -> httpx.AsyncClient:
        context = ssl.create_default_context(cadata=(trusts or self.certificates).ca_bundle.decode())
        return httpx.AsyncClient(verify=context, base_url=f"https://localhost:{self.port}", http2=http2)


def new_certificates() -> Certificates:
    return renewed(None, names=["localhost"], now=datetime.now(UTC))


def running(folder: Path, work: Callable[[Running], Awaitable[None]]) -> None:
    async def main() -> None:
        server, stop = Running(folder), asyncio.Event()
        serving = asyncio.create_task(
            run_server(
                TEMPLATE,
                folder,
                bind=f"127.0.0.1:{server.port}",
                probe_bind=f"127.0.0.1:{server.probe_port}",
                stop=stop,
            )
        )
        try:
            async with httpx.AsyncClient() as client:
                while True:
                    try:
                        await client.get(f"http://127.0.0.1:{server.probe_port}/readyz")
                        break
                    except httpx.ConnectError:
                        assert not serving.done(), serving.exception()
                        await asyncio.sleep(0.02)
            await work(server)
        finally:
            stop.set()
            await serving

    asyncio.run(main())


def review_of(pod: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {"uid": "1", "kind": {"kind": "Pod"}, "namespace": "demo", "object": pod},
    }


POD = {
    "metadata": {"labels": {"behest.ai/inject": "true"}, "annotations": {"behest.ai/project": "shop"}},
    "spec": {"containers": [{"name": "app", "image": "app"}]},
}


def test_a_pod_is_reviewed_over_tls(tmp_path: Path) -> None:
    async def work(server: Running) -> None:
        async with server.client() as client:
            answer = (await client.post("/inject", json=review_of(POD))).json()["response"]
            assert answer["allowed"]
            operations = json.loads(base64.b64decode(answer["patch"]))
            assert any("registry.example.com/behest:1" in json.dumps(operation) for operation in operations)
            assert (await client.get("/inject")).status_code == 405
            assert (await client.post("/other")).status_code == 404

    running(tmp_path, work)


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b"{}", b"\xff\xfe", b'{"request": 1}', b"[" * 5000])
def test_what_is_no_review_is_refused_and_the_next_one_is_answered(tmp_path: Path, body: bytes) -> None:
    async def work(server: Running) -> None:
        async with server.client() as client:
            assert (await client.post("/inject", content=body)).status_code == 400
            assert (await client.post("/inject", json=review_of(POD))).json()["response"]["allowed"]

    running(tmp_path, work)


def test_a_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async def work(server: Running) -> None:
        async with server.client() as client:
            answer = await client.post("/inject", content=b" " * (webhook_server.BODY_BYTES_MAX + 1))
            assert answer.status_code == 413
            assert (await client.post("/inject", json=review_of(POD))).json()["response"]["allowed"]

    running(tmp_path, work)


def test_a_new_certificate_is_served_without_a_refused_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_server, "RELOAD_S", 0.02)

    async def work(server: Running) -> None:
        before = server.certificates
        async with server.client() as open_client:
            await open_client.post("/inject", json=review_of(POD))
            after = new_certificates()
            (tmp_path / "tls.crt").write_bytes(after.leaf)  # half of it: the key comes later
            await asyncio.sleep(0.1)
            async with server.client(trusts=before) as client:
                assert (await client.post("/inject", json=review_of(POD))).status_code == 200
            (tmp_path / "tls.key").unlink()
            await asyncio.sleep(0.1)
            server.use(after)
            for _ in range(200):
                try:
                    async with server.client(trusts=after) as client:
                        assert (await client.post("/inject", json=review_of(POD))).status_code == 200
                        break
                except httpx.ConnectError:
                    await asyncio.sleep(0.02)
            else:
                raise AssertionError("the new certificate was never served")
            assert (await open_client.post("/inject", json=review_of(POD))).status_code == 200

    running(tmp_path, work)


def test_without_tls_and_with_an_old_tls_nothing_is_answered(tmp_path: Path) -> None:
    async def work(server: Running) -> None:
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.TransportError):
                await client.post(f"http://127.0.0.1:{server.port}/inject", json=review_of(POD))
        async with httpx.AsyncClient() as client:
            for path in ("/healthz", "/readyz"):
                assert (await client.get(f"http://127.0.0.1:{server.probe_port}{path}")).text == "ok"

    running(tmp_path, work)
