import pytest

from behest_ledger.configuration.documents import TEXT_BYTES_MAX
from behest_ledger.configuration.manifests import InvalidManifestsError, parse


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "there is no manifest in it"),
        ("---\n---\n", "there is no manifest in it"),
        ("a: [", "line 1: expected the node content, but found '<stream end>'"),
        ("kind: Tier\nkind: Budget\n", "line 2: the key 'kind' is there twice"),
        ('{"kind": "Tier", "kind": "Budget"}', "the key 'kind' is there twice"),
        ('{"number": NaN}', "NaN is no JSON number"),
        ("just text", 'a manifest must be a mapping with apiVersion, kind, metadata and spec, got "just text"'),
        ("? [a, b]\n: 1\n", "line 1: a key must be a plain string"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("day: 2026-02-31", "day is out of range for month"),
        ("a: &a [*a]", "a value contains itself"),
        ("\x00", "special characters are not allowed"),
        ("[" * 5000, "it is nested deeper than 40 levels"),
        ("[" * 5000 + "]" * 5000, "it is nested deeper than 40 levels"),
        ("- " * 100 + "a", "it is nested deeper than 40 levels"),
        ("- &a x\n" + "- *a\n" * 101, "there are more than 100 aliases"),
        ("---\na: 1\n" * 501, "there are more than 500 documents"),
        ("#" * (TEXT_BYTES_MAX + 1), "the text is longer than 1048576 bytes"),
    ],
)
def test_text_that_is_no_manifest_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidManifestsError) as caught:
        parse(text)
    assert reason in str(caught.value)


def test_aliases_cannot_stand_for_millions_of_values() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(InvalidManifestsError, match="its aliases stand for more than 100000 values"):
        parse("\n".join(lines))
