"""The control plane that the cluster's tests share."""

from collections.abc import Iterator

import pytest

from cluster.control_plane import ControlPlane, running_control_plane


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """One real API server for the whole run. Where it cannot be had, the run fails and says what to install."""
    with running_control_plane() as running:
        yield running
