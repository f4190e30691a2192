"""Whose a namespace is: its own name's, or the tenant in a label that only cluster administrators can set."""

import re
from collections.abc import Mapping

from behest_ledger.configuration.rules import DNS_SUBDOMAIN, NAME_LENGTH_MAX
from behest_operator.annotations import TENANT_LABEL


class TenancyError(ValueError):
    """The namespace's label is no tenant. The message is for whoever applied the resource."""


def tenant_of(namespace: str, labels: Mapping[str, str]) -> str:
    """The tenant of a namespace. Raises `TenancyError`."""
    tenant = labels.get(TENANT_LABEL)
    if tenant is None:
        return namespace
    if len(tenant) > NAME_LENGTH_MAX or not re.fullmatch(DNS_SUBDOMAIN, tenant):
        raise TenancyError(f"the label {TENANT_LABEL} of namespace {namespace} is no tenant's name: {tenant!r}")
    return tenant
