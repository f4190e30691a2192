"""Which origins go over the proxy that the environment names."""

import pytest

from behest_proxy.upstream.prepared import Origin
from behest_proxy.upstream.proxies import Proxies


def goes_over_proxy(host: str, port: int = 443, **environment: str) -> bool:
    return Proxies({"HTTPS_PROXY": "http://p:3128", **environment}).proxy_for(Origin("https", host, port)) is not None


def test_each_scheme_has_its_own_variable_and_lower_case_wins() -> None:
    proxies = Proxies({"HTTP_PROXY": "http://a", "HTTPS_PROXY": "http://b", "https_proxy": "u:p%40@c:3128"})
    http, https = (proxies.proxy_for(Origin("http", "h", 80)), proxies.proxy_for(Origin("https", "h", 443)))
    assert http is not None
    assert (http.host, http.port, http.authorization) == ("a", 80, None)
    assert https is not None
    assert (https.host, https.port, https.authorization) == ("c", 3128, b"Basic dTpwQA==")
    assert "Basic" not in repr(https)
    assert Proxies({}).proxy_for(Origin("http", "h", 80)) is None


@pytest.mark.parametrize(
    ("no_proxy", "host", "expected"),
    [
        ("", "api.example", True),
        ("*", "api.example", False),
        ("example", "api.example", False),
        (".example", "api.example", False),
        ("*.example", "api.example", False),
        ("EXAMPLE, other", "api.example", False),
        ("ample", "api.example", True),
        ("api.example:443", "api.example", False),
        ("api.example:8443", "api.example", True),
        ("10.0.0.0/8", "10.1.2.3", False),
        ("10.0.0.0/8", "11.1.2.3", True),
        ("10.1.2.3", "10.1.2.3", False),
        ("10.1.2.3:443", "10.1.2.3", False),
        ("10.1.2.3:80", "10.1.2.3", True),
        ("[fd00::1]", "fd00::1", False),
        ("[fd00::1]:443", "fd00::1", False),
        ("10.0.0.0/8", "ten.example", True),
    ],
)
def test_no_proxy_names_domains_addresses_and_ports(no_proxy: str, host: str, expected: bool) -> None:
    assert goes_over_proxy(host, NO_PROXY=no_proxy) is expected
    assert goes_over_proxy(host, no_proxy=no_proxy) is expected


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is_always_reached_directly(host: str) -> None:
    assert not goes_over_proxy(host)


@pytest.mark.parametrize("url", ["socks5://p:1080", "https://p", "http://", "http://p:port"])
def test_a_proxy_that_cannot_be_used_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ValueError):
        Proxies({"HTTPS_PROXY": url})
