"""The webhook's server on real sockets with TLS: reviews, what is none, and certificates that change under it."""

import asyncio
import base64
import json
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from hypercorn.asyncio import serve

from behest_ledger.telemetry.meter import Meter
from behest_operator import webhook_server
from behest_operator.certificates import Certificates, renewed
from behest_operator.sidecar import Template
from behest_operator.watch import WebhookWatch
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
                watch=WebhookWatch(Meter()),
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


POD: dict[str, Any] = {
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

        async def is_served(certificates: Certificates) -> bool:
            try:
                async with server.client(trusts=certificates) as client:
                    return (await client.post("/inject", json=review_of(POD))).status_code == 200
            except httpx.ConnectError:
                return False

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
            async with asyncio.timeout(30):
                while not await is_served(after):
                    await asyncio.sleep(0.02)
            assert (await open_client.post("/inject", json=review_of(POD))).status_code == 200

    running(tmp_path, work)


def test_whoever_reads_that_it_is_ready_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow_with_reviews(served: Any, config: Any, **options: Any) -> None:
        if config.ssl_enabled:
            await asyncio.sleep(0.3)
        await serve(served, config, **options)

    monkeypatch.setattr(webhook_server, "serve", slow_with_reviews)

    async def work(server: Running) -> None:
        async with server.client() as client:
            assert (await client.post("/inject", json=review_of(POD))).status_code == 200

    running(tmp_path, work)


def test_a_file_that_cannot_be_read_while_it_is_exchanged_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhook_server, "RELOAD_S", 0.02)

    async def work(server: Running) -> None:
        (tmp_path / "tls.key").unlink()
        (tmp_path / "tls.key").mkdir()
        async with asyncio.timeout(30):
            while "the certificate cannot be taken yet" not in caplog.text:
                await asyncio.sleep(0.02)
        async with server.client() as client:
            assert (await client.post("/inject", json=review_of(POD))).status_code == 200

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


def test_reviews_and_the_end_of_the_certificate_are_in_its_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_server, "RELOAD_S", 0.02)

    async def work(server: Running) -> None:
        async def told() -> dict[str, float]:
            async with httpx.AsyncClient() as client:
                answer = await client.get(f"http://127.0.0.1:{server.probe_port}/metrics")
            samples = (line.rpartition(" ") for line in answer.text.splitlines() if not line.startswith("#"))
            return {name: float(value) for name, _, value in samples}

        def reviews(result: str) -> str:
            return f'behest_webhook_reviews_total{{behest_result="{result}"}}'

        expiry = "behest_webhook_certificate_expires_at_seconds"
        found = await told()
        leaf = x509.load_pem_x509_certificate(server.certificates.leaf)
        assert found == {expiry: leaf.not_valid_after_utc.timestamp()}
        other_pod = {"metadata": {}, "spec": {"containers": [{"name": "app", "image": "app"}]}}
        bad_pod: dict[str, Any] = {**POD, "metadata": {**POD["metadata"], "annotations": {"behest.ai/port": "no port"}}}
        async with server.client() as client:
            for pod in (POD, POD, other_pod, bad_pod):
                assert (await client.post("/inject", json=review_of(pod))).status_code == 200
            await client.post("/inject", content=b"{}")
        found = await told()
        numbers = {result: found.get(reviews(result)) for result in ("injected", "left", "refused", "invalid")}
        assert numbers == {"injected": 2, "left": 1, "refused": 1, "invalid": 1}
        assert found["behest_webhook_duration_seconds_count"] == 5
        server.use(renewed(None, names=["localhost"], now=datetime.now(UTC) - timedelta(days=1)))
        async with asyncio.timeout(30):
            while (await told())[expiry] == leaf.not_valid_after_utc.timestamp():
                await asyncio.sleep(0.02)

    running(tmp_path, work)
