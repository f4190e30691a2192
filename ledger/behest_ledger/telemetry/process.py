"""Telling the metrics of a process that serves no requests: the keeper, the operator, the webhook.

Pulled from an address where one is given, pushed by OTLP where `OTEL_*` names a collector; no spans.
"""

import asyncio
import contextlib
import importlib.metadata
import socket
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

import msgspec

from behest_ledger.telemetry.meter import Meter
from behest_ledger.telemetry.names import SERVICE_NAME
from behest_ledger.telemetry.settings import telemetry_settings


@asynccontextmanager
async def told(meter: Meter, role: str, environment: Mapping[str, str], *, bind: str = "") -> AsyncGenerator[None]:
    """Tell what the meter counts while the block runs, and the last at its end.

    `role` ends the name of the service; `bind` (`host:port`) is where Prometheus asks, empty: nowhere. Raises OSError
    where nobody can listen there, and `TelemetrySettingsError`.
    """
    settings = msgspec.structs.replace(telemetry_settings(environment), traces=None)
    async with contextlib.AsyncExitStack() as stack:
        if bind:
            from behest_ledger.telemetry.prometheus import serve_metrics

            stack.callback(serve_metrics(meter, bind))
        if settings.metrics is not None:
            # Loaded only here: who pushes nothing pays for none of it.
            from behest_ledger.telemetry.otlp import Push, resource

            version = importlib.metadata.version("behest-sidecar")
            more = {"service.version": version, "service.instance.id": socket.gethostname()}
            push = Push(settings, meter, resource(more, f"{SERVICE_NAME}-{role}"), version)
            stack.push_async_callback(push.aclose)
            pushing = asyncio.create_task(push.run(), name="telemetry")
            stack.callback(pushing.cancel)
        yield
