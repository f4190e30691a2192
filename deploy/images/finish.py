"""The last step of the image's build, run in it as root: nothing is left that installs, everything is compiled.

Bytecode is compiled here because nothing can be written later, and the official Python images bring none for the
standard library: without it each start costs a second more. It is bound to its source by a hash that is not looked
at again (PEP 552), so that times of files change neither the image nor the start.
"""

import compileall
import os
import py_compile
import shutil
import sys
import sysconfig
from pathlib import Path

APPLICATION = Path("/opt/behest")
UID = 65532
STATE = Path("/var/run/behest")

INSTALLERS = ("pip", "setuptools", "wheel", "pkg_resources", "_distutils_hack", "ensurepip", "venv")
UNUSED = ("idlelib", "lib2to3", "tkinter", "turtledemo", "turtle.py", "test", "pydoc_data")


def remove(path: Path) -> None:
    """Remove a file or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def trim() -> None:
    """Remove installers, and parts of the standard library that a server has no use for."""
    standard = Path(sysconfig.get_path("stdlib"))
    for folder in {standard, *(standard / name for name in ("site-packages", "dist-packages"))}:
        for name in (*INSTALLERS, *UNUSED):
            for path in (folder / name, *folder.glob(f"{name}-*.dist-info")):
                if path.exists():
                    remove(path)
    for pattern in ("pip*", "idle*", "2to3*", "pydoc*"):
        for path in Path(sys.base_prefix, "bin").glob(pattern):
            remove(path)
    for name in ("/usr/share/python-wheels", "/usr/share/doc", "/usr/share/man", "/usr/share/locale"):
        shutil.rmtree(name, ignore_errors=True)


def compile_all() -> None:
    """Compile the standard library and the application."""
    for folder in (Path(sysconfig.get_path("stdlib")), APPLICATION):
        for cache in sorted(folder.rglob("__pycache__")):
            shutil.rmtree(cache)
        # Some packages bring sources that no Python of today compiles: whoever imports them would be told.
        compileall.compile_dir(
            folder, quiet=2, force=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )


def name_user() -> None:
    """Give the image's user a name, and the one folder that is its own."""
    with Path("/etc/passwd").open("a") as users, Path("/etc/group").open("a") as groups:
        users.write(f"behest:x:{UID}:{UID}:behest:/nonexistent:/usr/sbin/nologin\n")
        groups.write(f"behest:x:{UID}:\n")
    STATE.mkdir(parents=True)
    # Group 0 as well: OpenShift runs images under a number of its own in that group.
    os.chown(STATE, UID, 0)
    STATE.chmod(0o770)


if __name__ == "__main__":
    trim()
    compile_all()
    name_user()
    Path(__file__).unlink()
