"""The edge against h2spec, strict cases included: what fails is what is listed here, and nothing else."""

import asyncio
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from behest_proxy.edge.host import Receive, Scope, Send
from behest_proxy.edge.server import TlsFiles
from fronts.h2spec import h2spec
from proxy.certificates import self_signed
from proxy.edge_clients import answer, application, read_body, run, running

CASES_LEAST = 140
"""h2spec 2.2.1 has 146; a run that ends early must not count as one that passed."""
FOREIGN_PREFACE = ("3.5. HTTP/2 Connection Preface", "Sends invalid connection preface")
"""Without TLS the port speaks HTTP/1.1 too: what is no preface of HTTP/2 is answered as HTTP/1.1, with 400, and then
closed. h2spec reads that answer as a broken frame."""
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")
KNOWN = {"without TLS": {FOREIGN_PREFACE}, "TLS": set[tuple[str, str]]()}


async def _agreeable(_scope: Scope, receive: Receive, send: Send) -> None:
    await read_body(receive)
    await answer(send, b"hello")


@pytest.mark.parametrize("wire", KNOWN)
def test_the_edge_fails_only_in_what_is_listed(wire: str, tmp_path: Path) -> None:
    program, report = h2spec(), tmp_path / "report.xml"
    tls = None
    if wire == "TLS":
        tls = TlsFiles(certificate=tmp_path / "certificate.pem", key=tmp_path / "key.pem")
        for file, content in zip((tls.certificate, tls.key), self_signed(), strict=True):
            file.write_bytes(content)

    async def scenario() -> str:
        async with running(application(_agreeable), tls=tls) as server:
            arguments = ["--strict", "--port", str(server.port), "--timeout", "5", "--junit-report", str(report)]
            tried = await asyncio.create_subprocess_exec(
                str(program),
                *arguments,
                *(["--tls", "--insecure"] if tls is not None else []),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await tried.communicate()
            return output.decode()

    output = run(scenario())
    # h2spec quotes what it received as it came: bytes that XML does not know.
    text = _NOT_XML.sub("?", report.read_text(errors="replace"))
    suites = ET.fromstring(text).findall("testsuite")
    cases = [(suite, case) for suite in suites for case in suite.findall("testcase")]
    failed = {
        (suite.get("name"), case.get("classname"))
        for suite, case in cases
        if case.find("failure") is not None or case.find("error") is not None
    }
    print(f"\nh2spec, {wire}: {len(cases)} cases, {len(failed)} failed")
    assert len(cases) >= CASES_LEAST, output[-3000:]
    assert failed == KNOWN[wire], output[output.find("Failures:") :]
