"""Read manifests: text or objects in, typed and valid resources out, or all that is wrong with them."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from behest_ledger.configuration.documents import DocumentError, read_documents
from behest_ledger.configuration.kinds import (
    API_VERSION,
    Budget,
    BudgetSpec,
    Manifest,
    Metadata,
    Project,
    ProjectSpec,
    Tier,
    TierSpec,
    Upstream,
    UpstreamSpec,
)
from behest_ledger.configuration.problems import (
    InvalidManifestsError,
    ManifestError,
    Problem,
    explain_validation_error,
    listed,
    shown,
)
from behest_ledger.configuration.validation import problems_of, problems_of_metadata

__all__ = ["InvalidManifestsError", "Manifest", "ManifestError", "from_object", "parse"]

_PartT = TypeVar("_PartT", bound=msgspec.Struct)

_SPECS: dict[str, type[msgspec.Struct]] = {
    "Project": ProjectSpec,
    "Upstream": UpstreamSpec,
    "Tier": TierSpec,
    "Budget": BudgetSpec,
}

# What an API server adds to an object's metadata: it says nothing about what is wanted.
_SERVER_METADATA = frozenset(
    {
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generateName",
        "generation",
        "managedFields",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    }
)


def parse(text: str, default_namespace: str = "default", *, source: str = "") -> list[Manifest]:
    """The manifests of a text: YAML with any number of documents, JSON, or a `List` of either.

    `source` names the file in errors. Raises `InvalidManifestsError` with every error that was found; a text
    with no manifest in it is an error too.
    """
    errors: list[ManifestError] = []
    manifests: list[Manifest] = []
    try:
        documents = read_documents(text)
    except DocumentError as error:
        raise InvalidManifestsError([ManifestError(error.reason, document=error.document, source=source)]) from None
    if not documents:
        raise InvalidManifestsError([ManifestError("there is no manifest in it", source=source)])
    for number, value in documents:
        try:
            manifests.append(from_object(value, default_namespace, document=number, source=source))
        except InvalidManifestsError as error:
            errors += error.errors
    errors += _told_twice(manifests, source)
    if errors:
        raise InvalidManifestsError(errors)
    return manifests


def from_object(
    value: Any, default_namespace: str = "default", *, document: int | None = None, source: str = ""
) -> Manifest:
    """The manifest in a decoded object, as an API server gives it.

    `status` and what a server adds to metadata are passed over. Raises `InvalidManifestsError`.
    """
    subject = _subject(value, default_namespace)

    def refusal(problems: list[Problem]) -> InvalidManifestsError:
        return InvalidManifestsError(
            ManifestError(reason, path=path, subject=subject, document=document, source=source)
            for path, reason in problems
        )

    if not isinstance(value, Mapping):
        must = "a manifest must be a mapping with apiVersion, kind, metadata and spec"
        raise refusal([("", f"{must}, got {shown(value)}")])
    problems = _envelope_problems(value)
    if problems:
        raise refusal(problems)
    kind: str = value["kind"]
    try:
        metadata = _metadata(value["metadata"], default_namespace)
    except _PartError as error:
        raise refusal([error.problem]) from None
    problems = problems_of_metadata(metadata)
    try:
        spec = _convert(value["spec"], _SPECS[kind], root="spec")
    except _PartError as error:
        raise refusal([*problems, error.problem]) from None
    manifest = _manifest(metadata, spec, document, source)
    problems += problems_of(manifest)
    if problems:
        raise refusal(problems)
    return manifest


def _manifest(metadata: Metadata, spec: msgspec.Struct, document: int | None, source: str) -> Manifest:
    match spec:
        case ProjectSpec():
            return Project(metadata=metadata, spec=spec, document=document, source=source)
        case UpstreamSpec():
            return Upstream(metadata=metadata, spec=spec, document=document, source=source)
        case TierSpec():
            return Tier(metadata=metadata, spec=spec, document=document, source=source)
        case BudgetSpec():
            return Budget(metadata=metadata, spec=spec, document=document, source=source)
        case _:
            raise AssertionError(type(spec))


def _envelope_problems(value: Mapping[Any, Any]) -> list[Problem]:
    problems: list[Problem] = []
    version = value.get("apiVersion")
    if version != API_VERSION:
        problems.append(("apiVersion", f"must be {API_VERSION}, got {shown(version)}"))
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in _SPECS:
        problems.append(("kind", f"must be {listed(_SPECS)}, got {shown(kind)}"))
    for member in ("metadata", "spec"):
        if member not in value:
            problems.append((member, "is required"))
        elif not isinstance(value[member], Mapping):
            problems.append((member, f"must be a mapping, got {shown(value[member])}"))
    problems += [
        ("", f"has no member {shown(key)}; there are apiVersion, kind, metadata and spec")
        for key in value
        if key not in ("apiVersion", "kind", "metadata", "spec", "status")
    ]
    return problems


class _PartError(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem


def _metadata(value: Mapping[Any, Any], default_namespace: str) -> Metadata:
    wanted = {key: item for key, item in value.items() if key not in _SERVER_METADATA}
    if wanted.get("namespace") is None:
        wanted["namespace"] = default_namespace
    return _convert(wanted, Metadata, root="metadata")


def _convert(value: Mapping[Any, Any], model: type[_PartT], *, root: str) -> _PartT:
    try:
        return msgspec.convert(value, model)
    except msgspec.ValidationError as error:
        raise _PartError(explain_validation_error(error, value, model, root=root)) from None


def _subject(value: Any, default_namespace: str) -> str:
    """`<kind> <namespace>/<name>` as far as a possibly broken manifest tells them."""
    if not isinstance(value, Mapping):
        return ""
    kind = value.get("kind")
    shown_kind = kind if isinstance(kind, str) and re.fullmatch(r"\w{1,40}", kind) else "manifest"
    metadata = value.get("metadata")
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("name"), str):
        return shown_kind
    namespace = metadata.get("namespace") or default_namespace
    return f"{shown_kind} {str(namespace)[:63]}/{metadata['name'][:63]}"


def _told_twice(manifests: list[Manifest], source: str) -> list[ManifestError]:
    seen: dict[tuple[str, str], Manifest] = {}
    errors: list[ManifestError] = []
    for manifest in manifests:
        key = (manifest.kind, manifest.qualified_name)
        first = seen.setdefault(key, manifest)
        if first is not manifest:
            reason = f"is there twice, first in document {first.document}"
            errors.append(ManifestError(reason, subject=" ".join(key), document=manifest.document, source=source))
    return errors
