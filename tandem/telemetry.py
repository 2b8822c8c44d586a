"""Every Prometheus metric of Tandem's own, by component: base units, low-cardinality labels, never an id.

Declares only; each `main` makes the registry and serves it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.domain import WorkerLoad
from tandem.engine.base import KvTotals

# One step per factor of about two: from a relayed message to the longest sensible request.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


# Families of `PredictionCollector`. Formulas: router/scores.py and router/pool_times.py.
_PREDICTIONS = {
    "prediction_error_fraction": ("mean(|predicted - actual| / actual) of the last outcomes", ("kind", "model")),
    "prediction_bias_fraction": ("mean((predicted - actual) / actual) of the last outcomes", ("kind", "model")),
    "prediction_q90_coverage_fraction": ("How many of the last outcomes were within the predicted 90 % quantile", ("kind", "model")),
    "prediction_outcomes": ("Predictions scored so far", ("kind", "model")),
    "predictions_are_trusted": ("1 where placement goes by predicted seconds, 0 where it does without", ("model",)),
    "step_time_error_fraction": ("mean(|predicted - actual| / actual) of the last engine steps", ("model", "hardware", "role")),
    "step_time_coefficient_seconds": ("What a unit of a step's work takes", ("model", "hardware", "role", "unit")),
    "straggler_replicas": ("Replicas that have been slower than their pool for 15 s", ("model", "hardware", "role")),
}


class RouterMetrics:
    """Of one router process. `outcome` is "ok" or the error's reason."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tandem_router_{name}_total", text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"tandem_router_{name}_seconds", text, labels, buckets=_SECONDS, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"tandem_router_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests that ended", "model", "outcome")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of valid requests", "model")
        self.output_tokens = counter("output_tokens", "Output tokens sent to clients", "model")
        self.retries = counter("retries", "Attempts that failed and were continued elsewhere", "reason")
        self.dropped_reports = counter("dropped_reports", "Reports of an older incarnation, out of order, from the future or impossible")
        self.http_responses = counter("http_responses", "Answers of the HTTP endpoint", "route", "status")
        self.task_failures = counter("task_failures", "Unexpected errors at a task's root", "task")
        self.unauthenticated = counter("unauthenticated", "Calls without the key of a tenant")
        self.tenant_requests = counter("tenant_requests", "Requests of a tenant that ended", "tenant", "outcome")
        self.tenant_prompt_tokens = counter("tenant_prompt_tokens", "Prompt tokens of a tenant's valid requests", "tenant")
        self.tenant_output_tokens = counter("tenant_output_tokens", "Output tokens sent to a tenant", "tenant")
        self.quota_leases = counter("quota_leases", "Calls for slices of quotas; outcome ok or failed", "outcome")
        self.quota_is_alone = gauge("quota_is_alone", "1 where nobody grants slices: this router goes on with its part of each limit")
        self.queue = seconds("queue", "Arrival to dispatch", "model")
        self.ttft = seconds("ttft", "Arrival to first token sent", "model")
        self.e2e = seconds("e2e", "Arrival to last token sent", "model")
        self.ttft_error = seconds("ttft_error", "Predicted against actual TTFT, absolute", "model")
        self.loop_lag = seconds("loop_lag", "How late the event loop runs a timer")
        self.queued_requests = gauge("queued_requests", "Requests that wait in the router")
        self.running_requests = gauge("running_requests", "Requests that are dispatched")
        self.believed_cached_tokens = counter("believed_cached_tokens", "Prompt tokens that the chosen worker was believed to have cached")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens that the chosen worker had cached, or took from the store")
        self.missed_cached_tokens = counter("missed_cached_tokens", "Believed to be cached, and computed")
        self.block_events = counter("block_events", "Blocks that caches stored or removed", "tier", "outcome")
        self.indexed_blocks = gauge("indexed_blocks", "Blocks of which the prefix index knows a holder")
        self.prefix_copies = counter("prefix_copies", "Hot prefixes copied between nodes: copied, partial, failed, timeout", "outcome")
        self.prefix_copied_blocks = counter("prefix_copied_blocks", "Blocks that came by those copies")
        self.unowned_requests = gauge("unowned_requests", "Requests whose call has ended: a leak")
        self.replicas = gauge("replicas", "Reachable replicas", "role")


class PredictionCollector(Collector):
    """What a router's predictions are worth, read when it is scraped. `facts`: name of a family below, label values, value."""

    def __init__(self, facts: Callable[[], Iterable[tuple[str, tuple[str, ...], float]]]) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        """All families, now."""
        families = {name: GaugeMetricFamily(f"tandem_router_{name}", text, labels=labels) for name, (text, labels) in _PREDICTIONS.items()}
        for name, labels, value in self._facts():
            families[name].add_metric(labels, value)
        yield from families.values()


_KV_COUNTERS = {
    "published_blocks": "Blocks this replica put into the store",
    "published_bytes": "Bytes of those blocks",
    "loaded_blocks": "Blocks this replica took from the store",
    "loaded_bytes": "Bytes of those blocks",
    "corrupt_blocks": "Blocks that failed their check, were taken out of sight and computed again",
    "missing_blocks": "Blocks that were gone between lookup and load, and computed",
    "unstored_blocks": "Blocks that found no room in the store",
    "evicted_blocks": "Blocks this replica evicted, least recently used first",
}


