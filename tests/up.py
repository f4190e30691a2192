"""`behest up` as its users run it: one process with a PostgreSQL, a simulator, a keeper and a sidecar of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec

from stack import process, wait_until

_BEHEST = [sys.executable, "-I", "-m", "behest_proxy.cli.main"]


class Ready(msgspec.Struct, frozen=True):
    """What `.behest/ready.json` says, as far as it is used here."""

    base_url: str
    api_key: str
    project_id: str


class Up:
    """A running `behest up`, and the folder in which it was started."""

    def __init__(self, folder: Path, ready: Ready) -> None:
        self.folder = folder
        self.base_url = ready.base_url
        self.api_key = ready.api_key
        """Of the demo's project."""

    def behest(self, *arguments: str) -> str:
        """Another command in the same folder: what it prints."""
        done = subprocess.run(
            [*_BEHEST, *arguments],
            cwd=self.folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def project(self, name: str, *, limit_usd: str = "100", origins: Sequence[str] = ()) -> str:
        """A further project beside the demo's, made by `behest apply` and `behest keys`: its API key."""
        manifests = f"""
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: {name}}}
spec: {{defaultModel: gpt-4o-mini, allowedOrigins: {json.dumps(list(origins))}}}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: {name}-sessions}}
spec:
  scope: {{project: {name}}}
  per: [session]
  limit: {{amount: "{limit_usd}", currency: USD}}
  window: {{period: Day}}
"""
        (self.folder / f"{name}.yaml").write_text(manifests)
        self.behest("apply", "-f", f"{name}.yaml")
        key = self.behest("keys", "create", "--project", f"default/{name}").split()[0]
        wait_until(lambda: self.minted(key).is_success, what="the sidecar's reading of the project")
        return key

    def minted(self, api_key: str, *, user: str = "u1") -> httpx.Response:
        """An answer with a token for a user, whose name is also the session's."""
        headers = {"Authorization": f"Bearer {api_key}"}
        body = {"user_id": user, "session_id": user}
        return httpx.post(self.base_url + "/v1/auth/mint", headers=headers, json=body)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BEHEST_")}
    return {**kept, "DATABASE_URL": "", "NO_PROXY": "127.0.0.1,localhost"}


@contextmanager
def behest_up() -> Generator[Up]:
    """Start it in a folder of its own, and stop it as `behest down` does."""
    # Not pytest's own folder: that is closed to others, and root's PostgreSQL runs as somebody else.
    with tempfile.TemporaryDirectory(prefix="behest-up-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        ready, log = folder / ".behest" / "ready.json", folder / "up.log"
        arguments = [*_BEHEST, "up", "--port", "0", "--admin-port", "0", "--data-dir", str(ready.parent)]
        with process(arguments, environment=_environment(), log=log) as child:

            def is_ready() -> bool:
                assert child.poll() is None, log.read_text()
                return ready.exists()

            wait_until(is_ready, timeout_s=120, what="the start of `behest up`")
            yield Up(folder, msgspec.json.decode(ready.read_bytes(), type=Ready))
            child.terminate()
            assert child.wait(30) == 0, log.read_text()
