"""The connection of a client to its routers: those it was given, and on a loss those it has learned of.

Must not call anybody: both clients do, each by its own kind of channel.
"""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

C = TypeVar("C")

_LEARN_AGAIN_S = 10.0


class RouterChannels(Generic[C]):
    """Channels made by `open_channel` from addresses with commas between them. `opened` are all there were, for whoever closes them."""

    def __init__(self, endpoint: str, open_channel: Callable[[str], C], clock: Callable[[], float] = time.monotonic) -> None:
        self._given = endpoint.split(",")
        self._target = endpoint
        self._learned: list[str] = []
        self._learned_s: float | None = None
        self._open_channel = open_channel
        self._clock = clock
        self._current: C | None = None
        self.opened: list[C] = []

    @property
    def current(self) -> C:
        """The channel for new calls; opened at the first."""
        if self._current is None:
            self._current = self._open_channel(self._target)
            self.opened.append(self._current)
        return self._current

    @property
    def wants_to_learn(self) -> bool:
        """Whether it is worth asking again who the routers are."""
        return self._learned_s is None or self._clock() - self._learned_s > _LEARN_AGAIN_S

    def learn(self, addresses: str) -> None:
        """What a router said of the routers: host:port with commas between them, possibly none."""
        self._learned_s = self._clock()
        self._learned = [address for address in addresses.split(",") if address and address not in self._given]

    def lost(self) -> None:
        """A router was lost: new calls go to those that were learned of too, the given ones first."""
        target = ",".join([*self._given, *self._learned])
        if target != self._target:
            self._target, self._current = target, None
