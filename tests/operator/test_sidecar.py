import base64
import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_operator.annotations import PREFIX, TABLE, AnnotationError
from behest_operator.sidecar import PodRefused, Template, patch
from behest_operator.webhook import ReviewError, review

TEMPLATE = Template(image="registry.example.com/behest:1")


def pod(**spec: Any) -> dict[str, Any]:
    annotations = spec.pop("annotations", {"behest.ai/project": "shop"})
    labels = spec.pop("labels", {"behest.ai/inject": "true", "app": "web"})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web-0", "labels": labels, "annotations": annotations},
        "spec": {"containers": [{"name": "app", "image": "app"}], **spec},
    }


def injected(given_pod: dict[str, Any], template: Template = TEMPLATE) -> dict[str, Any]:
    """The pod after its patch, as the API server would apply it: every operation sets one member."""
    result = copy.deepcopy(given_pod)
    for operation in patch(given_pod, namespace="demo", template=template):
        assert operation["op"] == "add"
        _, part, member = operation["path"].split("/")
        result.setdefault(part, {})[member] = operation["value"]
    return result


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in container.get("env", [])}


def test_a_pod_that_did_not_ask_is_left_alone() -> None:
    assert patch(pod(labels={"app": "web"}), namespace="demo", template=TEMPLATE) == []
    assert patch(pod(labels={"behest.ai/inject": "false"}), namespace="demo", template=TEMPLATE) == []


def test_the_sidecar_is_the_first_init_container_and_never_ends_before_the_others() -> None:
    found = injected(pod(initContainers=[{"name": "prepare", "image": "x"}]))["spec"]["initContainers"]
    assert [(item["name"], item.get("restartPolicy")) for item in found] == [("behest", "Always"), ("prepare", None)]


def test_a_sidecar_behind_a_pooler_is_told_so_and_another_is_told_nothing() -> None:
    pooled = Template(image="behest", database_pooler="transaction")
    assert environment(injected(pod(), pooled)["spec"]["initContainers"][0])["BEHEST_DATABASE_POOLER"] == "transaction"
    assert "BEHEST_DATABASE_POOLER" not in environment(injected(pod())["spec"]["initContainers"][0])


def test_a_sidecar_tells_of_itself_where_the_chart_says_and_the_pods_own_containers_are_told_nothing_of_it() -> None:
    telemetry = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_SAMPLER_ARG": "0.01"}
    template = Template(image="behest", log_format="json", telemetry=telemetry)
    found = injected(pod(), template)["spec"]
    sidecar = environment(found["initContainers"][0])
    assert {name: value for name, value in sidecar.items() if name.startswith("OTEL_")} == telemetry
    assert sidecar["BEHEST_LOG_FORMAT"] == "json"
    assert not [name for name in environment(found["containers"][0]) if name.startswith("OTEL_")]
    assert template.hash != Template(image="behest", log_format="json").hash
    plain = environment(injected(pod())["spec"]["initContainers"][0])
    assert plain["BEHEST_LOG_FORMAT"] == "text"
    assert not [name for name in plain if name.startswith("OTEL_")]


def test_the_containers_learn_where_the_sidecar_is() -> None:
    found = injected(pod(initContainers=[{"name": "prepare", "image": "x"}]))["spec"]
    for container in (found["containers"][0], found["initContainers"][1]):
        assert environment(container) == {
            "BEHEST_BASE_URL": "http://127.0.0.1:8079",
            "OPENAI_BASE_URL": "http://127.0.0.1:8079/v1",
            "OPENAI_API_KEY": "behest-pod",
        }


def test_a_container_with_a_provider_of_its_own_keeps_its_url_and_its_key() -> None:
    own = [{"name": "OPENAI_BASE_URL", "value": "https://api.openai.com/v1"}]
    found = injected(pod(containers=[{"name": "app", "image": "app", "env": own}]))["spec"]["containers"][0]
    assert environment(found) == {
        "OPENAI_BASE_URL": "https://api.openai.com/v1",
        "BEHEST_BASE_URL": "http://127.0.0.1:8079",
    }


