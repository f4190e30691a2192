"""The control plane that the cluster's tests share."""

from collections.abc import Iterator

import pytest

from cluster.control_plane import ControlPlane, running_control_plane
from cluster.resources import forget_resources


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """One real API server for the whole run. Where it cannot be had, the run fails and says what to install."""
    with running_control_plane() as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def nothing_of_ours_is_left(control_plane: ControlPlane) -> Iterator[None]:
    """An operator of the next file looks after every resource that it finds: those of one file go with it."""
    yield
    forget_resources(control_plane)
