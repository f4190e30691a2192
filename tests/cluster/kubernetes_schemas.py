"""What versions of Kubernetes say of their own kinds: the OpenAPI documents that are part of its source.

They come out of Go's module cache, or once from its proxy, and what is needed of them is kept beside the programs.
"""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from cluster.binaries import ProgramMissing, fetched
from cluster.binaries import cache as folder_of_programs

VERSIONS = ("1.35.4", "1.36.3", "1.37.2")
"""The three newest minor versions."""
_SCHEMAS = "#/components/schemas/"


class Schemas:
    """The kinds of one version."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._documents: dict[str, dict[str, Any]] = {}

    def problems(self, item: dict[str, Any]) -> list[str]:
        """What is wrong with an object, by path; nothing: it is as this version wants it.

        Strict: a member that the version does not know is a problem, for its API server would drop it.
        """
        schemas = self._of(item["apiVersion"])
        group, _, version = item["apiVersion"].rpartition("/")
        wanted = {"group": group, "version": version, "kind": item["kind"]}
        for schema in schemas.values():
            if wanted in schema.get("x-kubernetes-group-version-kind", []):
                return list(_problems(item, schema, schemas, item["kind"]))
        return [f"{item['apiVersion']} has no kind {item['kind']}"]

    def _of(self, api_version: str) -> dict[str, Any]:
        if api_version not in self._documents:
            name = f"apis__{api_version.replace('/', '__')}" if "/" in api_version else f"api__{api_version}"
            path = self._folder / f"{name}_openapi.json"
            if not path.exists():
                return {}
            self._documents[api_version] = json.loads(path.read_text())["components"]["schemas"]
        return self._documents[api_version]


@cache
def schemas_of(version: str) -> Schemas:
    """The kinds of a version such as `1.37.2`. Raises `ProgramMissing`."""
    folder = folder_of_programs() / f"kubernetes-openapi-{version}"
    if not folder.exists():
        _fetch(version, folder)
    return Schemas(folder)


def _fetch(version: str, folder: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise ProgramMissing(f"what Kubernetes {version} says of its kinds cannot be had without Go")
    command = [go, "mod", "download", "-json", f"k8s.io/kubernetes@v{version}"]
    answer = fetched(command, f"Kubernetes {version}", cwd=folder.parent, env={**os.environ, "GOFLAGS": "-mod=mod"})
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    source = Path(json.loads(answer)["Dir"]) / "api" / "openapi-spec" / "v3"
    shutil.copytree(source, unfinished, copy_function=shutil.copyfile)
    unfinished.rename(folder)


def _problems(value: Any, schema: dict[str, Any], schemas: dict[str, Any], path: str) -> list[str]:
    for reference in [schema, *schema.get("allOf", [])]:
        if "$ref" in reference:
            return _problems(value, schemas[reference["$ref"].removeprefix(_SCHEMAS)], schemas, path)
    if "oneOf" in schema:
        fits = any(not _problems(value, choice, schemas, path) for choice in schema["oneOf"])
        return [] if fits else [f"{path}: {value!r} is none of {schema['oneOf']}"]
    kind = schema.get("type")
    if kind is not None and not _is(value, kind):
        return [f"{path}: {value!r} is no {kind}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path}: {value!r} is none of {schema['enum']}"]
    if isinstance(value, list):
        return [
            text
            for number, inner in enumerate(value)
            for text in _problems(inner, schema.get("items", {}), schemas, f"{path}[{number}]")
        ]
    if not isinstance(value, dict):
        return []
    found = [f"{path}.{name}: is missing" for name in schema.get("required", []) if name not in value]
    for name, inner in value.items():
        known = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        if known is None:
            # A schema that names no members at all takes any: definitions of other schemas.
            found += [f"{path}.{name}: is unknown"] if "properties" in schema else []
        else:
            found += _problems(inner, known, schemas, f"{path}.{name}")
    return found


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
    return isinstance(value, {"string": str, "boolean": bool, "array": list, "object": dict}[kind])