def test_with_tokens_only_the_containers_are_left_alone_and_there_is_no_listener_without_tokens() -> None:
    found = injected(pod(annotations={"behest.ai/project": "shop", "behest.ai/pod-auth": "jwt"}))["spec"]
    assert "env" not in found["containers"][0]
    assert "BEHEST_POD_BIND" not in environment(found["initContainers"][0])


def test_the_sidecar_says_whose_workload_it_serves() -> None:
    owned = pod()
    owned["metadata"]["ownerReferences"] = [{"kind": "ReplicaSet", "name": "web-6f9c", "controller": True}]
    owned["metadata"]["labels"]["pod-template-hash"] = "6f9c"
    found = environment(injected(owned)["spec"]["initContainers"][0])
    assert found["BEHEST_WORKLOAD_NAME"] == "web"
    assert found["BEHEST_WORKLOAD_NAMESPACE"] == "demo"
    assert found["BEHEST_WORKLOAD_PROJECT"] == "shop"
    assert json.loads(found["BEHEST_WORKLOAD_LABELS"]) == {"app": "web", "pod-template-hash": "6f9c"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hostNetwork": True}, "host's network"),
        ({"os": {"name": "windows"}}, "is for windows"),
        ({"nodeSelector": {"kubernetes.io/os": "windows"}}, "is for windows"),
        ({"containers": [{"name": "behest", "image": "x"}]}, "container named behest of its own"),
        ({"annotations": {}}, "behest.ai/project is missing"),
        ({"annotations": {"behest.ai/project": "other/shop"}}, r"of this namespace \(demo\), not other/shop"),
        ({"annotations": {"behest.ai/project": "shop", "behest.ai/containers": "web"}}, "names web, which the pod"),
        ({"annotations": {"behest.ai/project": "shop", "behest.ai/port": "8079"}}, "ports of the sidecar must differ"),
    ],
)
def test_a_pod_that_cannot_have_a_sidecar_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(PodRefused, match=reason):
        patch(pod(**change), namespace="demo", template=TEMPLATE)


def test_a_project_of_the_pods_own_namespace_may_be_named_with_it() -> None:
    found = injected(pod(annotations={"behest.ai/project": "demo/shop"}))["spec"]["initContainers"][0]
    assert environment(found)["BEHEST_WORKLOAD_PROJECT"] == "demo/shop"


BAD_VALUES = {
    "project": "Shop!",
    "pod-auth": "none",
    "port": "80",
    "pod-port": "http",
    "admin-port": "70000",
    "image": "not an image",
    "image-pull-policy": "Sometimes",
    "log-level": "loud",
    "cpu-request": "much",
    "cpu-limit": "-1",
    "memory-request": "64 MB",
    "memory-limit": "0",
    "journal-size": "big",
    "drain-seconds": "soon",
    "containers": "a,,b",
}


@pytest.mark.parametrize("name", [row.name for row in TABLE])
def test_a_bad_value_of_an_annotation_is_refused_by_its_name(name: str) -> None:
    annotations = {"behest.ai/project": "shop", PREFIX + name: BAD_VALUES[name]}
    with pytest.raises(AnnotationError, match=f"annotation behest.ai/{name} must"):
        patch(pod(annotations=annotations), namespace="demo", template=TEMPLATE)


def test_a_misspelt_annotation_is_refused_instead_of_ignored() -> None:
    with pytest.raises(AnnotationError, match=r"there is no annotation behest\.ai/projet"):
        patch(pod(annotations={"behest.ai/projet": "shop"}), namespace="demo", template=TEMPLATE)


