"""One fault after the other, each once the last has recovered. Must not know how a part is broken, nor judge what streams went through."""

import asyncio
import time
from collections.abc import Callable

from tandem.chaos.actions import Breaker
from tandem.chaos.cases import Send, Transport
from tandem.chaos.health import Health
from tandem.chaos.schedule import PlannedFault, Row
from tandem.chaos.streams import Load
from tandem.chaos.verdict import FaultRecord, grown

RECOVERY_S = 90.0  # for one fault; after that it is not covered
_FREED_S = 5.0  # the promise is 1 s; the rest is for a machine that the run itself keeps busy
_POLL_S = 0.1
_QUIET_S = 60.0
_CANCELLED_AT_ONCE = 4
_STREAMS_TO_MEET, _MEET_S, _MEET_JITTER_S = 5, 2.0, 0.3

Progress = Callable[[str], None]


class Conductor:
    """One fault after the other, each once the last has recovered. `records`, `leaks` and `found_blocks` (damaged ones) grow meanwhile."""

    def __init__(self, health: Health, breaker: Breaker, progress: Progress) -> None:
        self.records: list[FaultRecord] = []
        self.leaks: list[str] = []
        self.found_blocks = 0
        self.started_s = 0.0
        self._health = health
        self._breaker = breaker
        self._progress = progress
        self._router_spans: list[list[float]] = []  # from, until (infinity while it lasts)

    def was_router_broken(self, since_s: float) -> bool:
        """Whether a router was killed or stopped, or had not recovered, at that moment or later."""
        return any(until_s >= since_s for _, until_s in self._router_spans)

    async def conduct(self, faults: tuple[PlannedFault, ...], load: Load, ends_s: float) -> None:
        """All of them, or as many as begin before `ends_s`."""
        for fault in faults:
            await asyncio.sleep(fault.lull_s)
            if time.monotonic() > ends_s:
                self._progress("the time is over before the faults are")
                return
            if fault.row is not Row.CLIENT:
                await self._meet_streams(fault, load)
            at_s = time.monotonic() - self.started_s
            record = FaultRecord(planned=fault, at_s=at_s, ended_s=at_s, missing="the run ended first")
            self.records.append(record)
            words = f"{fault.row}.{fault.action}; {len(load.seen)} requests, {load.in_flight} in flight"
            self._progress(f"fault {fault.number + 1} of {len(faults)}: {words}")
            try:
                await (self._cancel_clients(record, load) if fault.row is Row.CLIENT else self._break(record))
            except Exception as error:  # the root of one fault: the run goes on, and the pair is not covered
                record.missing = f"the harness failed: {error!r}"

    async def _meet_streams(self, fault: PlannedFault, load: Load) -> None:
        """Has some streams run, each somewhere between its start and its end."""
        load.hurry(_STREAMS_TO_MEET, Transport.PROXIED if fault.row is Row.NETWORK else None)
        ends_s = time.monotonic() + _MEET_S
        while time.monotonic() < ends_s and not self._has_met(fault, load):  # noqa: ASYNC110 - the records are plain values
            await asyncio.sleep(_POLL_S / 10)
        await asyncio.sleep(_MEET_JITTER_S * fault.pick)

    def _has_met(self, fault: PlannedFault, load: Load) -> bool:
        """Whether enough streams run; for a network fault, some of them through the proxy."""
        return load.in_flight >= _STREAMS_TO_MEET and (fault.row is not Row.NETWORK or self._breaker.connections > 0)

    async def _break(self, record: FaultRecord) -> None:
        fault = record.planned
        if fault.row is Row.ROUTER:
            self._router_spans.append([time.monotonic(), float("inf")])
        try:
            broken = await self._breaker.break_part(fault)
            record.target, ended_s = broken.target, time.monotonic()
            record.ended_s = ended_s - self.started_s
            if not broken.target:
                record.missing = "nobody to break"
                return
            record.missing = await self._health.whole_again(broken.gone, RECOVERY_S)
            record.recovered_s = None if record.missing else time.monotonic() - ended_s
            if fault.row is Row.BLOCK:
                found = await self._health.corrupt_blocks()
                self.found_blocks += found
                record.detail = f"{found} found by then"
        finally:
            if fault.row is Row.ROUTER:
                self._router_spans[-1][1] = time.monotonic()

    async def _cancel_clients(self, record: FaultRecord, load: Load) -> None:
        """In a lull of the load, some clients go away at once: how long until the platform holds nothing of theirs."""
        async with load.paused(_QUIET_S), asyncio.TaskGroup() as group:
            idle = await settled(self._health, {}, _FREED_S)
            longest = load.longest_case
            sends = [
                Send(
                    index=-1 - record.planned.number * _CANCELLED_AT_ONCE - number,
                    case=longest,
                    gap_s=0.0,
                    transport=Transport.SDK,
                    first_router=number / _CANCELLED_AT_ONCE,
                    cancel_after_tokens=8,
                )
                for number in range(_CANCELLED_AT_ONCE)
            ]
            record.at_s = time.monotonic() - self.started_s
            seen = [load.start(send, group) for send in sends]
            while any(one.ended_s is None for one in seen):  # noqa: ASYNC110 - the records are plain values
                await asyncio.sleep(_POLL_S / 10)
            ended_s = time.monotonic()
            record.target, record.ended_s = f"{len(seen)} clients", ended_s - self.started_s
            held = await self._held(idle)
            while held and time.monotonic() - ended_s < _FREED_S:
                await asyncio.sleep(_POLL_S)
                held = await self._held(idle)
            record.recovered_s = None if held else time.monotonic() - ended_s
            record.missing = ", ".join(held)
            self.leaks += [f"held {_FREED_S:g} s after its client went away: {name}" for name in held]

    async def _held(self, idle: dict[str, float]) -> dict[str, tuple[float, float]]:
        """What is held beyond `idle`, but for leases of blocks: those end by time, whoever took them."""
        now = await self._health.gauges()
        return grown(idle, {name: value for name, value in now.items() if not name.endswith("leased_blocks")})


async def settled(health: Health, start: dict[str, float], settle_s: float) -> dict[str, float]:
    """The gauges once none is above its start, or as they are after a while. Slots that writers hold ready are no start's zero."""
    ends_s = time.monotonic() + settle_s
    gauges = await health.gauges()
    while _above(start, gauges) and time.monotonic() < ends_s:
        await asyncio.sleep(_POLL_S)
        gauges = await health.gauges()
    return gauges


def _above(start: dict[str, float], gauges: dict[str, float]) -> bool:
    return any("granted_slots" not in name or start for name in grown(start, gauges))
