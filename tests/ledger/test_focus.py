"""Rows of FOCUS: exact to the last digit, in both forms and versions, with the columns that the specification has."""

import csv
import io
import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behest_ledger.billing import HOUR, BillingRow
from behest_ledger.focus import parquet_file
from behest_ledger.focus.columns import KINDS, VERSIONS, Version, columns_of
from behest_ledger.focus.csv_file import CsvFile, plain
from behest_ledger.focus.parquet_file import ParquetFile
from behest_ledger.focus.rows import METERS, focus_row
from behest_ledger.token_counts import TOKEN_CLASSES

APRIL = datetime(2026, 4, 1, tzinfo=UTC)


def row(**what: Any) -> BillingRow:
    made: dict[str, Any] = {
        "hour": APRIL + 5 * HOUR,
        "booked_month": APRIL,
        "part": "charge",
        "tenant_id": "acme",
        "project_id": "demo/shop",
        "model": "small",
        "upstream": "demo/openai",
        "upstream_model": "gpt-4o-mini",
        "byok": False,
        "namespace": "demo",
        "workload": "web",
        "team": "search",
        "cost_center": "CC 1",
        "price_key": "2026-04-01-abc/openai/gpt-4o-mini#0.1",
        "token_class": "input",
        "rate_pico": 150_000,
        "source": "provider",
        "quantity": 123_457,
        **what,
    }
    return BillingRow(**made, amount_pico=made["quantity"] * made["rate_pico"])


