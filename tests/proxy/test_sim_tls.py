"""The simulator over TLS: ALPN offers both protocols on its one port."""

import asyncio
from pathlib import Path

import httpx
import pytest

from behest_proxy.sim.server import SimServer
from proxy.certificates import Certificate


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
def test_alpn_chooses_the_protocol(protocol: str, tmp_path: Path) -> None:
    certificate = Certificate(tmp_path)

    async def main() -> None:
        async with (
            SimServer(tls_cert=certificate.file) as sim,
            httpx.AsyncClient(verify=certificate.client(), http2=protocol == "HTTP/2", base_url=sim.base_url) as client,
        ):
            assert sim.base_url.startswith("https://")
            body = {"model": "m", "messages": [{"role": "user"}], "stream": True}
            answer = await client.post("/chat/completions", json=body)
            assert answer.http_version == protocol
            assert answer.text.endswith("data: [DONE]\n\n")

    asyncio.run(main())
