"""The SDK clients of a run: one that begins at each router, and one whose first router is behind the proxy. Must not send anything."""

from collections.abc import Sequence

from tandem.chaos.cases import Transport
from tandem.chaos.proxy import Proxy
from tandem.client import AsyncClient


class Clients:
    """Made on the event loop that uses them. A client that lost its first router stays with the next, so the proxied one is made anew."""

    def __init__(self, routers: Sequence[str], proxy: Proxy) -> None:
        self._routers = list(routers)
        self._proxy = proxy
        turned = [self._routers[number:] + self._routers[:number] for number in range(len(self._routers))]
        self._direct = [AsyncClient(",".join(order)) for order in turned]
        self._proxied = [self._new_proxied()]

    def choose(self, transport: Transport, share: float) -> AsyncClient:
        """The client for a request; `share` (0 to below 1) chooses among the direct ones."""
        return self._proxied[-1] if transport is Transport.PROXIED else self._direct[int(share * len(self._direct))]

    def renew_proxied(self) -> None:
        """From now on requests go through the proxy again, whatever an earlier fault has taught their client."""
        self._proxied.append(self._new_proxied())

    def _new_proxied(self) -> AsyncClient:
        return AsyncClient(",".join([self._proxy.address, *self._routers[1:]]))

    async def close(self) -> None:
        """Closes all there were."""
        for client in (*self._direct, *self._proxied):
            await client.close()
