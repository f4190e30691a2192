from pathlib import Path
from typing import Any

import msgspec
import pytest

from behest_ledger.configuration import kinds
from behest_operator.crds import KINDS, definition, written


def schemas(schema: dict[str, Any], path: str = "spec") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, schema)]
    for name, inner in schema.get("properties", {}).items():
        found += schemas(inner, f"{path}.{name}")
    for member in ("items", "additionalProperties"):
        if member in schema:
            found += schemas(schema[member], f"{path}[]")
    return found


def spec_of(kind: str) -> dict[str, Any]:
    (version,) = definition(kind)["spec"]["versions"]
    spec: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return spec


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_the_chart_are_what_is_generated(kind: str, repository: Path) -> None:
    path = repository / "deploy" / "helm" / "behest" / "crd-bases" / f"{kind.lower()}s.yaml"
    assert path.read_text() == written(kind), "run: python -m behest_operator.crds deploy/helm/behest/crd-bases"


@pytest.mark.parametrize("kind", KINDS)
def test_every_string_list_and_map_is_bounded(kind: str) -> None:
    bounds = {"string": {"maxLength", "enum"}, "array": {"maxItems"}}
    for path, schema in schemas(spec_of(kind)):
        if schema["type"] in bounds:
            assert bounds[schema["type"]] & schema.keys(), path
        if "additionalProperties" in schema:
            assert "maxProperties" in schema, path


@pytest.mark.parametrize("kind", KINDS)
def test_every_member_of_a_type_is_in_its_schema_and_required_where_it_is(kind: str) -> None:
    model = getattr(kinds, f"{kind}Spec")
    fields = msgspec.structs.fields(model)
    assert spec_of(kind)["properties"].keys() == {field.encode_name for field in fields}
    assert set(spec_of(kind).get("required", [])) == {field.encode_name for field in fields if field.required}


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_explained_by_the_docstrings_of_the_types(kind: str) -> None:
    (version,) = definition(kind)["spec"]["versions"]
    assert version["schema"]["openAPIV3Schema"]["description"]
    documented = [path for path, schema in schemas(spec_of(kind)) if "description" in schema]
    assert len(documented) >= 2
