"""Breaking one part: signals to its processes, bytes of the arena, the proxy's modes.

Must not decide what is broken, nor wait for a recovery.
"""

import asyncio
import signal
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tandem.chaos.cluster import ChaosCluster
from tandem.chaos.damage import flip_blocks
from tandem.chaos.health import Health
from tandem.chaos.proxy import Proxy
from tandem.chaos.schedule import Action, PlannedFault, Row
from tandem.chaos.signals import Held, slow_for, stop_for
from tandem.chaos.targets import find_victims

_DELAY_S = 0.05  # each way, each piece
_FLIPPED_SHARE = 0.25  # of the committed blocks
_FLIP_TRIES, _FLIP_PAUSE_S = 50, 0.2
_KILLS = (Action.KILL, Action.KILL_CORE, Action.KILL_GCS, Action.KILL_RAYLET)


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """What was done: to whom (empty where nobody was found), and which processes must be gone before anything counts as recovered."""

    target: str
    gone: tuple[int, ...] = ()


class Breaker:
    """Breaks parts of one platform, each for the fault's own time."""

    def __init__(self, cluster: ChaosCluster, health: Health, proxy: Proxy) -> None:
        self._cluster = cluster
        self._health = health
        self._proxy = proxy

    @property
    def connections(self) -> int:
        """Clients that the network faults would meet."""
        return self._proxy.connections // 2

    async def break_part(self, fault: PlannedFault) -> Broken:
        """Returns once the fault has ended: at once for a kill, after `hold_s` for what is held. Not for `client.cancel`."""
        if fault.row is Row.NETWORK:
            return await self._break_network(fault)
        if fault.row is Row.BLOCK:
            return await self._flip(Random(fault.pick))
        victims = await asyncio.to_thread(find_victims, self._cluster.id, fault, self._health.members)
        held = Held(self._cluster.id, [victim.pid for victim in victims])
        try:
            target = ", ".join(f"{victim.name} ({victim.pid})" for victim in victims if victim.pid in held.pids)
            if fault.action in _KILLS:
                held.send(signal.SIGKILL)
                return Broken(target=target, gone=tuple(held.pids))
            await (slow_for if fault.action is Action.SLOW else stop_for)(held, fault.hold_s)
            return Broken(target=target)
        finally:
            held.close()

    async def _flip(self, rng: Random) -> Broken:
        """Damages blocks as soon as there are some."""
        folder = Path(self._cluster.node()[1].store_dir)
        for _ in range(_FLIP_TRIES):
            if flipped := await asyncio.to_thread(flip_blocks, folder, _FLIPPED_SHARE, rng):
                return Broken(target=f"{flipped} blocks")
            await asyncio.sleep(_FLIP_PAUSE_S)
        return Broken(target="")

    async def _break_network(self, fault: PlannedFault) -> Broken:
        """Between the proxied clients and their first router."""
        connections = self.connections
        if fault.action is Action.DELAY:
            self._proxy.delay_s = _DELAY_S
        elif fault.action is Action.BLACK_HOLE:
            self._proxy.black_hole()
        try:
            await asyncio.sleep(fault.hold_s)
        finally:
            if fault.action in (Action.BLACK_HOLE, Action.RESET):
                self._proxy.reset()
            self._proxy.pass_again()
        return Broken(target=f"{connections} connections" if connections else "")
