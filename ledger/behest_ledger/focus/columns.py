"""The columns of the Cost and Usage dataset that we fill, by version of FOCUS.

Left out are the columns of features that there are none of here: capacity reservations, regions, provisioned resources,
and commitment discounts but for one column, which is always null: the official validator needs it to judge others. The
columns of the pricing currency repeat those of the billing currency; it wants them too (docs/focus.md).
"""

from typing import Literal, get_args

Version = Literal["1.2", "1.4"]
VERSIONS: tuple[Version, ...] = get_args(Version)

Kind = Literal["text", "decimal", "time", "json"]

KINDS: dict[str, Kind] = {
    "BilledCost": "decimal",
    "BillingAccountId": "text",
    "BillingAccountName": "text",
    "BillingCurrency": "text",
    "BillingPeriodEnd": "time",
    "BillingPeriodStart": "time",
    "ChargeCategory": "text",
    "ChargeClass": "text",
    "ChargeDescription": "text",
    "ChargeFrequency": "text",
    "ChargePeriodEnd": "time",
    "ChargePeriodStart": "time",
    "CommitmentDiscountStatus": "text",
    "ConsumedQuantity": "decimal",
    "ConsumedUnit": "text",
    "ContractedCost": "decimal",
    "ContractedUnitPrice": "decimal",
    "EffectiveCost": "decimal",
    "HostProviderName": "text",
    "InvoiceDetailId": "text",
    "InvoiceId": "text",
    "InvoiceIssuerName": "text",
    "ListCost": "decimal",
    "ListUnitPrice": "decimal",
    "PricingCategory": "text",
    "PricingCurrency": "text",
    "PricingCurrencyContractedUnitPrice": "decimal",
    "PricingCurrencyEffectiveCost": "decimal",
    "PricingCurrencyListUnitPrice": "decimal",
    "PricingQuantity": "decimal",
    "PricingUnit": "text",
    "ProviderName": "text",
    "PublisherName": "text",
    "ServiceCategory": "text",
    "ServiceName": "text",
    "ServiceProviderName": "text",
    "ServiceSubcategory": "text",
    "SkuId": "text",
    "SkuMeter": "text",
    "SkuPriceDetails": "json",
    "SkuPriceId": "text",
    "SubAccountId": "text",
    "SubAccountName": "text",
    "Tags": "json",
    "x_BringYourOwnKey": "text",
    "x_CorrectionPart": "text",
    "x_PriceVersion": "text",
    "x_Upstream": "text",
    "x_UsageSource": "text",
}
"""Every column of any version, in their order: by name, our own (`x_`) last, as FOCUS recommends."""

_NOT_IN: dict[Version, frozenset[str]] = {
    # Came with 1.3 and 1.4.
    "1.2": frozenset({"HostProviderName", "InvoiceDetailId", "ServiceProviderName"}),
    # Deprecated in 1.3, gone in 1.4.
    "1.4": frozenset({"ProviderName", "PublisherName"}),
}


def columns_of(version: Version) -> tuple[str, ...]:
    """The columns of a version, in their order."""
    return tuple(name for name in KINDS if name not in _NOT_IN[version])
