"""The keys with which this process calls providers: opened from the ledger, or named in its environment."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence

from behest_ledger.configuration.snapshot import UpstreamEntry
from behest_ledger.sealing import SealingError, tenant_key
from behest_ledger.store.provider_keys import SealedKey, project_place, upstream_place
from behest_proxy.app.lent_keys import LentKeys
from behest_proxy.error_codes import ErrorCode
from behest_proxy.errors import InvalidRequest, ServerError

logger = logging.getLogger(__name__)

KeyOfTenant = Callable[[str], bytes]


class ProviderKeys:
    """Opened keys in memory; nothing of them reaches a log."""

    def __init__(self, key_of_tenant: KeyOfTenant | None, lent: LentKeys) -> None:
        """`key_of_tenant` None: this process can open none. `lent`: what its environment has for whom."""
        self._key_of_tenant = key_of_tenant
        self._lent = lent
        self._opened: Mapping[tuple[str, str], str] = {}
        self._told: set[str] = set()
        """Upstreams of which the log says since the last change that they may not use what they name."""

    def use(self, sealed: Sequence[SealedKey]) -> None:
        """Open what the ledger has. What does not open is left out, and said."""
        opened: dict[tuple[str, str], str] = {}
        for item in sealed:
            if self._key_of_tenant is None:
                continue
            try:
                opened[item.tenant_id, item.place] = item.opened(self._key_of_tenant(item.tenant_id))
            except SealingError as error:
                logger.warning("the key of %s cannot be opened: %s", item.place, error)
        self._opened = opened
        self._told.clear()

    def of(self, upstream: UpstreamEntry, *, project_id: str, provider: str) -> str | None:
        """The key for an upstream that a project calls; None: it needs none.

        Raises `ServerError` where it needs one that is not there, and `InvalidRequest` where that is the project's.
        """
        if upstream.spec.byok:
            own = self._opened.get((upstream.tenant_id, project_place(project_id, provider)))
            if own is not None:
                return own
            if upstream.spec.credentials is None:
                raise InvalidRequest(
                    f"this project has no key of its own for {provider}", code=ErrorCode.NO_PROVIDER_KEY, param="model"
                )
        # Of a `byok` upstream what its manifest names is its owner's too.
        credentials = upstream.spec.credentials
        if credentials is None:
            return None
        if credentials.env is not None:
            key: str | None = self._of_environment(upstream, credentials.env)
        else:
            key = self._opened.get((upstream.tenant_id, upstream_place(upstream.qualified_name)))
        if not key:
            raise ServerError("the provider's key is not configured")
        return key

    def _of_environment(self, upstream: UpstreamEntry, variable: str) -> str:
        if self._lent.may_use(variable, tenant_id=upstream.tenant_id, base_url=upstream.spec.base_url):
            return os.environ.get(variable, "").strip()
        if upstream.qualified_name not in self._told:
            self._told.add(upstream.qualified_name)
            logger.warning(
                "the Upstream %s may not use the variable that it names as its key: BEHEST_PROVIDER_KEY_ENV has it"
                " neither with the tenant %s nor with %s",
                upstream.qualified_name,
                upstream.tenant_id,
                upstream.spec.base_url,
            )
        raise ServerError(
            f"the Upstream {upstream.qualified_name} may not use the variable that it names as its key: whoever runs"
            " this gateway allows it in BEHEST_PROVIDER_KEY_ENV"
        )


def one_tenants(key: bytes) -> KeyOfTenant:
    """Of a sidecar: it has its tenant's key, and what is another's does not open."""
    return lambda _tenant: key


def every_tenants(master_key: bytes) -> KeyOfTenant:
    """Of a gateway that serves all tenants."""
    return lambda tenant: tenant_key(master_key, tenant)
