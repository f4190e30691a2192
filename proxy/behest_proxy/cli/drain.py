"""`behest drain`: what a pod runs before it stops its sidecar.

The sidecar says that it is not ready, so that Services send nothing new, and goes on with what it has; the command
waits until that is over, or for as long as the sidecar would wait itself.
"""

import argparse
import http.client
import os
import time
from typing import Any

from behest_proxy.cli.terminal import UserError

LEAST_S = 2.0
"""So long it takes until everybody who routes to the pod knows."""


def add_parser(subparsers: Any) -> None:
    """Add `drain` to the commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "drain",
        help="let a sidecar finish before it is stopped",
        description="Tell the sidecar of this machine or pod that it is about to be stopped, and wait until its streams"
        " are over, at most for BEHEST_DRAIN_S. Found by BEHEST_ADMIN_BIND.",
    )
    parser.add_argument("--least", type=float, default=LEAST_S, metavar="SECONDS", help="wait so long at least")


def run(arguments: argparse.Namespace) -> int:
    """Wait until nothing runs any more. Exit status 0 also when the time is over: the stop comes either way."""
    started_s = time.monotonic()
    most_s = max(float(os.environ.get("BEHEST_DRAIN_S", "") or 2.0), arguments.least)
    while True:
        live = _leave()
        waited_s = time.monotonic() - started_s
        if (live == 0 and waited_s >= arguments.least) or waited_s >= most_s:
            return 0
        time.sleep(0.2)


def _leave() -> int:
    port = os.environ.get("BEHEST_ADMIN_BIND", "127.0.0.1:8081").rpartition(":")[2]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
    try:
        connection.request("POST", "/leave")
        return int(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"there is no sidecar at port {port}: {error}", "set BEHEST_ADMIN_BIND as it has it") from None
    finally:
        connection.close()
