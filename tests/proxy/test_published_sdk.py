"""The published Python SDK, as it is on PyPI, in an environment of its own: every call that it has."""

import json
import os
import subprocess
import textwrap
from pathlib import Path

from behest_proxy.identity.keys import SigningKey
from own_python import python_with
from stack import Stack

SDK = ["behest-ai==1.5.0b1", "openai<3", "httpx"]
"""It imports httpx without asking for it: in its time every openai brought it."""


def test_the_published_sdk_works_unmodified_in_every_call_it_has(stack: Stack) -> None:
    python = python_with("published-sdk", *SDK)
    key = SigningKey.generate()
    pem = textwrap.indent(key.public_pem(), " " * 6)
    project = stack.project(project=f"  signingKeys:\n  - kid: sk_test\n    publicKey: |\n{pem}")
    stack.apply(
        "apiVersion: behest.ai/v1alpha1\nkind: Tier\n"
        f"metadata: {{name: hasty, namespace: {project.namespace}}}\nspec: {{number: 7, requestsPerDay: 1}}\n"
    )
    given = {
        "base_url": stack.base_url,
        "api_key": project.api_key,
        "poor_api_key": stack.project(limit_usd="0.00000001").api_key,
        "kid": "sk_test",
        "tenant_id": project.namespace,
        "project_id": project.project_id,
        "pem": key.private_pem().decode(),
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BEHEST_", "PYTHON"))}
    done = subprocess.run(
        [str(python), "-I", "-W", "error", str(Path(__file__).with_name("published_sdk.py"))],
        env={**environment, "GIVEN": json.dumps(given), "NO_PROXY": "127.0.0.1,localhost"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