def test_annotations_go_before_the_template() -> None:
    annotations = {
        "behest.ai/project": "shop",
        "behest.ai/port": "9000",
        "behest.ai/pod-port": "9001",
        "behest.ai/memory-limit": "1Gi",
        "behest.ai/image": "mine:2",
    }
    found = injected(pod(annotations=annotations))["spec"]
    sidecar = found["initContainers"][0]
    assert (sidecar["image"], sidecar["resources"]["limits"]) == ("mine:2", {"memory": "1Gi"})
    assert environment(found["containers"][0])["OPENAI_BASE_URL"] == "http://127.0.0.1:9001/v1"


NAMES = st.sampled_from(["app", "web", "job", "db"])
VARIABLES = st.fixed_dictionaries({"name": st.sampled_from(["A", "OPENAI_BASE_URL"]), "value": st.just("x")})
CONTAINERS = st.lists(
    st.fixed_dictionaries({"name": NAMES, "image": NAMES}, optional={"env": st.lists(VARIABLES)}),
    min_size=1,
    max_size=3,
)


@given(containers=CONTAINERS, init=CONTAINERS | st.none(), volumes=st.booleans(), late=CONTAINERS)
def test_patching_twice_changes_nothing_and_a_container_that_came_later_gets_what_it_lacks(
    containers: list[Any], init: list[Any] | None, volumes: bool, late: list[Any]
) -> None:
    spec: dict[str, Any] = {"containers": containers}
    if init is not None:
        spec["initContainers"] = init
    if volumes:
        spec["volumes"] = [{"name": "data", "emptyDir": {}}]
    once = injected(pod(**spec))
    assert patch(once, namespace="demo", template=TEMPLATE) == []
    assert patch(once, namespace="demo", template=Template(image="other:2")) == []
    once["spec"]["containers"] += copy.deepcopy(late)
    again = injected(once)
    assert all("BEHEST_BASE_URL" in environment(item) for item in again["spec"]["containers"])
    assert again["spec"]["initContainers"] == once["spec"]["initContainers"]
    assert patch(again, namespace="demo", template=TEMPLATE) == []


def test_the_hash_of_the_template_changes_with_everything_in_it() -> None:
    hashes = {TEMPLATE.hash, Template(image="other").hash, Template(image=TEMPLATE.image, port=9999).hash}
    assert len(hashes) == 3


def _review(given_pod: Any) -> dict[str, Any]:
    request = {"uid": "u-1", "kind": {"kind": "Pod"}, "namespace": "demo", "object": given_pod}
    return review({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}, TEMPLATE)


def test_a_review_answers_with_the_patch() -> None:
    response = _review(pod())["response"]
    assert (response["uid"], response["allowed"], response["patchType"]) == ("u-1", True, "JSONPatch")
    assert json.loads(base64.b64decode(response["patch"])) == patch(pod(), namespace="demo", template=TEMPLATE)


def test_a_review_of_a_pod_that_cannot_have_one_is_refused_with_a_message_for_people() -> None:
    response = _review(pod(hostNetwork=True))["response"]
    assert not response["allowed"]
    assert response["status"]["message"].startswith("behest: the pod uses the host's network")


@pytest.mark.parametrize("document", [None, [], {}, {"request": None}, {"request": {"uid": "1", "object": {}}}])
def test_what_is_no_review_is_an_error_and_never_an_allowance(document: Any) -> None:
    with pytest.raises(ReviewError):
        review(document, TEMPLATE)


def test_what_the_collector_wants_to_see_is_read_from_the_pods_own_namespace_and_may_be_missing() -> None:
    template = Template(image="behest", telemetry_headers_secret="collector", telemetry_headers_key="headers")
    (sidecar,) = injected(pod(), template)["spec"]["initContainers"]
    (found,) = [item for item in sidecar["env"] if item["name"] == "OTEL_EXPORTER_OTLP_HEADERS"]
    assert found["valueFrom"] == {"secretKeyRef": {"name": "collector", "key": "headers", "optional": True}}
    assert template.hash != Template(image="behest").hash