class WorkerCollector(Collector):
    """A replica's own metrics, read when they are scraped. vLLM's stand beside them unchanged."""

    def __init__(
        self,
        load: Callable[[], WorkerLoad],
        kv_totals: Callable[[], KvTotals],
        unowned_requests: Callable[[], int],
        accepted_prefill_tokens: Callable[[], int],
    ) -> None:
        self._load = load
        self._accepted_prefill_tokens = accepted_prefill_tokens
        self._unowned_requests = unowned_requests
        self._kv_totals = kv_totals

    def collect(self) -> Iterator[Metric]:
        """All families, now."""
        load = self._load()
        yield GaugeMetricFamily("tandem_worker_running_requests", "Accepted attempts that have not ended", load.running_requests)
        yield GaugeMetricFamily(
            "tandem_worker_pending_prefill_tokens",
            "Prompt tokens of accepted attempts that are to be computed before their first token",
            load.pending_prefill_tokens,
        )
        yield GaugeMetricFamily("tandem_worker_kv_tokens", "Tokens whose KV running attempts hold", load.kv_tokens)
        yield GaugeMetricFamily(
            "tandem_worker_unowned_requests", "Requests, booked or in the engine, whose call has ended: a leak", self._unowned_requests()
        )
        yield CounterMetricFamily(
            "tandem_worker_accepted_prefill_tokens",
            "Prompt tokens of accepted attempts that were to be computed",
            self._accepted_prefill_tokens(),
        )
        yield CounterMetricFamily("tandem_worker_generated_tokens", "Tokens that left this replica", load.generated_tokens_total)
        for name, value in asdict(self._kv_totals()).items():
            yield CounterMetricFamily(f"tandem_kv_{name}", _KV_COUNTERS[name], value)


class RemoteKvMetrics:
    """Of a decode worker's hand-offs from other nodes. `outcome` is "copied", "partial", "failed", "timeout" or "paused"."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.copies = Counter(
            "tandem_kv_remote_copies_total", "Hand-offs whose blocks were asked for from another node", ("outcome",), registry=registry
        )
        self.copied_blocks = Counter(
            "tandem_kv_remote_copied_blocks_total", "Blocks that were copied from another node for a hand-off", registry=registry
        )
        self.recomputed_blocks = Counter(
            "tandem_kv_remote_recomputed_blocks_total",
            "Prompt blocks that were not known to have come in time: computed here",
            registry=registry,
        )
        self.copy = Histogram(
            "tandem_kv_remote_copy_seconds", "How long a hand-off waited for blocks of another node", buckets=_SECONDS, registry=registry
        )


_STORE_GAUGES = {
    "used_bytes": "Bytes of the blocks that the store holds",
    "capacity_bytes": "Bytes that it holds at most once eviction has run",
    "blocks": "Blocks that it holds",
    "granted_slots": "Slots that writers hold ready or are filling",
    "leased_blocks": "Blocks that are not evicted for a while, because somebody is about to load them",
    "leaked_slots": "Slots of writers that are dead, until the next round gives them back",
}
_STORE_COUNTERS = {
    "fetched_blocks": "Blocks fetched from other nodes",
    "fetched_bytes": "Bytes of those blocks",
    "served_blocks": "Blocks sent to other nodes",
    "served_bytes": "Bytes of those blocks",
    "missing_blocks": "Blocks that another node asked for and that are not held",
    "corrupt_blocks": "Blocks that failed their check, here or on the way here",
    "unstored_blocks": "Fetched blocks that found no room",
    "evicted_blocks": "Blocks that the service evicted, least recently used first",
    "bad_requests": "Connections that said what no store says",
    "bad_answers": "Answers of other stores that were damaged, or lied about sizes",
}


_TIER_GAUGES = {
    "used_bytes": "Bytes that a tier below the arena holds",
    "capacity_bytes": "Bytes that it holds at most",
    "blocks": "Blocks that it holds",
    "up": "1 where it is in use, 0 where it failed and is left alone for a while",
}
_TIER_COUNTERS = {
    "promoted_blocks": "Blocks that came up from it into the arena",
    "demoted_blocks": "Blocks that went down to it before they were evicted, or at the end",
    "corrupt_blocks": "Blocks of it that failed their check",
}


class StoreCollector(Collector):
    """A store service's own metrics, read when they are scraped: sizes now and cumulative counts by name, those of lower tiers by tier."""

    def __init__(
        self,
        sizes: Callable[[], Mapping[str, int]],
        totals: Callable[[], Mapping[str, int]],
        tiers: Callable[[], Mapping[str, Mapping[str, int]]] = dict,
    ) -> None:
        self._sizes = sizes
        self._totals = totals
        self._tiers = tiers

    def collect(self) -> Iterator[Metric]:
        """All families, now; O(blocks)."""
        for name, value in self._sizes().items():
            yield GaugeMetricFamily(f"tandem_store_{name}", _STORE_GAUGES[name], value)
        for name, value in self._totals().items():
            yield CounterMetricFamily(f"tandem_store_{name}", _STORE_COUNTERS[name], value)
        tiers = self._tiers()
        for name, words in (_TIER_GAUGES | _TIER_COUNTERS).items():
            kind = GaugeMetricFamily if name in _TIER_GAUGES else CounterMetricFamily
            family = kind(f"tandem_store_tier_{name}", words, labels=("tier",))
            for tier, values in tiers.items():
                family.add_metric((tier,), values[name])
            yield family


class ScalerMetrics:
    """Of one autoscaler."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("model", "role")
        self.is_leader = Gauge("tandem_autoscaler_is_leader", "1 where this candidate leads", registry=registry)
        self.target_replicas = Gauge("tandem_autoscaler_target_replicas", "Replicas wanted", labels, registry=registry)
        self.current_replicas = Gauge("tandem_autoscaler_current_replicas", "Replicas starting or ready", labels, registry=registry)
        self.decisions = Counter("tandem_autoscaler_decisions_total", "Changed decisions", (*labels, "reason"), registry=registry)
        self.ticks = Histogram("tandem_autoscaler_tick_seconds", "Observe, decide, reconcile", buckets=_SECONDS, registry=registry)
