"""The chart with default values, its pods run as a kubelet would: from `helm install` to the first 402, and in time."""

import sys
import time
from collections.abc import Iterator
from functools import partial

import openai
import pytest

from cluster.control_plane import ControlPlane
from cluster.operator_process import condition, eventually
from cluster.release import Release, running_release

APPLICATION = """
import openai, sys
client = openai.OpenAI(max_retries=0)
for number in range(200):
    try:
        for chunk in client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}], stream=True,
            extra_body={"sim": {"output_tokens": 3000}},
        ):
            pass
        print("streamed", number, flush=True)
    except openai.APIStatusError as error:
        print("refused", error.status_code, error.code, flush=True)
        sys.exit(0)
    except openai.APIError as error:
        print("cut", error.code, flush=True)
sys.exit(1)
"""
IN_TIME_S = 20.0
"""Within which what was applied is enforced: two seconds on a machine that does nothing else, or ten times as slow."""


@pytest.fixture(scope="module")
def release(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    with running_release(control_plane, tmp_path_factory.mktemp("release"), "b") as running:
        yield running


def test_from_helm_install_to_the_first_402(control_plane: ControlPlane, release: Release) -> None:
    namespace = release.application("app")
    control_plane.apply(*release.resources(limit="0.02", alertThresholds=[50, 90]), namespace=namespace)
    for kind, name in (("project", "shop"), ("upstream", "openai"), ("tier", "free"), ("budget", "shop")):
        programmed = partial(condition, control_plane, kind, name, namespace, "Programmed", "True")
        eventually(programmed, what=f"the reading of {kind}")
    pod = release.injected(namespace, {"app": [sys.executable, "-c", APPLICATION]})
    try:
        pod.start()
        app = pod.containers["app"]
        assert app.process.wait(300) == 0, app.text() + pod.containers["behest"].text()
        assert "refused 402 quota_exceeded" in app.text()
        table = eventually(
            lambda: (
                (text := control_plane.kubectl("get", "budgets", "--namespace", namespace))
                and "Exhausted" in text
                and text
            ),
            what="the phase Exhausted",
        )
        assert "0.02 USD" in table
        exhausted = condition(control_plane, "budget", "shop", namespace, "Exhausted")
        assert exhausted is not None
        assert (exhausted["status"], exhausted["reason"]) == ("True", "NothingLeft")

        def told() -> bool:
            return {"BudgetWarning", "BudgetExhausted"} <= {event["reason"] for event in release.events(namespace)}

        eventually(told, what="the Events")
    finally:
        pod.stop()
    assert pod.containers["behest"].process.returncode == 0


def test_what_is_applied_is_enforced_within_two_seconds(control_plane: ControlPlane, release: Release) -> None:
    namespace = release.application("fast")
    project, upstream, tier, budget = release.resources(limit="0.000000001")
    # A sidecar needs its namespace's Project to start at all.
    control_plane.apply(project, namespace=namespace)
    pod = release.injected(namespace)
    pod.object["spec"]["containers"] = []
    try:
        pod.start()
        with openai.OpenAI(base_url=pod.url(8079) + "/v1", api_key="behest-pod", max_retries=0) as client:

            def answer() -> str:
                try:
                    client.chat.completions.create(
                        model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}], max_tokens=2
                    )
                except openai.APIStatusError as error:
                    return f"{error.status_code} {error.code}"
                return "200"

            def becomes(wanted: str) -> float:
                """How long after now it is answered so."""
                started_s = time.monotonic()
                eventually(lambda: answer() == wanted, what=f"{wanted}, after {answer()}")
                return time.monotonic() - started_s

            assert answer() != "200", "there is no provider yet"
            control_plane.apply(upstream, tier, namespace=namespace)
            took_s = {"provider": becomes("200")}
            control_plane.apply(budget, namespace=namespace)
            took_s["budget"] = becomes("402 quota_exceeded")
            budget["spec"]["limit"]["amount"] = "100"
            control_plane.apply(budget, namespace=namespace)
            took_s["larger budget"] = becomes("200")
            budget["spec"]["suspended"] = True
            control_plane.apply(budget, namespace=namespace)
            took_s["suspension"] = becomes("403 forbidden")
            print("\nenforced after " + ", ".join(f"{name} {time_s:.2f} s" for name, time_s in took_s.items()))
            assert max(took_s.values()) < IN_TIME_S, took_s
    finally:
        pod.stop()
