"""The Watch stream of each node's store service: which blocks its arena holds, brought to the prefix index.

Must not choose or call for blocks. Knows the services by the register; what a service told before its stream broke is believed until it
tells anew or its lease has run out.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import grpc.aio

from router.shell import RouterShell
from tandem.convert import block_change_from_pb
from tandem.domain import Namespace
from tandem.errors import ProtocolError, TandemError
from tandem.rpc import open_channel, open_stream, parse_answer
from tandem.v1 import store_pb2

logger = logging.getLogger(__name__)

_WATCH = "tandem.v1.Store/Watch"
_SILENCE_S = 10.0  # a service says a word each second
_RECONNECT_MIN_S, _RECONNECT_MAX_S = 0.1, 1.0


@dataclass(slots=True)
class _Link:
    node: str
    address: str
    channel: grpc.aio.Channel
    task: "asyncio.Task[None] | None" = None


class Stores:
    """All store services of the cluster. Run `watch_forever` in a task; it ends only by being cancelled."""

    def __init__(self, shell: RouterShell, rng: Random, connect: Callable[[str], grpc.aio.Channel] = open_channel) -> None:
        self._shell = shell
        self._rng = rng
        self._connect = connect
        self._links: dict[str, _Link] = {}
        self._group: asyncio.TaskGroup | None = None

    async def watch_forever(self) -> None:
        """Holds one Watch stream per service; closes the channels at its end."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for link in self._links.values():
                    self._begin(link)
                await asyncio.Event().wait()
        finally:
            for link in self._links.values():
                await link.channel.close(None)

    def follow(self, addresses: Mapping[str, str]) -> None:
        """The addresses of all store services with a lease, by node. What a node's store holds is forgotten with its lease."""
        for node, link in list(self._links.items()):
            if addresses.get(node) != link.address:
                self._end(link)
                if node not in addresses:
                    self._shell.store_lost(node)
        for node in sorted(addresses.keys() - self._links.keys()):
            link = self._links[node] = _Link(node, addresses[node], self._connect(addresses[node]))
            self._begin(link)
        self._shell.stores_known(addresses)

    def reach(self, node: str) -> tuple[grpc.aio.Channel, str] | None:
        """A channel to the node's store service, and its address; None where it has no lease."""
        link = self._links.get(node)
        return None if link is None else (link.channel, link.address)

    def _begin(self, link: _Link) -> None:
        if self._group is not None:
            link.task = self._group.create_task(self._keep_watching(link), name=f"watch store {link.node}")

    def _end(self, link: _Link) -> None:
        del self._links[link.node]
        if link.task is not None and self._group is not None:
            link.task.cancel()
            self._group.create_task(link.channel.close(None), name=f"close store {link.node}")

    async def _keep_watching(self, link: _Link) -> None:
        """Watches again after each loss, with a growing pause."""
        pause_s = _RECONNECT_MIN_S
        while True:
            messages = 0
            reason = "the stream ended"
            try:
                async with open_stream(link.channel, _WATCH, store_pb2.StoreWatchRequest(), timeout_s=None) as stream:
                    while True:
                        async with asyncio.timeout(_SILENCE_S):
                            payload = await stream.read()
                        if payload is None:
                            break
                        self._take(link, parse_answer(store_pb2.StoreWatchResponse, payload), is_first=not messages)
                        messages += 1
            except TimeoutError:
                reason = f"no message for {_SILENCE_S:g} s"
            except TandemError as error:
                reason = error.message
            except Exception:
                logger.exception("store_watch_failed node=%s", link.node)
                self._shell.metrics.task_failures.labels("store_watch").inc()
                reason = "a bug of the router"
            if messages:
                logger.info("store_unreachable node=%s address=%s reason=%s", link.node, link.address, reason)
            pause_s = _RECONNECT_MIN_S if messages else min(2 * pause_s, _RECONNECT_MAX_S)
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))

    def _take(self, link: _Link, message: store_pb2.StoreWatchResponse, *, is_first: bool) -> None:
        """The first message of a stream begins with nothing."""
        if message.node != link.node:
            raise ProtocolError(f"the store service at {link.address} is of node {message.node!r}, not {link.node!r}")
        if is_first:
            self._shell.store_lost(link.node)
        for events in message.namespaces:
            self._shell.stored(link.node, Namespace(events.namespace), block_change_from_pb(events.block_events))
