import json
import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from behest_ledger.configuration.kinds import Budget, Project, Tier, Upstream, wire_spec
from behest_ledger.configuration.manifests import InvalidManifestsError, from_object, parse
from ledger.sample_manifests import EXAMPLES, INVALID, VALID, budget, manifest, tier


def test_the_documented_examples_are_valid() -> None:
    shop, openai, free, sessions = parse(EXAMPLES)
    assert isinstance(shop, Project)
    assert isinstance(openai, Upstream)
    assert isinstance(free, Tier)
    assert isinstance(sessions, Budget)
    assert openai.spec.models[0].prices is not None
    assert openai.spec.models[0].prices.cache_read == "0.075"
    assert sessions.qualified_name == "demo/shop-sessions"
    assert sessions.document == 4


@pytest.mark.parametrize("right", VALID)
def test_what_is_right_is_taken_and_written_again_means_the_same(right: dict[str, Any]) -> None:
    taken = from_object(right)
    assert from_object(manifest(taken.kind, wire_spec(taken))).spec == taken.spec


@pytest.mark.parametrize(("wrong", "sentence"), INVALID, ids=[sentence for _, sentence in INVALID])
def test_what_is_wrong_is_told_with_its_field(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidManifestsError) as caught:
        from_object(wrong)
    assert sentence in [str(error) for error in caught.value.errors]


@pytest.mark.parametrize(("wrong", "sentence"), INVALID, ids=[sentence for _, sentence in INVALID])
def test_json_and_yaml_are_judged_alike(wrong: dict[str, Any], sentence: str) -> None:
    for text in (json.dumps(wrong), json.dumps(wrong, indent="\t"), yaml.safe_dump(wrong)):
        with pytest.raises(InvalidManifestsError) as caught:
            parse(text)
        assert f"{sentence} (document 1)" in [str(error) for error in caught.value.errors]


def test_every_error_of_every_document_is_told_at_once() -> None:
    text = "---\n".join(yaml.safe_dump(value) for value in (budget(per=["none", "user"]), tier(number=0), tier()))
    with pytest.raises(InvalidManifestsError) as caught:
        parse(text)
    assert [(error.document, error.path) for error in caught.value.errors] == [(1, "spec.per"), (2, "spec.number")]


def test_the_same_resource_twice_is_an_error() -> None:
    text = "---\n".join(yaml.safe_dump(value) for value in (tier(), tier(number=2)))
    with pytest.raises(
        InvalidManifestsError, match=r"Tier demo/it: is there twice, first in document 1 \(document 2\)"
    ):
        parse(text)


def test_a_namespace_that_is_not_told_is_the_default_one() -> None:
    value = tier()
    del value["metadata"]["namespace"]
    assert parse(yaml.safe_dump(value), "prod")[0].namespace == "prod"


def test_what_a_server_adds_is_passed_over() -> None:
    value = tier()
    value["metadata"] |= {"uid": "0-0", "resourceVersion": "7", "managedFields": [{}], "finalizers": ["x"]}
    value["status"] = {"conditions": []}
    assert from_object(value) == from_object(tier())


def test_a_list_stands_for_its_items() -> None:
    value = {"apiVersion": "v1", "kind": "List", "items": [tier(), budget()]}
    assert [manifest.kind for manifest in parse(json.dumps(value))] == ["Tier", "Budget"]
    assert [manifest.kind for manifest in parse(json.dumps([tier(), budget()]))] == ["Tier", "Budget"]


def test_a_spec_that_is_written_again_means_the_same() -> None:
    for each in parse(EXAMPLES):
        again = from_object(manifest(each.kind, wire_spec(each)))
        assert again.spec == each.spec
        assert wire_spec(again) == wire_spec(each)


def test_a_default_that_is_written_out_is_not_stored() -> None:
    written_out = budget(enforcement="Hard", window={"period": "Day", "alignment": "Calendar", "timeZone": "UTC"})
    assert wire_spec(from_object(written_out)) == wire_spec(from_object(budget()))


def test_an_alias_within_bounds_is_fine() -> None:
    text = EXAMPLES.replace("defaultModel: gpt-4o-mini", "defaultModel: &model gpt-4o-mini").replace(
        'allowedModels: ["gpt-4o-mini", "gpt-4o*"]', "allowedModels: [*model]"
    )
    shop = parse(text)[0]
    assert isinstance(shop, Project)
    assert shop.spec.allowed_models == ["gpt-4o-mini"]


def test_zones_are_known_where_the_machine_has_no_list_of_them() -> None:
    """Slim images have no /usr/share/zoneinfo."""
    asked = "from behest_ledger.configuration.rules import is_zone; print(is_zone('Europe/Berlin'), is_zone('Mars/X'))"
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env={**os.environ, "PYTHONTZPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False"]
