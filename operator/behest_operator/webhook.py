"""The admission webhook's answer: an AdmissionReview in, an AdmissionReview out (`admission.k8s.io/v1`)."""

import base64
import json
import logging
from typing import Any

from behest_operator.annotations import AnnotationError
from behest_operator.sidecar import PodRefused, Template, patch

logger = logging.getLogger(__name__)


class ReviewError(ValueError):
    """What came is no AdmissionReview of a pod."""


def review(document: Any, template: Template) -> dict[str, Any]:
    """The answer to a review: allowed, with the patch that adds the sidecar, or refused with the reason.

    Raises `ReviewError`; a fault of ours is never an "allowed", so that money fails closed.
    """
    try:
        request = document["request"]
        uid, pod = request["uid"], request["object"]
        namespace = request.get("namespace") or pod["metadata"].get("namespace") or "default"
        kind = request["kind"]["kind"]
    except (KeyError, TypeError, AttributeError):
        raise ReviewError("the body is no AdmissionReview with a request of an object") from None
    if document.get("apiVersion") != "admission.k8s.io/v1" or kind != "Pod":
        raise ReviewError("this webhook reviews pods by admission.k8s.io/v1")
    response: dict[str, Any] = {"uid": uid, "allowed": True}
    try:
        operations = patch(pod, namespace=namespace, template=template)
    except (PodRefused, AnnotationError) as error:
        logger.info("pod refused in namespace %s: %s", namespace, error)
        status = {"code": 400, "reason": "Invalid", "message": f"behest: {error}"}
        response = {"uid": uid, "allowed": False, "status": status}
    else:
        if operations:
            text = json.dumps(operations, separators=(",", ":")).encode()
            response |= {"patchType": "JSONPatch", "patch": base64.b64encode(text).decode()}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
