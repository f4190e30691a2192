"""Labels of namespaces, which say whose they are: thousands of resources ask, and few need an answer of their own."""

import asyncio
import time
from collections.abc import Mapping
from math import inf

from behest_operator.kubernetes import Kubernetes

Labels = Mapping[str, str]


class NamespaceLabels:
    """Reads them, one call at a time for each namespace: who asks meanwhile shares the next call."""

    def __init__(self, kubernetes: Kubernetes) -> None:
        self._kubernetes = kubernetes
        self._locks: dict[str, asyncio.Lock] = {}
        self._next: dict[str, asyncio.Task[Labels]] = {}
        self._last: dict[str, tuple[Labels, float]] = {}

    async def now(self, namespace: str) -> Labels:
        """As they are: read after this was called. Raises `KubernetesError`."""
        reading = self._next.get(namespace)
        if reading is None:
            reading = self._next[namespace] = asyncio.create_task(self._read(namespace))
        # Whoever asked first may go: the others wait on.
        return await asyncio.shield(reading)

    async def lately(self, namespace: str, age_s: float) -> Labels:
        """As they were at most so long ago. Raises `KubernetesError`."""
        labels, read_at_s = self._last.get(namespace, ({}, -inf))
        return labels if time.monotonic() - read_at_s < age_s else await self.now(namespace)

    async def _read(self, namespace: str) -> Labels:
        async with self._locks.setdefault(namespace, asyncio.Lock()):
            # Who asks from here on may know of a change that this call does not see.
            del self._next[namespace]
            found = await self._kubernetes.get(f"/api/v1/namespaces/{namespace}")
        labels = dict((found or {}).get("metadata", {}).get("labels") or {})
        self._last[namespace] = (labels, time.monotonic())
        return labels
