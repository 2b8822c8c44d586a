"""The life of a chaos run: a platform, the reference, the load, one fault after the other, the end's accounts. Must not print.

`disturb` works on a platform that is there; `run_chaos` starts one, disturbs it and stops it.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from tandem.chaos.actions import Breaker
from tandem.chaos.cases import endless_sends, plan_cases
from tandem.chaos.clients import Clients
from tandem.chaos.cluster import ChaosCluster
from tandem.chaos.conductor import RECOVERY_S, Conductor, Progress, settled
from tandem.chaos.damage import leaked_lease
from tandem.chaos.health import Health
from tandem.chaos.proxy import Proxy
from tandem.chaos.reference import read_prompts, reference_answers
from tandem.chaos.schedule import ALL_PAIRS, QUICK_PAIRS, Pair, PlannedFault, plan_faults
from tandem.chaos.streams import Load, SeededBug
from tandem.chaos.verdict import Findings, Seen, grown, report_of
from tandem.client import AsyncClient

_INTERRUPTED_S = 3.0  # for each of the last looks after Ctrl-C
_RESERVE_S = 45.0  # of the time limit, for the end


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosOptions:
    """What `tandem chaos` is asked for. `cases` are different requests, `requests` how many are sent at least."""

    seed: int = 0
    requests: int = 200
    cases: int = 200
    prefill: int = 2
    decode: int = 2
    routers: int = 2
    minutes: float = 15.0
    model: str = "bundled"
    rate_rps: float = 1.0
    settle_s: float = 30.0  # that gauges have to come back: leases of blocks last 10 s
    pairs: tuple[Pair, ...] = ALL_PAIRS
    rounds: int = 2
    lull_s: float = 1.0
    logs: Path | None = None  # where those of all processes are kept
    bug: SeededBug | None = None

    def made_quick(self) -> "ChaosOptions":
        """A run that shows that the harness works, and no more."""
        short = replace(self, requests=24, cases=12, rate_rps=4.0, settle_s=14.0)
        return replace(short, pairs=QUICK_PAIRS, rounds=1, lull_s=0.5)

    @property
    def faults(self) -> tuple[PlannedFault, ...]:
        """The schedule."""
        return plan_faults(self.seed, pairs=self.pairs, rounds=self.rounds, lull_s=self.lull_s)


@dataclass(slots=True)
class Stop:
    """What Ctrl-C sets once the load runs: it ends the faults and the load, not the report."""

    is_asked: asyncio.Event = field(default_factory=asyncio.Event)
    is_loading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosResult:
    """A run's report, and the streams behind it; `started_s` is where the report's times begin."""

    report: dict[str, object]
    seen: Sequence[Seen]
    started_s: float


async def run_chaos(options: ChaosOptions, progress: Progress, stop: Stop) -> ChaosResult:
    """One whole run. Raises ConfigError where the platform does not start."""
    begun_s = time.monotonic()
    cluster = ChaosCluster(prefill=options.prefill, decode=options.decode, routers=options.routers, model=options.model)
    left: list[str] = []
    try:
        await cluster.start(progress)
        ends_s = begun_s + 60.0 * options.minutes - _RESERVE_S
        findings = await disturb(cluster, options, progress, stop, ends_s=ends_s)
    finally:
        progress("stopping the platform")
        left = await cluster.stop(options.logs)
    conditions = {**findings.conditions, "took_s": time.monotonic() - begun_s}
    leaks = [*findings.leaks, *(f"after the stop: {item}" for item in left)]
    report = report_of(replace(findings, leaks=leaks, conditions=conditions))
    return ChaosResult(report=report, seen=findings.seen, started_s=findings.started_s)


async def disturb(cluster: ChaosCluster, options: ChaosOptions, progress: Progress, stop: Stop, *, ends_s: float) -> Findings:
    """Reference, load and faults on a platform that is up, until `ends_s` (of time.monotonic) at most; it is whole and idle afterwards."""
    cases = plan_cases(options.cases, options.seed)
    prompts = read_prompts(cases)
    expected = await reference_answers(cluster, cases, prompts, progress)
    health = Health(cluster)
    try:
        async with _clients(cluster) as (clients, proxy), AsyncClient(cluster.routers[0]) as first:
            model = (await first.models())[0].id
            await health.whole_again((), RECOVERY_S)
            await health.begin()
            before = await settled(health, {}, options.settle_s)
            await health.corrupt_blocks()
            conductor = Conductor(health, Breaker(cluster, health, proxy), progress)
            load = Load(
                cases=cases,
                prompts=prompts,
                clients=clients,
                http_urls=cluster.http_urls,
                model=model,
                was_router_broken=conductor.was_router_broken,
                bug=options.bug,
            )
            started_s = conductor.started_s = time.monotonic()
            stop.is_loading = True
            sends = endless_sends(cases, options.seed, options.rate_rps)
            async with asyncio.TaskGroup() as group:
                running = group.create_task(load.run(sends, options.requests), name="chaos load")
                conducting = group.create_task(conductor.conduct(options.faults, load, ends_s), name="chaos faults")
                asked = group.create_task(stop.is_asked.wait(), name="chaos stop")
                await asyncio.wait({conducting, asked}, return_when=asyncio.FIRST_COMPLETED)
                conducting.cancel()
                load.stop()
                if stop.is_asked.is_set():
                    running.cancel()
                progress("waiting for the last streams")
                await asyncio.wait({running})
                asked.cancel()
            progress("counting what is left")
            with leaked_lease(Path(cluster.node()[1].store_dir)) if options.bug is SeededBug.LEAKED_LEASE else nullcontext():
                missing = await health.whole_again((), _INTERRUPTED_S if stop.is_asked.is_set() else RECOVERY_S)
                after = await settled(health, before, _INTERRUPTED_S if stop.is_asked.is_set() else options.settle_s)
            leaks = [f"{name}: {was:g} before, {now:g} now" for name, (was, now) in grown(before, after).items()]
            leaks += health.extra_processes()
            leaks += [f"not whole at the end: {missing}"] if missing else []
            leaks += conductor.leaks
            found_blocks = conductor.found_blocks + await health.corrupt_blocks()
    finally:
        await health.close()
    return Findings(
        seed=options.seed,
        conditions=_conditions(options, model),
        started_s=started_s,
        seen=load.seen,
        expected=expected,
        planned=options.faults,
        faults=conductor.records,
        leaks=leaks,
        found_blocks=found_blocks,
        skipped_sends=load.skipped,
        is_interrupted=stop.is_asked.is_set(),
    )


@asynccontextmanager
async def _clients(cluster: ChaosCluster) -> AsyncIterator[tuple[Clients, Proxy]]:
    proxy = Proxy(cluster.routers[0])
    await proxy.start()
    clients = Clients(cluster.routers, proxy)
    try:
        yield clients, proxy
    finally:
        await clients.close()
        await proxy.close()


def _conditions(options: ChaosOptions, model: str) -> dict[str, object]:
    """What the figures depend on."""
    names = ("requests", "cases", "prefill", "decode", "routers", "minutes", "rate_rps", "rounds")
    return {
        **{name: getattr(options, name) for name in names},
        "model": model,
        "dtype": "float32",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "seeded_bug": None if options.bug is None else options.bug.value,
    }
