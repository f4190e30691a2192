"""`behest webhook`: the admission webhook as a process. Stateless: any number of them may run.

It serves HTTPS only, with the certificate files that are mounted; when they change it serves the new ones, without a
restart and without a refused connection. Probes are on a port of their own, without TLS.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from hypercorn.asyncio import serve
from hypercorn.config import Config
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from behest_ledger.telemetry import logs
from behest_ledger.telemetry.meter import Meter
from behest_ledger.telemetry.process import told
from behest_ledger.telemetry.prometheus import CONTENT_TYPE, page
from behest_ledger.telemetry.settings import TelemetrySettingsError
from behest_operator.settings import SettingsError, WebhookSettings, help_text, read
from behest_operator.sidecar import Template
from behest_operator.watch import Reviewed, WebhookWatch
from behest_operator.webhook import ReviewError, review

logger = logging.getLogger(__name__)

BODY_BYTES_MAX = 3 * 1024 * 1024
"""An object in etcd is at most half of it."""
RELOAD_S = 1.0


def template_in(path: str) -> Template:
    """The sidecar's template in a file, JSON in the spelling of `Template`. Raises `SettingsError`."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=_StrictTemplate)
    except OSError as error:
        raise SettingsError(f"BEHEST_INJECTION_TEMPLATE: {path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise SettingsError(f"BEHEST_INJECTION_TEMPLATE: {path}: {error}") from None


class _StrictTemplate(Template, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A misspelt member is an error, not a default."""


def application(template: Template, watch: WebhookWatch) -> Starlette:
    """The webhook as an ASGI application: POST /inject."""

    async def inject(request: Request) -> Response:
        begun_s = time.monotonic()
        answer, result = await _reviewed(request, template)
        watch.reviewed(result, time.monotonic() - begun_s)
        return answer

    return Starlette(routes=[Route("/inject", inject, methods=["POST"])])


async def _reviewed(request: Request, template: Template) -> tuple[Response, Reviewed]:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            return PlainTextResponse("the review is too large", 413), "invalid"
    try:
        answer = review(json.loads(body), template)
    except (ReviewError, ValueError, RecursionError) as error:
        return PlainTextResponse(str(error), 400), "invalid"
    response = answer["response"]
    if not response["allowed"]:
        return JSONResponse(answer), "refused"
    return JSONResponse(answer), "injected" if "patch" in response else "left"


def probes(watch: WebhookWatch) -> Starlette:
    """Liveness, readiness and metrics."""

    async def well(_request: Request) -> Response:
        return PlainTextResponse("ok")

    async def metrics(_request: Request) -> Response:
        return Response(page(watch.meter), media_type=CONTENT_TYPE)

    return Starlette(routes=[Route("/healthz", well), Route("/readyz", well), Route("/metrics", metrics)])


class _TlsConfig(Config):
    """Hypercorn's configuration with a TLS context that is kept, so that its certificate can be exchanged."""

    context: ssl.SSLContext

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return self.context if self.ssl_enabled else None


async def run_server(
    template: Template, folder: Path, *, bind: str, probe_bind: str, stop: asyncio.Event, watch: WebhookWatch
) -> None:
    """Serve until `stop` is set. `folder` has `tls.crt` and `tls.key`."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.load_cert_chain(certificate, key)
    watch.serves(_expires_at_s(certificate))
    config = _TlsConfig()
    config.context = context
    config.certfile, config.keyfile = str(certificate), str(key)
    config.bind = _listening(config, bind)
    config.graceful_timeout = 5
    config.errorlog = None
    probe_config = Config()
    probe_config.bind = [probe_bind]
    probe_config.errorlog = None
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(application(template, watch), config, shutdown_trigger=stop.wait))  # type: ignore[arg-type]
        group.create_task(serve(probes(watch), probe_config, shutdown_trigger=stop.wait))  # type: ignore[arg-type]
        reloading = group.create_task(_reload(context, certificate, key, watch))
        await stop.wait()
        reloading.cancel()


def _listening(config: Config, bind: str) -> list[str]:
    """Listen now, and let Hypercorn take the socket: whoever reads from the probes that all is well finds it there."""
    config.bind = [bind]
    (listener,) = config.create_sockets().secure_sockets
    listener.listen(config.backlog)
    return [f"fd://{listener.detach()}"]


def _expires_at_s(certificate: Path) -> float:
    """When the first certificate of a PEM file ends, Unix time."""
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()


async def _reload(context: ssl.SSLContext, certificate: Path, key: Path, watch: WebhookWatch) -> None:
    """Take the files of a rotated certificate: new connections get it, open ones go on."""
    seen = _stamp(certificate, key)
    while True:
        await asyncio.sleep(RELOAD_S)
        found = _stamp(certificate, key)
        if found == seen:
            continue
        try:
            # Both halves are exchanged one after the other, and what does not fit would be served all the same: it is
            # tried first where nobody is served. The next look finds them whole.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
            context.load_cert_chain(certificate, key)
            watch.serves(_expires_at_s(certificate))
        except (OSError, ssl.SSLError, ValueError) as error:
            logger.warning("the certificate cannot be taken yet: %s", error)
            continue
        seen = found
        logger.info("serving a new certificate")


def _stamp(*files: Path) -> list[bytes]:
    return [_content(file) for file in files]


def _content(file: Path) -> bytes:
    """What is in it; nothing, where it cannot be read while it is exchanged."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def add_parser(subparsers: Any) -> None:
    """Add `webhook` to the commands of `behest`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "webhook",
        help="run the webhook that adds sidecars to pods (Kubernetes)",
        description="Run the admission webhook until SIGTERM.",
        epilog=help_text(WebhookSettings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    del parser


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Exit status 2: a mistake in the environment."""
    del arguments
    logs.configure("info")
    try:
        settings = read(WebhookSettings, os.environ)
        asyncio.run(_main(settings, template_in(settings.injection_template)))
    except (SettingsError, TelemetrySettingsError, OSError) as error:
        print(f"behest webhook: {error}", file=sys.stderr)
        return 2
    return 0


async def _main(settings: WebhookSettings, template: Template) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    logger.info("injecting the sidecar %s, template %s", template.image, template.hash)
    watch = WebhookWatch(Meter())
    async with told(watch.meter, "webhook", os.environ):
        await run_server(
            template,
            Path(settings.webhook_tls_dir),
            bind=settings.webhook_bind,
            probe_bind=settings.webhook_probe_bind,
            stop=stop,
            watch=watch,
        )
