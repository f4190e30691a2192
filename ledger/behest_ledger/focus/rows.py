"""What stands in the columns: one charge as a row of FOCUS's Cost and Usage dataset.

Where the specification leaves a choice:

- The billing account is the tenant, the sub account the project, the provider who bills the model's use.
- The charge period is the hour in which the requests ended. The billing period is the calendar month in which the
  ledger wrote the lines. A correction of an earlier month is `ChargeClass` "Correction"; one of the same month is not
  (the specification wants that null for a period which is open), and `x_CorrectionPart` names both.
- Four costs are equal: there are no discounts, no commitments and nothing is amortised.
- Unit price x pricing quantity is the cost to the last digit, in reversals too (their quantities are below zero).
"""

import re
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

import msgspec

from behest_ledger.billing import HOUR, BillingRow
from behest_ledger.prices.rates import REQUEST_CLASS

Value = str | Decimal | datetime | None
"""Of a cell. JSON is written already."""

SERVICE_CATEGORY = "AI and Machine Learning"
SERVICE_SUBCATEGORY = "Generative AI"

METERS = {
    "input": "Input Tokens",
    "cache_read": "Cached Input Tokens",
    "cache_write": "Cache Write Tokens",
    "output": "Output Tokens",
    "reasoning": "Reasoning Tokens",
    "audio_input": "Audio Input Tokens",
    "audio_output": "Audio Output Tokens",
    REQUEST_CLASS: "Requests",
}
"""How `SkuMeter` names our classes."""

_TOKENS_PER_UNIT_DIGITS = 6
_PICO_DIGITS = 12

# A price of the book: <version>/<provider>/<model>#<which of its prices>; see behest_ledger.prices.
_OF_BOOK = re.compile(r"(?P<version>[^/]+)/(?P<provider>[^/]+)/(?P<model>.+)#[0-9.]+")
# A price that an Upstream states: <its name>/<model>@<digest of the prices, or "free">.
_OF_RESOURCE = re.compile(r"(?P<upstream>.+?/.+?)/(?P<model>.+)@(?P<version>[^@]+)")


def focus_row(row: BillingRow) -> dict[str, Value]:
    """The row, with the columns of every version: who writes it takes those of one."""
    provider, sku, price_version = _price_of(row.price_key, row.upstream)
    cost = _decimal(row.amount_pico, _PICO_DIGITS)
    is_tokens = row.token_class != REQUEST_CLASS
    digits = _TOKENS_PER_UNIT_DIGITS if is_tokens else 0
    unit_price = _decimal(row.rate_pico, _PICO_DIGITS - digits)
    meter = METERS[row.token_class]
    is_correction = row.part != "charge" and row.booked_month > _month_of(row.hour)
    return {
        "BilledCost": cost,
        "BillingAccountId": row.tenant_id,
        "BillingAccountName": row.tenant_id,
        "BillingCurrency": "USD",
        "BillingPeriodEnd": _month_of(row.booked_month + timedelta(days=32)),
        "BillingPeriodStart": row.booked_month,
        "ChargeCategory": "Usage",
        "ChargeClass": "Correction" if is_correction else None,
        "ChargeDescription": f"{meter} of {row.model} from {provider}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": row.hour + HOUR,
        "ChargePeriodStart": row.hour,
        "CommitmentDiscountStatus": None,
        "ConsumedQuantity": Decimal(row.quantity),
        "ConsumedUnit": "Tokens" if is_tokens else "Requests",
        "ContractedCost": cost,
        "ContractedUnitPrice": unit_price,
        "EffectiveCost": cost,
        "HostProviderName": provider,
        "InvoiceDetailId": None,
        "InvoiceId": None,
        "InvoiceIssuerName": provider,
        "ListCost": cost,
        "ListUnitPrice": unit_price,
        "PricingCategory": "Standard",
        "PricingCurrency": "USD",
        "PricingCurrencyContractedUnitPrice": unit_price,
        "PricingCurrencyEffectiveCost": cost,
        "PricingCurrencyListUnitPrice": unit_price,
        "PricingQuantity": _decimal(row.quantity, digits),
        "PricingUnit": "1000000 Tokens" if is_tokens else "Requests",
        "ProviderName": provider,
        "PublisherName": provider,
        "ServiceCategory": SERVICE_CATEGORY,
        "ServiceName": f"{provider} inference",
        "ServiceProviderName": provider,
        "ServiceSubcategory": SERVICE_SUBCATEGORY,
        "SkuId": f"{sku}/{row.token_class}",
        "SkuMeter": meter,
        "SkuPriceDetails": _json({"x_Sku": sku, "x_TokenClass": row.token_class}),
        # One price key has several prices where a long input costs more: the price itself tells them apart.
        "SkuPriceId": f"{row.price_key}/{row.token_class}/{unit_price:f}",
        "SubAccountId": row.project_id,
        "SubAccountName": row.project_id,
        "Tags": _json(_tags(row)),
        "x_BringYourOwnKey": "true" if row.byok else "false",
        "x_CorrectionPart": None if row.part == "charge" else row.part,
        "x_PriceVersion": price_version,
        "x_Upstream": row.upstream or None,
        "x_UsageSource": row.source,
    }


def _decimal(value: int, digits: int) -> Decimal:
    """Value / 10**digits, with every digit: arithmetic would round to the context's precision."""
    return Decimal(f"{value}e-{digits}")


def _tags(row: BillingRow) -> dict[str, str]:
    tags = {
        "project": row.project_id,
        "user": row.user_id,
        "session": row.session_id,
        "namespace": row.namespace or None,
        "workload": row.workload,
        "team": row.team,
        "cost_center": row.cost_center,
    }
    return {name: value for name, value in tags.items() if value is not None}


@lru_cache(maxsize=1024)
def _price_of(price_key: str, upstream: str) -> tuple[str, str, str]:
    """(whose price, of what, of which version). A price that a resource states is its Upstream's.

    Of what is said by the price, not by the model that was asked: several may have one price, and a price has one
    SKU.
    """
    found = _OF_BOOK.fullmatch(price_key)
    if found is not None:
        return found["provider"], f"{found['provider']}/{found['model']}", found["version"]
    found = _OF_RESOURCE.fullmatch(price_key)
    if found is not None:
        return found["upstream"], f"{found['upstream']}/{found['model']}", found["version"]
    return upstream or price_key, price_key, price_key


def _month_of(moment: datetime) -> datetime:
    return moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def _json(members: dict[str, Any]) -> str:
    return msgspec.json.encode(members).decode()
