"""One image and one containerd for the whole run."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from images.containers import Containers, Image, built_image, missing, running_containerd


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A short path, because sockets are in it."""
    if lack := missing():
        pytest.exit(f"make test-image cannot run here: {lack}", returncode=3)
    with tempfile.TemporaryDirectory(prefix="behest-image-") as name:
        # Containers run as somebody else.
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="session")
def image(folder: Path) -> Iterator[Image]:
    """The image, built from this tree."""
    with built_image(folder) as built:
        yield built


@pytest.fixture(scope="session")
def containers(image: Image, folder: Path) -> Iterator[Containers]:
    """Where containers of it run."""
    with running_containerd(image, folder) as running:
        yield running
