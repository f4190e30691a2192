"""TLS sessions that are taken up again: a new connection to a known host saves the certificates and their signatures.

asyncio and uvloop know no way to begin a handshake with a session, but both make their `SSLObject` by the context's
`sslobject_class`, which may be any subclass (Python's documentation of `SSLContext.sslobject_class`).
"""

import asyncio
import ssl
from collections import OrderedDict
from contextlib import suppress
from typing import Any

_HOSTS_MAX = 256


class TlsSessions:
    """The last session of each host, for one context: what was verified then by its trust holds for the session."""

    def __init__(self, context: ssl.SSLContext) -> None:
        """From now on the context's handshakes take up what `keep` was given."""
        self._of_host: OrderedDict[str, ssl.SSLSession] = OrderedDict()
        sessions = self._of_host

        class Resuming(ssl.SSLObject):
            """Begins with the host's session, if there is one. A server that does not know it makes a new one."""

            kept = False
            _begun = False

            def do_handshake(self) -> None:
                if not self._begun:
                    self._begun = True
                    known = sessions.get(self.server_hostname or "")
                    if known is not None:
                        with suppress(ValueError):
                            self.session = known
                super().do_handshake()

        self._resuming = Resuming
        context.sslobject_class = Resuming

    def keep(self, transport: asyncio.Transport) -> None:
        """Remember the session of a connection that has been answered: with TLS 1.3 it comes after the handshake."""
        tls: Any = transport.get_extra_info("ssl_object")
        if not isinstance(tls, self._resuming) or tls.kept:
            return
        session, host = tls.session, tls.server_hostname
        if session is None or not session.has_ticket or not host:
            return
        tls.kept = True
        self._of_host[host] = session
        self._of_host.move_to_end(host)
        if len(self._of_host) > _HOSTS_MAX:
            self._of_host.popitem(last=False)
