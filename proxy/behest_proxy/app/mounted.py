"""Files that are mounted and exchanged while we run: the ledger's login and the signing key are rotated so."""

import asyncio
import logging

from behest_ledger.store.pool import Connection, UrlError, use_dsn
from behest_proxy.app.settings import Settings, SettingsError, secret_in
from behest_proxy.app.signing import SigningKeys
from behest_proxy.identity.keys import UnusableKeyError

logger = logging.getLogger(__name__)

KNOWN_AFTER_S = 2.0
"""A new signing key is known to every sidecar by then: each asks twice a second whether anything is new."""


class MountedFiles:
    """What was read last, to notice what is new."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._dsn = settings.database_url
        self._signing_pem = settings.signing_key_file.read_bytes()
        self._announced_pem = self._signing_pem
        self._sign_from_s = 0.0

    @property
    def database_url(self) -> str:
        """The ledger's login as it is now."""
        return self._dsn

    async def _take_signing_key(self, pem: bytes, pool: Connection, signing_keys: SigningKeys) -> None:
        """Publish its public half, and sign with it once every sidecar must have read that: else one would refuse what
        another has just minted.
        """
        now_s = asyncio.get_running_loop().time()
        if pem != self._announced_pem:
            await signing_keys.announce(pool, pem)
            self._announced_pem, self._sign_from_s = pem, now_s + KNOWN_AFTER_S
        elif now_s >= self._sign_from_s:
            signing_keys.replace(pem)
            self._signing_pem = pem
            logger.info("signing with the key of %s", self._settings.signing_key_file)

    async def reread(self, pool: Connection, signing_keys: SigningKeys, *others: Connection) -> None:
        """Use what has changed. What cannot be read or used is left for the next look, and said.

        `others` are further pools of the same login. Raises `LedgerError`.
        """
        settings = self._settings
        try:
            if settings.database_url_file is not None:
                dsn = secret_in(settings.database_url_file, "BEHEST_DATABASE_URL_FILE")
                if dsn != self._dsn:
                    for one in (pool, *others):
                        await use_dsn(one, dsn, application_name=settings.name, pooler=settings.database_pooler)
                    self._dsn = dsn
                    logger.info("connecting to the ledger by the login of %s", settings.database_url_file)
            pem = settings.signing_key_file.read_bytes()
            if pem != self._signing_pem:
                await self._take_signing_key(pem, pool, signing_keys)
        except (SettingsError, UnusableKeyError, UrlError, OSError) as error:
            logger.warning("a mounted file cannot be used, the last one serves: %s", error)
