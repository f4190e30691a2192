"""An API server in memory, as far as the operator needs one, and a way to kill whoever uses it at any of its calls."""

import copy
from itertools import count
from typing import Any

from behest_operator.kubernetes import Kubernetes, KubernetesError, Object


class Killed(BaseException):
    """The process ends here: nothing that it would have done next is done."""


class Steps:
    """Counts what a process does outside itself, and kills it at one of these steps."""

    def __init__(self) -> None:
        self.done = 0
        self.kill_at: int | None = None

    def step(self) -> None:
        """One more. Raises `Killed`."""
        self.done += 1
        if self.done == self.kill_at:
            raise Killed

    def begin(self, kill_at: int | None) -> None:
        """Count anew."""
        self.done, self.kill_at = 0, kill_at


class FakeKubernetes(Kubernetes):
    """Objects by path, with the versions that a real API server counts."""

    def __init__(self, steps: Steps | None = None) -> None:
        self.objects: dict[str, Object] = {}
        self.calls: list[tuple[str, str]] = []
        self.refuse: dict[str, KubernetesError] = {}
        """By the beginning of a path: what the API server answers."""
        self._steps = steps or Steps()
        self._versions = count(1)

    async def _call(
        self, method: str, path: str, document: Object | None = None, *, content_type: str = "application/json"
    ) -> Object:
        self._steps.step()
        self.calls.append((method, path))
        for prefix, error in self.refuse.items():
            if path.startswith(prefix):
                raise error
        answer = copy.deepcopy(self._answer(method, path, copy.deepcopy(document or {})))
        self._steps.step()
        return answer

    def _answer(self, method: str, path: str, document: Object) -> Object:
        if method == "POST":
            path = f"{path}/{document['metadata']['name']}"
            if path in self.objects:
                raise KubernetesError(409, f"{path} already exists")
            return self._keep(path, document)
        found = self.objects.get(path.removesuffix("/status"))
        if found is None:
            raise KubernetesError(404, f"{path} not found")
        version = document.get("metadata", {}).get("resourceVersion")
        if version not in (None, found["metadata"].get("resourceVersion")):
            raise KubernetesError(409, "the object has been modified")
        if method == "PUT":
            return self._keep(path, document)
        if method == "PATCH":
            return self._keep(path.removesuffix("/status"), _merged(found, document))
        if method == "DELETE":
            del self.objects[path]
        return found

    def _keep(self, path: str, document: Object) -> Object:
        document["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[path] = document
        return document


class FaultyConnection:
    """A connection to PostgreSQL whose user is killed at a step."""

    def __init__(self, connection: Any, steps: Steps) -> None:
        self._connection = connection
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._connection, name)
        if name not in ("fetch", "fetchrow", "fetchval", "execute", "executemany"):
            return member

        async def call(*arguments: Any, **options: Any) -> Any:
            self._steps.step()
            answer = await member(*arguments, **options)
            self._steps.step()
            return answer

        return call


def _merged(found: Any, change: Any) -> Any:
    """A JSON merge patch (RFC 7386)."""
    if not isinstance(change, dict):
        return change
    result = dict(found) if isinstance(found, dict) else {}
    for name, value in change.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), value)
    return result
