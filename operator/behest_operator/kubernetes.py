"""The few calls to the Kubernetes API that kopf does not make for us: Secrets, namespaces, status, Events.

Configured like every client in a pod, by the service account's files, or outside one by `KUBECONFIG` (token or client
certificate). The token file is read again for each call: the kubelet rotates it.
"""

import base64
import json
import os
import ssl
import tempfile
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 15.0

Object = dict[str, Any]


class KubernetesError(Exception):
    """The API server refused a call or could not be reached."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status


class Credentials:
    """Where the API server is, and who we are."""

    def __init__(
        self, *, server: str, context: ssl.SSLContext, token_file: Path | None = None, token: str | None = None
    ) -> None:
        self.server = server.rstrip("/")
        self.context = context
        self._token_file = token_file
        self._token = token

    def headers(self) -> dict[str, str]:
        """The authorization of one call."""
        token = self._token_file.read_text().strip() if self._token_file is not None else self._token
        return {"Authorization": f"Bearer {token}"} if token else {}

    @classmethod
    def find(cls) -> Self:
        """The pod's own, or those of `KUBECONFIG`. Raises `KubernetesError` where there are none."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if host and (SERVICE_ACCOUNT / "token").exists():
            shown_host = f"[{host}]" if ":" in host else host
            context = ssl.create_default_context(cafile=str(SERVICE_ACCOUNT / "ca.crt"))
            return cls(server=f"https://{shown_host}:{port}", context=context, token_file=SERVICE_ACCOUNT / "token")
        kubeconfig = os.environ.get("KUBECONFIG")
        if not kubeconfig:
            raise KubernetesError(0, "this is no pod with a service account, and KUBECONFIG is not set")
        try:
            return cls._from_kubeconfig(Path(kubeconfig))
        except yaml.YAMLError as error:
            # Whole, it would show the line that cannot be read: perhaps the one with the token.
            mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
            place = f", line {mark.line + 1}" if mark is not None else ""
            raise KubernetesError(0, f"KUBECONFIG: {kubeconfig} is no YAML{place}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KubernetesError(
                0, f"KUBECONFIG: {kubeconfig} cannot be used: {type(error).__name__}: {error}"
            ) from None

    @classmethod
    def _from_kubeconfig(cls, path: Path) -> Self:
        document = yaml.safe_load(path.read_text())
        named = {kind: {item["name"]: item for item in document[kind]} for kind in ("clusters", "users", "contexts")}
        chosen = named["contexts"][document["current-context"]]["context"]
        cluster, user = named["clusters"][chosen["cluster"]]["cluster"], named["users"][chosen["user"]]["user"]
        context = ssl.create_default_context(
            cafile=cluster.get("certificate-authority"), cadata=_decoded(cluster.get("certificate-authority-data"))
        )
        if "client-certificate" in user:
            context.load_cert_chain(user["client-certificate"], user["client-key"])
        elif "client-certificate-data" in user:
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as pair:
                pair.write(f"{_decoded(user['client-certificate-data'])}\n{_decoded(user['client-key-data'])}")
                pair.flush()
                context.load_cert_chain(pair.name)
        return cls(server=cluster["server"], context=context, token=user.get("token"))


def _decoded(text: str | None) -> str | None:
    return base64.b64decode(text).decode() if text else None


class Kubernetes:
    """A client for a handful of kinds. All calls raise `KubernetesError`."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self._credentials.context, limit=8)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), trust_env=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str) -> Object | None:
        """The object at a path; None: there is none."""
        try:
            return await self._call("GET", path)
        except KubernetesError as error:
            if error.status == 404:
                return None
            raise

    async def create(self, path: str, document: Object) -> Object:
        """Create an object in the collection at a path."""
        return await self._call("POST", path, document)

    async def replace(self, path: str, document: Object) -> Object:
        """Replace the object at a path; its resourceVersion, where given, must be the current one."""
        return await self._call("PUT", path, document)

    async def merge(self, path: str, change: Object) -> Object:
        """Change members of the object at a path (JSON merge patch, RFC 7386)."""
        return await self._call("PATCH", path, change, content_type="application/merge-patch+json")

    async def delete(self, path: str) -> None:
        """Delete the object at a path, if it is there."""
        try:
            await self._call("DELETE", path)
        except KubernetesError as error:
            if error.status != 404:
                raise

    async def _call(
        self, method: str, path: str, document: Object | None = None, *, content_type: str = "application/json"
    ) -> Object:
        assert self._session is not None, "used outside its block"
        try:
            headers = {**self._credentials.headers(), "Accept": "application/json"}
            if document is not None:
                headers["Content-Type"] = content_type
            async with self._session.request(
                method, self._credentials.server + path, json=document, headers=headers
            ) as answer:
                text = await answer.text()
                if answer.status >= 400:
                    raise KubernetesError(answer.status, _message(text) or str(answer.reason))
                return _object(text)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise KubernetesError(0, f"{method} {path}: {type(error).__name__}: {error}") from None


def _object(text: str) -> Object:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("the answer is no object")  # noqa: TRY004 - as of text that is no JSON
    return found


def _message(text: str) -> str:
    """What a refusal says: a `Status` from the API server, or whatever something in between has to say."""
    try:
        return str(_object(text).get("message", ""))
    except ValueError:
        return text.strip()[:200]