def read_csv(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def written(file: Any, *rows: BillingRow) -> bytes:
    return bytes(file.written(rows) + file.ended())


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
labels = st.none() | texts
rows = st.builds(
    row,
    hour=st.integers(0, 4000).map(lambda hours: APRIL + hours * HOUR),
    part=st.sampled_from(["charge", "reversal", "replacement"]),
    tenant_id=texts,
    project_id=texts,
    model=texts,
    namespace=texts,
    workload=labels,
    team=labels,
    cost_center=labels,
    user_id=labels,
    session_id=labels,
    price_key=texts | st.just("ns/up/model@free"),
    token_class=st.sampled_from([*TOKEN_CLASSES, "request"]),
    rate_pico=st.integers(0, 10**15),
    quantity=st.integers(-(10**10), 10**10),
)


@given(st.lists(rows, max_size=5), st.sampled_from(VERSIONS))
@settings(max_examples=60, deadline=None)
def test_the_product_is_the_cost_and_the_sum_is_the_ledgers_whatever_is_exported(
    charged: list[BillingRow], version: Version
) -> None:
    told = read_csv(written(CsvFile(version), *charged))
    assert len(told) == len(charged)
    for line, charge in zip(told, charged, strict=True):
        cost = Decimal(charge.amount_pico).scaleb(-12)
        for name in ("BilledCost", "EffectiveCost", "ListCost", "ContractedCost"):
            assert Decimal(line[name]) == cost
        for price in ("ListUnitPrice", "ContractedUnitPrice"):
            assert Decimal(line[price]) * Decimal(line["PricingQuantity"]) == cost
        assert Decimal(line["ConsumedQuantity"]) == charge.quantity
        tags = {
            "project": charge.project_id, "user": charge.user_id, "session": charge.session_id,
            "namespace": charge.namespace, "workload": charge.workload, "team": charge.team,
            "cost_center": charge.cost_center,
        }  # fmt: skip
        assert json.loads(line["Tags"]) == {name: value for name, value in tags.items() if value is not None}
    total = sum(Decimal(line["BilledCost"]) for line in told)
    assert total == Decimal(sum(charge.amount_pico for charge in charged)).scaleb(-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_columns_are_sorted_with_our_own_last_and_keep_the_rules_for_names(version: Version) -> None:
    columns = columns_of(version)
    ours = [name for name in columns if name.startswith("x_")]
    assert list(columns) == sorted(set(columns) - set(ours)) + sorted(ours)
    assert all(re.fullmatch(r"(x_)?([A-Z][a-z]+)+", name) and len(name) <= 50 for name in columns)
    assert set(focus_row(row())) == set(KINDS)
    head = written(CsvFile(version)).decode()
    assert head == ",".join(columns) + "\r\n"


def test_version_1_4_names_providers_as_it_wants_them() -> None:
    # FOCUS 1.3 deprecated ProviderName and PublisherName, 1.4 has them no more; the others are mandatory there.
    old, new = set(columns_of("1.2")), set(columns_of("1.4"))
    assert old - new == {"ProviderName", "PublisherName"}
    assert new - old == {"HostProviderName", "InvoiceDetailId", "ServiceProviderName"}


_MANDATORY = {
    "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd",
    "BillingPeriodStart", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargePeriodEnd", "ChargePeriodStart",
    "ContractedCost", "EffectiveCost", "HostProviderName", "InvoiceDetailId", "InvoiceIssuerName", "ListCost",
    "PricingQuantity", "PricingUnit", "ServiceCategory", "ServiceName", "ServiceProviderName",
}  # fmt: skip
_NULLABLE = {
    "ChargeClass", "CommitmentDiscountStatus", "InvoiceDetailId", "InvoiceId", "x_CorrectionPart", "x_Upstream",
}  # fmt: skip
_ALLOWED = {
    "ChargeCategory": {"Usage"},
    "ChargeClass": {"Correction", ""},
    "ChargeFrequency": {"Usage-Based"},
    "PricingCategory": {"Standard"},
    "ServiceCategory": {"AI and Machine Learning"},
    "ServiceSubcategory": {"Generative AI"},
    "ConsumedUnit": {"Tokens", "Requests"},
    "PricingUnit": {"1000000 Tokens", "Requests"},
    "BillingCurrency": {"USD"},
    "PricingCurrency": {"USD"},
}


@given(st.lists(rows, min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_every_row_keeps_the_rules_of_version_1_4(charged: list[BillingRow]) -> None:
    """What the official validator checks for 1.2, for the version that it does not know yet."""
    for line in read_csv(written(CsvFile("1.4"), *charged)):
        assert set(line) >= _MANDATORY
        for name, value in line.items():
            if name in _ALLOWED:
                assert value in _ALLOWED[name], name
            if not value:
                assert name in _NULLABLE, name
            elif KINDS[name] == "decimal":
                assert re.fullmatch(r"-?\d+\.\d+", value), (name, value)
            elif KINDS[name] == "time":
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:00:00Z", value), (name, value)
            elif KINDS[name] == "json":
                members = json.loads(value)
                assert all(isinstance(member, str) for member in members.values())
        assert not line["ListUnitPrice"].startswith("-")
        assert line["ChargePeriodStart"] < line["ChargePeriodEnd"]
        assert line["BillingPeriodStart"][8:] == line["BillingPeriodEnd"][8:] == "01T00:00:00Z"
        assert all(key.startswith("x_") for key in json.loads(line["SkuPriceDetails"]))


def test_a_correction_is_one_only_of_a_month_that_is_over() -> None:
    (same, later) = (
        focus_row(row(part="reversal", quantity=-3)),
        focus_row(row(part="reversal", quantity=-3, booked_month=APRIL.replace(month=5))),
    )
    assert (same["ChargeClass"], same["x_CorrectionPart"]) == (None, "reversal")
    assert (later["ChargeClass"], later["x_CorrectionPart"]) == ("Correction", "reversal")
    assert later["ChargePeriodStart"] == same["ChargePeriodStart"] == APRIL + 5 * HOUR
    assert (later["BillingPeriodStart"], later["BillingPeriodEnd"]) == (
        APRIL.replace(month=5), APRIL.replace(month=6),
    )  # fmt: skip
    december = focus_row(row(booked_month=APRIL.replace(month=12)))
    assert december["BillingPeriodEnd"] == datetime(2027, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("price_key", "provider", "version"),
    [
        ("2026-04-01-abc/openai/gpt-4o-mini#0.1", "openai", "2026-04-01-abc"),
        ("v1/openrouter/meta/llama#3", "openrouter", "v1"),
        ("demo/own-gpu/llama@3fa9", "demo/own-gpu", "3fa9"),
        ("demo/own-gpu/meta/llama@free", "demo/own-gpu", "free"),
        ("something else", "demo/openai", "something else"),
    ],
)
def test_the_provider_is_who_has_the_price(price_key: str, provider: str, version: str) -> None:
    told = focus_row(row(price_key=price_key))
    assert (told["ProviderName"], told["ServiceProviderName"], told["x_PriceVersion"]) == (provider, provider, version)


@given(st.lists(rows, max_size=8), st.sampled_from(["v1/openai/gpt-4o#0", "ns/up/gpt-4o@free", "else"]))
@settings(max_examples=40, deadline=None)
def test_a_price_has_one_sku_whatever_the_model_is_called(charged: list[BillingRow], price_key: str) -> None:
    skus: dict[Any, set[Any]] = {}
    for charge in charged:
        line = focus_row(msgspec.structs.replace(charge, price_key=price_key))
        skus.setdefault(line["SkuPriceId"], set()).add((line["SkuId"], line["SkuMeter"], line["SkuPriceDetails"]))
    assert all(len(found) == 1 for found in skus.values())


def test_prices_that_differ_have_ids_that_differ() -> None:
    ids = {
        focus_row(row(token_class=name, rate_pico=rate))["SkuPriceId"] for name in METERS for rate in (150_000, 300_000)
    }
    assert len(ids) == 2 * len(METERS)


def test_the_parquet_file_says_the_same_with_exact_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_file, "GROUP_ROWS", 3)
    charged = [row(quantity=number, team=None if number % 2 else "a") for number in range(10)]
    file = ParquetFile("1.4")
    content = b"".join([file.written([one]) for one in charged] + [file.ended()])
    found = pyarrow.parquet.ParquetFile(io.BytesIO(content))
    assert found.num_row_groups == 4
    table = found.read()
    assert tuple(table.column_names) == columns_of("1.4")
    assert str(table.schema.field("BilledCost").type) == "decimal128(38, 12)"
    assert str(table.schema.field("ChargePeriodStart").type) == "timestamp[us, tz=UTC]"
    told = [focus_row(one) for one in charged]
    for name in columns_of("1.4"):
        assert table.column(name).to_pylist() == [line[name] for line in told], name


def test_an_empty_parquet_file_can_be_read() -> None:
    assert pyarrow.parquet.read_table(io.BytesIO(written(ParquetFile("1.2")))).num_rows == 0


def test_numbers_are_plain() -> None:
    numbers = {"0": "0.0", "-0.50": "-0.5", "1E+3": "1000.0", "12": "12.0", "1E-12": "0.000000000001"}
    assert {text: plain(Decimal(text)) for text in numbers} == numbers


def test_what_a_client_chose_stands_in_no_cell_as_a_formula() -> None:
    hostile = "=cmd|'/c calc'!A1"
    line = focus_row(row(model=hostile, upstream_model=hostile, user_id=hostile, session_id=hostile))
    assert not [name for name, value in line.items() if isinstance(value, str) and value[:1] in "=+-@\t\r"]
    assert msgspec.json.decode(str(line["Tags"]))["session"] == hostile
