import pytest
from genai_prices.data_snapshot import get_snapshot
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.prices.hosts import url_fits

PATTERNS = {provider.id: provider.api_pattern for provider in get_snapshot().providers}


def fitting(url: str) -> list[str]:
    return [provider for provider, pattern in PATTERNS.items() if url_fits(pattern, url)]


@pytest.mark.parametrize(
    ("url", "provider"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://API.OpenAI.com:443/v1", "openai"),
        ("https://api.openai.com./v1", "openai"),
        ("https://api.moonshot.cn/v1", "moonshotai"),
        ("https://api.moonshot.ai/v1", "moonshotai"),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "google"),
        ("https://europe-west4-aiplatform.googleapis.com/v1", "google"),
        ("https://ours.openai.azure.com/openai/v1", "azure"),
        ("https://router.huggingface.co/cerebras/v1", "huggingface_cerebras"),
        ("https://api.cloudflare.com/client/v4/accounts/abc/ai/v1", "cloudflare"),
        ("https://adb-1.azuredatabricks.net/serving-endpoints", "databricks"),
        ("https://bedrock-runtime.us-east-1.amazonaws.com/openai/v1", "aws"),
        ("https://ours.modal.run/v1", "modal"),
    ],
)
def test_a_providers_own_urls_fit(url: str, provider: str) -> None:
    assert fitting(url)[0] == provider


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com.evil.example/v1",
        "https://api.openai.com@evil.example/v1",
        "https://api.openai.com:pass@evil.example/v1",
        "https://evil.example/api.openai.com",
        "https://evil.example#https://api.openai.com",
        "https://evil.example/x.googleapis.com",
        "https://evilgoogleapis.com/v1",
        "https://evil/x.openai.azure.com",
        "https://api.moonshot.evil.example/v1",
        "https://router.huggingface.co/cerebras-evil",
        "https://router.huggingface.co/evil/cerebras",
        "https://api.openai.com\\@evil.example/",
        "http://api.openai.com/v1",
        "ftp://api.openai.com/v1",
        "http://[",
        "api.openai.com",
        "",
    ],
)
def test_what_only_looks_alike_fits_nothing(url: str) -> None:
    assert fitting(url) == []


@pytest.mark.parametrize("pattern", ["", "(", "https://(", "api\\.openai\\.com", "https://[z", "https://x/("])
def test_a_pattern_that_is_none_fits_nothing(pattern: str) -> None:
    assert not url_fits(pattern, "https://api.openai.com/v1")


@given(st.sampled_from(sorted(PATTERNS)), st.from_regex(r"\A[a-z0-9]{1,8}(\.[a-z0-9]{1,8})?\Z"))
def test_no_pattern_fits_a_host_with_something_behind_it(provider: str, more: str) -> None:
    for url in ("https://api.openai.com", "https://api.x.ai", "https://ours.azure-api.net", "https://a.googleapis.com"):
        assert not url_fits(PATTERNS[provider], f"{url}.{more}.example/v1")
