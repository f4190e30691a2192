from datetime import UTC, datetime, timedelta

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from behest_operator.certificates import Certificates, renewed

START = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = ["behest-webhook.behest.svc"]


def trusts(bundle: bytes, leaf: bytes) -> bool:
    certificate = x509.load_pem_x509_certificate(leaf)
    for authority in x509.load_pem_x509_certificates(bundle):
        try:
            certificate.verify_directly_issued_by(authority)
        except (InvalidSignature, ValueError):
            continue
        return True
    return False


def test_what_is_fresh_is_left_as_it_is() -> None:
    found = renewed(None, names=NAMES, now=START)
    assert renewed(found, names=NAMES, now=START + timedelta(days=59)) is found


def test_the_leaf_is_renewed_a_month_before_it_ends_and_the_authority_stays() -> None:
    found = renewed(None, names=NAMES, now=START)
    later = renewed(found, names=NAMES, now=START + timedelta(days=61))
    assert later.leaf != found.leaf
    assert later.ca_bundle == found.ca_bundle
    assert trusts(found.ca_bundle, later.leaf)


def test_other_names_need_another_leaf() -> None:
    found = renewed(None, names=NAMES, now=START)
    assert renewed(found, names=["other.svc"], now=START).leaf != found.leaf


def test_whatever_cannot_be_read_is_made_anew() -> None:
    found = renewed(None, names=NAMES, now=START)
    for field in Certificates.__struct_fields__:
        broken = msgspec.structs.replace(found, **{field: b"rubbish"})
        assert trusts((made := renewed(broken, names=NAMES, now=START)).ca_bundle, made.leaf)
        assert made is not broken


def test_over_twenty_years_of_daily_looks_every_leaf_is_trusted_by_the_bundle_of_the_day_before() -> None:
    found = renewed(None, names=NAMES, now=START)
    bundles = {found.ca_bundle}
    for day in range(0, 20 * 365, 5):
        now = START + timedelta(days=day)
        later = renewed(found, names=NAMES, now=now)
        assert trusts(found.ca_bundle, later.leaf), "an API server that has not learnt the new bundle refuses"
        leaf = x509.load_pem_x509_certificate(later.leaf)
        assert leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc
        found = later
        bundles.add(found.ca_bundle)
    assert len(bundles) > 2, "the authority was renewed"
    assert len(x509.load_pem_x509_certificates(found.ca_bundle)) <= 3
