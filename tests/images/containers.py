"""The image, built from this tree, and containers of it: buildah builds, a containerd of our own runs them with runc.

Nothing of an installed containerd or of root's images is touched: storage is in a cache folder, the server in a
temporary one. Containers get what Kubernetes' `restricted` standard gives a pod (no capabilities, no new privileges, a
seccomp profile, an unprivileged user), a read-only root, and the network of this machine: they reach what runs beside
them.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from stack import process, wait_until

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deploy" / "images"
BASE = "BEHEST_IMAGE_BASE"
"""The variable that names another base than the one that is made of Debian's packages."""
ARCHIVE = "BEHEST_IMAGE_ARCHIVE"
"""The variable that names an OCI archive of the image (tagged as `NAME`): then nothing is built."""
_OWN_BASE = "localhost/behest-base:bookworm"
NAME = "localhost/behest:test"
"""In the archive. In the storage, which runs beside each other share, each builds under a name of its own."""
USER = "65532:65532"
NEEDED = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
}
"""Program: Debian's package."""
_DEFAULT_CAPABILITIES = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL"
    " AUDIT_WRITE"
)
START_S = 120.0
"""How long a container may take to start, on a machine that does other things too."""
_PAUSES_S = (5.0, 30.0)
"""Before the base is made again: a mirror of packages may fail once."""
_numbers = count(1)


def missing() -> str:
    """What this machine lacks, as a sentence; empty where it lacks nothing."""
    unneeded = {"buildah", "debootstrap"} if ARCHIVE in os.environ else {"debootstrap"} if BASE in os.environ else set()
    packages = [package for program, package in NEEDED.items() if program not in unneeded and not shutil.which(program)]
    if packages:
        return f"missing programs (Debian: apt install {' '.join(dict.fromkeys(packages))})"
    if os.geteuid() != 0:
        return "root is needed: containers are made without a service that would lend its own rights"
    return ""


@dataclass(frozen=True)
class Image:
    """A built image."""

    archive: Path
    """An OCI archive."""
    config: dict[str, Any]
    """The member `config` of its OCI configuration: User, Env, Entrypoint, Labels."""
    layers: int
    compressed_bytes: int
    build_s: float


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "behest" / "images"


def _run(arguments: list[str], environment: Mapping[str, str]) -> str:
    ran = subprocess.run(
        arguments, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=900
    )
    assert ran.returncode == 0, f"{' '.join(arguments)}: {ran.stderr[-4000:]}"
    return ran.stdout


@contextmanager
def built_image(folder: Path) -> Generator[Image]:
    """The image, built from this tree unless an archive is named."""
    started_s = time.monotonic()
    archive = Path(os.environ[ARCHIVE]) if ARCHIVE in os.environ else _build(folder)
    build_s = time.monotonic() - started_s
    with tarfile.open(archive) as opened:

        def blob(digest: str) -> dict[str, Any]:
            return _member(opened, "blobs/" + digest.replace(":", "/"))

        manifest = blob(_member(opened, "index.json")["manifests"][0]["digest"])
        config = blob(manifest["config"]["digest"])["config"]
    sizes = [layer["size"] for layer in manifest["layers"]]
    yield Image(archive, config, len(sizes), sum(sizes), build_s)


def _build(folder: Path) -> Path:
    """Build it with buildah, without a registry: the base is made once of Debian packages, and kept."""
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    buildah = f"buildah --storage-driver vfs --root {cache}/root --runroot {folder}/runroot"
    environment = {"BUILDAH": buildah, "BUILDER": buildah, "BUILDAH_ISOLATION": "chroot"}
    base = os.environ.get(BASE, _OWN_BASE)
    if base == _OWN_BASE:
        with (cache / "base.lock").open("w") as lock:  # runs beside each other make it once
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = _run([*buildah.split(), "images", "--format", "{{.Name}}:{{.Tag}}"], environment).split()
            if base not in known:
                _make_base(base, environment)
    options = ["--build-arg", f"BASE={base}"]
    for variable in ("PIP_INDEX_URL", "PIP_CERT"):
        if value := os.environ.get(variable):
            options += ["--build-arg", f"{variable}={value}"]
            options += ["--volume", f"{value}:{value}:ro"] if variable == "PIP_CERT" else []
    built = f"{NAME}-{folder.name.lower()}"
    _run([str(IMAGES / "build.sh"), built, *options], environment)
    archive = folder / "image.tar"
    try:
        _run([*buildah.split(), "push", "--quiet", built, f"oci-archive:{archive}:{NAME}"], environment)
    finally:
        _run([*buildah.split(), "rmi", built], environment)
    return archive


def _make_base(base: str, environment: Mapping[str, str]) -> None:
    script = str(IMAGES / "base-without-registry.sh")
    for pause_s in _PAUSES_S:
        with contextlib.suppress(AssertionError):
            _run([script, base], environment)
            return
        time.sleep(pause_s)
    _run([script, base], environment)


def _member(archive: tarfile.TarFile, name: str) -> dict[str, Any]:
    opened = archive.extractfile(name)
    assert opened is not None
    found: dict[str, Any] = json.load(opened)
    return found


