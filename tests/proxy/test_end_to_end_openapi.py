"""The description of the API is true: whatever it allows or forbids is tried against the running system."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from behest_proxy.app.openapi import openapi_document, reference_page
from stack import Project, Stack

OPERATIONS = [(path, method) for path, operations in openapi_document()["paths"].items() for method in operations]
EXAMPLES = 12
EVERY_HEALTH_CHECK: Any = list(HealthCheck)


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


@pytest.fixture(scope="module")
def tool() -> Any:
    """Its modules are put together when it is imported, which takes a second: for those alone who use it."""
    import schemathesis

    return schemathesis


def test_the_description_is_served_to_everybody_and_the_page_is_made_of_it(stack: Stack, repository: Path) -> None:
    answer = httpx.get(stack.base_url + "/openapi.json")
    assert answer.json() == openapi_document()
    # To make it anew: python -c 'from behest_proxy.app.openapi import *; print(reference_page(), end="")' > docs/api.md
    assert (repository / "docs" / "api.md").read_text() == reference_page()


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=[f"{method} {path}" for path, method in OPERATIONS])
def test_every_answer_is_as_described(project: Project, tool: Any, path: str, method: str) -> None:
    schema: Any = tool.openapi.from_dict(openapi_document())
    operation = schema[path][method.upper()]
    credential = project.api_key if path.endswith("/mint") else project.mint(role="admin", session=None)

    seen: set[int] = set()

    @seed(0)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=EVERY_HEALTH_CHECK,
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def holds(case: Any) -> None:
        response = case.call(
            base_url=project.stack.base_url, headers={"Authorization": f"Bearer {credential}"}, timeout=30
        )
        seen.add(response.status_code)
        case.validate_response(
            response,
            checks=[
                tool.checks.not_a_server_error,
                tool.specs.openapi.checks.status_code_conformance,
                tool.specs.openapi.checks.content_type_conformance,
                tool.specs.openapi.checks.response_schema_conformance,
            ],
        )

    holds()
    if "thread_id" not in path:
        assert 200 in seen  # else nothing was tried but refusals
    refused = httpx.request(method, project.stack.base_url + path, json={})
    if operation.definition.raw["security"]:
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_token")
