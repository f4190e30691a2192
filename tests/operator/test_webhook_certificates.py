"""The webhook's Secret and what the API server trusts, whenever the operator is killed between the two."""

import asyncio
import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509

from behest_operator.kubernetes import KubernetesError
from behest_operator.webhook_certificates import WebhookCertificates
from fake_kubernetes import FakeKubernetes, Killed, Steps

SECRET = "/api/v1/namespaces/behest/secrets/tls"
OBJECT = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/behest"
PARTS = WebhookCertificates(namespace="behest", secret="tls", configuration="behest", service="webhook")
START = datetime(2026, 1, 1, tzinfo=UTC)


def api_server(steps: Steps | None = None) -> FakeKubernetes:
    kubernetes = FakeKubernetes(steps)
    hooks = [{"name": "inject.behest.ai", "clientConfig": {"service": {"name": "webhook"}}}]
    kubernetes.objects[OBJECT] = {"metadata": {"name": "behest", "resourceVersion": "0"}, "webhooks": hooks}
    return kubernetes


def trusted(kubernetes: FakeKubernetes) -> bytes:
    bundle: str = kubernetes.objects[OBJECT]["webhooks"][0]["clientConfig"].get("caBundle", "")
    return base64.b64decode(bundle)


def served(kubernetes: FakeKubernetes) -> dict[str, Any]:
    return dict(kubernetes.objects.get(SECRET, {}).get("data", {}))


def is_trusted(kubernetes: FakeKubernetes) -> bool:
    """Whether what is served now, if anything, is by an authority that is trusted now."""
    if not (data := served(kubernetes)):
        return True
    leaf = x509.load_pem_x509_certificate(base64.b64decode(data["tls.crt"]))
    names = {authority.subject for authority in x509.load_pem_x509_certificates(trusted(kubernetes))}
    return leaf.issuer in names


def test_the_first_look_makes_both_and_the_next_changes_nothing() -> None:
    kubernetes = api_server()
    asyncio.run(PARTS.look(kubernetes, now=START))
    assert is_trusted(kubernetes)
    assert set(served(kubernetes)) >= {"tls.crt", "tls.key", "ca.crt"}
    kubernetes.calls.clear()
    asyncio.run(PARTS.look(kubernetes, now=START + timedelta(days=1)))
    assert [method for method, _ in kubernetes.calls] == ["GET", "GET"]


@pytest.mark.parametrize("days", [0, 61, 400, 3000])
def test_no_leaf_is_ever_served_that_is_not_trusted(days: int) -> None:
    for number in range(1, 30):
        steps = Steps()
        kubernetes = api_server(steps)
        if days:
            asyncio.run(PARTS.look(kubernetes, now=START))
        steps.begin(number)
        now = START + timedelta(days=days)
        try:
            asyncio.run(PARTS.look(kubernetes, now=now))
        except Killed:
            assert is_trusted(kubernetes), f"killed at step {number}"
            steps.begin(None)
            asyncio.run(PARTS.look(kubernetes, now=now))
            assert is_trusted(kubernetes)
            assert served(kubernetes)
        else:
            return
    raise AssertionError("the look never ends")


def test_an_authority_that_somebody_changed_and_a_secret_that_is_broken_are_mended() -> None:
    kubernetes = api_server()
    asyncio.run(PARTS.look(kubernetes, now=START))
    kubernetes.objects[OBJECT]["webhooks"][0]["clientConfig"]["caBundle"] = "bm8="
    asyncio.run(PARTS.look(kubernetes, now=START))
    assert is_trusted(kubernetes)
    for broken in ({}, {"tls.crt": "bm8="}):
        kubernetes.objects[SECRET]["data"] = broken
        asyncio.run(PARTS.look(kubernetes, now=START))
        assert is_trusted(kubernetes)
        assert len(served(kubernetes)) == 6


def test_without_a_webhook_the_certificate_waits_for_it() -> None:
    kubernetes = FakeKubernetes()
    asyncio.run(PARTS.look(kubernetes, now=START))
    assert served(kubernetes)


def test_it_goes_on_while_the_api_server_is_away(caplog: pytest.LogCaptureFixture) -> None:
    kubernetes = api_server()
    kubernetes.refuse = {"/": KubernetesError(0, "no route to host")}

    async def main() -> None:
        looking = asyncio.create_task(PARTS.run(kubernetes))
        await asyncio.sleep(0.05)
        assert not looking.done()
        looking.cancel()

    asyncio.run(main())
    assert "trying again" in caplog.text