@dataclass
class Container:
    """A running container."""

    pid: int
    """Of its first process, as the host counts."""
    runner: subprocess.Popen[bytes]
    """ctr: it passes signals on, and ends with the container's exit status."""
    log: Path

    def tell_to_end(self) -> None:
        """SIGTERM to the first process, as a kubelet has it sent. ctr passes nothing on in its own first moments."""
        os.kill(self.pid, signal.SIGTERM)

    def status(self, name: str) -> str:
        """A line of the first process' /proc status, such as `VmRSS`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return line.partition(":")[2].strip()
        raise KeyError(name)


@dataclass
class Containers:
    """A containerd with the image in it."""

    image: Image
    socket: Path
    folder: Path

    def _ctr(self, *arguments: str) -> list[str]:
        return ["ctr", "--address", str(self.socket), *arguments]

    def ctr(self, *arguments: str) -> str:
        """Run ctr, and return what it prints."""
        return _run(self._ctr(*arguments), {})

    def _arguments(
        self,
        arguments: tuple[str, ...],
        *,
        user: str = USER,
        environment: Mapping[str, str] | None = None,
        state: Path | None = None,
        pid_file: Path | None = None,
    ) -> list[str]:
        identity = f"behest-{next(_numbers)}"
        options = ["--net-host", "--read-only", "--seccomp"]
        options += [word for name in _DEFAULT_CAPABILITIES.split() for word in ("--cap-drop", f"CAP_{name}")]
        options += [word for name, value in (environment or {}).items() for word in ("--env", f"{name}={value}")]
        if state is not None:
            options += ["--mount", f"type=bind,src={state},dst=/var/run/behest,options=rbind:rw"]
        running = ["--rm", *([] if pid_file is None else ["--pid-file", str(pid_file)])]
        if user == self.image.config["User"]:
            return self._ctr("run", *running, *options, NAME, identity, *arguments)
        return self._ctr("run", *running, "--config", str(self._as_user(user, options, arguments)), identity)

    def _as_user(self, user: str, options: list[str], arguments: tuple[str, ...]) -> Path:
        """The same container for another user: this ctr cannot say one, so its description is taken and changed."""
        rootfs = self.folder / "rootfs"
        if not rootfs.exists():
            rootfs.mkdir()
            self.ctr("images", "mount", NAME, str(rootfs))
        identity = f"description-{next(_numbers)}"
        self.ctr("containers", "create", *options, NAME, identity)
        spec: dict[str, Any] = json.loads(self.ctr("containers", "info", identity))["Spec"]
        self.ctr("containers", "delete", identity)
        uid, _, gid = user.partition(":")
        spec["process"]["args"] = list(arguments)
        spec["process"]["user"] = {"uid": int(uid), "gid": int(gid)}
        spec["root"]["path"] = str(rootfs)
        file = self.folder / f"{identity}.json"
        file.write_text(json.dumps(spec))
        return file

    def _behest(self, arguments: tuple[str, ...]) -> tuple[str, ...]:
        """As a kubelet does: what is given stands in for CMD, after ENTRYPOINT."""
        return (*self.image.config["Entrypoint"], *arguments)

    def output(self, *arguments: str, user: str = USER) -> str:
        """What a container of its own prints until it ends."""
        return _run(self._arguments(self._behest(arguments), user=user), {})

    def python(self, code: str) -> str:
        """What the image's Python prints."""
        return _run(self._arguments(("/opt/behest/bin/python3", "-c", code)), {})

    @contextmanager
    def running(
        self, *arguments: str, environment: Mapping[str, str], state: Path, user: str = USER
    ) -> Generator[Container]:
        """A container with /var/run/behest as its only place to write, until the block ends."""
        log = self.folder / f"{next(_numbers)}.log"
        pid_file = log.with_suffix(".pid")
        command = self._arguments(
            self._behest(arguments), user=user, environment=environment, state=state, pid_file=pid_file
        )
        with process(command, environment={}, log=log) as runner:

            def pid() -> int | None:
                assert runner.poll() is None, log.read_text()
                return int(pid_file.read_text()) if pid_file.exists() and pid_file.read_text() else None

            number: int = wait_until(pid, timeout_s=START_S, what="the container's making")

            def is_ours() -> bool:
                assert runner.poll() is None, log.read_text()
                # Until then it is runc, which prepares the container from inside.
                return Path(f"/proc/{number}/cmdline").read_bytes().startswith(b"/opt/behest/")

            wait_until(is_ours, timeout_s=START_S, what="the container's start")
            yield Container(number, runner, log)


@contextmanager
def running_containerd(image: Image, folder: Path) -> Generator[Containers]:
    """A containerd of our own that knows the image; what still runs in it is ended with it."""
    socket = folder / "sock"
    configuration = folder / "config.toml"
    configuration.write_text(
        f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n  address = "{socket}"\n'
    )
    log = folder / "containerd.log"
    with process(["containerd", "--config", str(configuration)], environment={}, log=log) as server:

        def is_up() -> bool:
            assert server.poll() is None, log.read_text()
            return subprocess.run(["ctr", "--address", str(socket), "version"], capture_output=True).returncode == 0

        wait_until(is_up, timeout_s=START_S, what="containerd's start")
        containers = Containers(image, socket, folder)
        containers.ctr("images", "import", str(image.archive))
        try:
            yield containers
        finally:
            for identity in containers.ctr("tasks", "list", "--quiet").split():
                with contextlib.suppress(AssertionError):
                    containers.ctr("tasks", "delete", "--force", identity)
            if (folder / "rootfs").exists():
                containers.ctr("images", "unmount", str(folder / "rootfs"))
