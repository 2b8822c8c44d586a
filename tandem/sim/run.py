"""Runs simulations: every setting, policy and seed, some at the same time. Must not read files or print.

A run is a function of its `Task` and the rows: same task, same event log, in any process.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from random import Random

from router.block_probe_library import load_probe
from router.config import RouterConfig
from router.core import RouterCore
from router.policies import PolicyParameters
from router.predict import LoadPredictor
from tandem.sim.arrivals import Arrival, arrivals_of, ideal_hit_tokens
from tandem.sim.cluster import Cluster, ClusterPlan, Outcome
from tandem.sim.engine_profile import H200_LLAMA_8B_FP8, EngineProfile
from tandem.sim.figures import Figures, figures_of
from tandem.sim.objective import Objective
from tandem.sim.predictors import NoisyPredictor, TrueModel
from tandem.sim.variants import Setting, Variant
from tandem.sim.watch import NamedStraggler, TrustChange
from tandem.sim.worker import Network
from tandem.workload import TraceRow

_UNBOUNDED = 1 << 30
_FREE_BYTES_PER_S = 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What all runs of one command share."""

    prefill_replicas: int = 16
    decode_replicas: int = 16
    load: float = 0.85
    report_delay_s: float = 0.0
    predictor_noise: float = 0.0
    slow_replica: float = 1.0
    slow_fleet: float = 1.0
    profile: EngineProfile = H200_LLAMA_8B_FP8
    objective: Objective = field(default_factory=Objective)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run."""

    scenario: Scenario
    setting: Setting
    variant: Variant
    seed: int
    parameters: PolicyParameters = field(default_factory=PolicyParameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of a task. `ideal_hit_fraction`: of the same arrivals, were every block kept for ever and known at once."""

    task: Task
    figures: Figures
    ideal_hit_fraction: float
    rejected_requests: int
    digest: str
    stragglers: tuple[NamedStraggler, ...] = ()
    trust_changes: tuple[TrustChange, ...] = ()


def run_all(rows: Sequence[TraceRow], tasks: Sequence[Task], *, processes: int, on_done: Callable[[Run], None]) -> list[Run]:
    """All runs, in the order of their tasks; `on_done` as each ends."""
    if processes < 2:
        runs, arrivals = [], _Arrivals(rows)
        for task in tasks:
            runs.append(_run(arrivals, task))
            on_done(runs[-1])
        return runs
    done: dict[int, Run] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_share_rows, initargs=(rows,)) as pool:
        futures = {pool.submit(_run_shared, task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                run = done[futures[future]] = future.result()
                on_done(run)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [done[number] for number in range(len(tasks))]


def run_task(rows: Sequence[TraceRow], task: Task) -> Run:
    """One run."""
    return _run(_Arrivals(rows), task)


class _Arrivals:
    """The rows as the requests of the last seed that was asked for: tasks come seed by seed."""

    def __init__(self, rows: Sequence[TraceRow]) -> None:
        self._rows = rows
        self._made_for: tuple[Scenario, int] | None = None
        self._arrivals: Sequence[Arrival] = ()
        self._ideal: Sequence[int] = ()

    def of(self, scenario: Scenario, seed: int) -> tuple[Sequence[Arrival], Sequence[int]]:
        """The requests, and what `ideal_hit_tokens` says of them."""
        if self._made_for != (scenario, seed):
            profile, replicas = scenario.profile, scenario.prefill_replicas
            self._arrivals = arrivals_of(self._rows, profile=profile, prefill_replicas=replicas, load=scenario.load, seed=seed)
            self._ideal = ideal_hit_tokens(self._arrivals)
            self._made_for = scenario, seed
        return self._arrivals, self._ideal


def _run(shared: _Arrivals, task: Task) -> Run:
    scenario, variant = task.scenario, task.variant
    arrivals, ideal = shared.of(scenario, task.seed)
    stragglers, trust_changes = tuple[NamedStraggler, ...](), tuple[TrustChange, ...]()
    if variant.is_without_queue:
        outcomes, digest = _without_queue(arrivals, ideal, scenario.profile, Network()), ""
    else:
        plan = _plan(task)
        cluster = Cluster(plan, _core(task, plan), arrivals, task.seed)
        with _not_collecting():
            digest = cluster.run()
        outcomes = list(cluster.outcomes.values())
        stragglers, trust_changes = cluster.watch.stragglers, cluster.watch.trust_changes
    return Run(
        task=task,
        figures=figures_of(outcomes, scenario.profile, scenario.objective),
        ideal_hit_fraction=sum(ideal) / sum(arrival.prompt_tokens for arrival in arrivals),
        rejected_requests=sum(outcome.is_rejected for outcome in outcomes),
        digest=digest,
        stragglers=stragglers,
        trust_changes=trust_changes,
    )


@contextmanager
def _not_collecting() -> Iterator[None]:
    """A run makes hardly any cycles: looking for them each 700 objects, as Python does by itself, takes a fifth of its time."""
    gc.collect()  # the run before
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _plan(task: Task) -> ClusterPlan:
    scenario, setting = task.scenario, task.setting
    network = Network(report_delay_s=scenario.report_delay_s)
    local_tokens, store_tokens = setting.local_tokens, setting.store_tokens
    if task.variant.has_free_store:
        network = replace(network, latency_s=0.0, link_bytes_per_s=_FREE_BYTES_PER_S)
        store_tokens = _UNBOUNDED
    return ClusterPlan(
        profile=scenario.profile,
        prefill_replicas=scenario.prefill_replicas,
        decode_replicas=scenario.decode_replicas,
        local_tokens=local_tokens,
        store_tokens=store_tokens,
        is_store_known=task.variant.knows_store,
        network=network,
        objective=scenario.objective,
        slow_replica=scenario.slow_replica,
        slow_fleet=scenario.slow_fleet,
    )


def _core(task: Task, plan: ClusterPlan) -> RouterCore:
    """The live router's core, with bounds for this many replicas. Nothing moves: no replica drains, and none gets crowded for long."""
    scenario, variant = task.scenario, task.variant
    config = RouterConfig(
        policy=variant.policy,
        max_running_requests=_UNBOUNDED,
        max_queued_requests=_UNBOUNDED,
        rebalance_gap_fraction=1.0,
    )
    predictor: LoadPredictor | None = None
    if variant.is_told_physics:
        predictor = TrueModel(plan.profile)
    elif scenario.predictor_noise:
        predictor = NoisyPredictor(scenario.predictor_noise, Random(f"predictor {task.seed}"))
    return RouterCore(config, Random(f"router {task.seed}"), predictor=predictor, parameters=task.parameters, bind_probe=load_probe())


def _without_queue(arrivals: Sequence[Arrival], ideal: Sequence[int], profile: EngineProfile, network: Network) -> list[Outcome]:
    """Every request alone on engines of its own, with the ideal cache: nothing that serves can be quicker."""
    outcomes = []
    for arrival, cached in zip(arrivals, ideal, strict=True):
        first_s = arrival.time_s + network.dispatch_s + profile.prefill_s(arrival.prompt_tokens - cached, cached)
        end_s = first_s + profile.decode_s(arrival.output_tokens - 1, 1, arrival.prompt_tokens + 1)
        outcomes.append(Outcome(arrival=arrival, first_token_s=first_s, end_s=end_s, cached_tokens=cached))
    return outcomes


class _Shared:
    """The rows, sent to each process once."""

    arrivals = _Arrivals(())


def _share_rows(rows: Sequence[TraceRow]) -> None:
    _Shared.arrivals = _Arrivals(rows)


def _run_shared(task: Task) -> Run:
    return _run(_Shared.arrivals, task)
