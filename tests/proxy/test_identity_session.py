"""The token's session binds; the header fills the gap; nothing invents sessions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.errors import Forbidden, InvalidRequest
from behest_proxy.identity.caller import (
    Caller,
    capped_role,
    is_session_id,
    least_role,
    workload_caller,
)
from behest_proxy.identity.session import NO_SESSION, session_of

LOOSE = Caller(tenant_id="acme", project_id="demo/shop", user_id="u_1")
BOUND = Caller(tenant_id="acme", project_id="demo/shop", user_id="u_1", session_id="s_1")


def test_without_token_session_and_header_it_is_the_session_none() -> None:
    assert session_of(LOOSE, []) == NO_SESSION == "none"


def test_without_token_session_the_header_counts() -> None:
    assert session_of(LOOSE, [b"s_2"]) == "s_2"


def test_the_tokens_session_binds_with_the_same_header_or_none() -> None:
    assert session_of(BOUND, []) == "s_1"
    assert session_of(BOUND, [b"s_1"]) == "s_1"


@pytest.mark.parametrize("header", [b"s_2", b"S_1", b"s_1x", b"none"])
def test_another_header_than_the_tokens_session_is_forbidden(header: bytes) -> None:
    with pytest.raises(Forbidden) as caught:
        session_of(BOUND, [header])
    assert caught.value.details == {"reason": "session_mismatch"}


@pytest.mark.parametrize("caller", [LOOSE, BOUND], ids=["loose", "bound"])
@pytest.mark.parametrize(
    "headers",
    [[b""], [b" "], [b"a b"], [b"\xe9"], [b"a\x00"], [b"a\x7f"], [b"x" * 256], [b"s_1", b"s_1"], [b"s_1", b"s_2"]],
)
def test_a_header_that_is_no_single_session_id_is_refused(caller: Caller, headers: list[bytes]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        session_of(caller, headers)
    assert caught.value.param == "X-Session-Id"


def test_a_session_has_up_to_255_visible_characters() -> None:
    assert session_of(LOOSE, [b"!" * 255]) == "!" * 255


@given(header=st.binary(max_size=300), caller=st.sampled_from([LOOSE, BOUND]))
def test_a_bound_caller_never_gets_another_session(header: bytes, caller: Caller) -> None:
    try:
        session = session_of(caller, [header])
    except (Forbidden, InvalidRequest):
        return
    assert is_session_id(session)
    assert caller.session_id in (None, session)


def test_roles_rise_from_user_to_dashboard_service_to_admin() -> None:
    assert capped_role("admin", highest="dashboard-service") == "dashboard-service"
    assert capped_role("user", highest="admin") == "user"
    assert least_role("root") == "user"
    admin = Caller(tenant_id="t", project_id="p", user_id="u", role="admin")
    service = Caller(tenant_id="t", project_id="p", user_id="u", role="dashboard-service")
    assert [caller.sees_every_user for caller in (LOOSE, service, admin)] == [False, True, True]
    assert [caller.has_role("admin") for caller in (LOOSE, service, admin)] == [False, False, True]


def test_a_workload_is_a_plain_user_without_a_token() -> None:
    caller = workload_caller(tenant_id="acme", project_id="demo/shop", namespace="demo", owner="cart")
    assert (caller.user_id, caller.role, caller.kid) == ("workload:demo/cart", "user", None)
