"""Every Prometheus metric of Tandem's own, by component: base units, low-cardinality labels, never an id.

Declares only; each `main` makes the registry and serves it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.domain import WorkerLoad
from tandem.engine.base import KvTotals

# One step per factor of about two: from a relayed message to the longest sensible request.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


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
        self.dropped_reports = counter("dropped_reports", "Reports of an older incarnation or out of order")
        self.task_failures = counter("task_failures", "Unexpected errors at a task's root", "task")
        self.queue = seconds("queue", "Arrival to dispatch", "model")
        self.ttft = seconds("ttft", "Arrival to first token sent", "model")
        self.e2e = seconds("e2e", "Arrival to last token sent", "model")
        self.ttft_error = seconds("ttft_error", "Predicted against actual TTFT, absolute", "model")
        self.loop_lag = seconds("loop_lag", "How late the event loop runs a timer")
        self.queued_requests = gauge("queued_requests", "Requests that wait in the router")
        self.running_requests = gauge("running_requests", "Requests that are dispatched")
        self.replicas = gauge("replicas", "Reachable replicas", "role")


_KV_COUNTERS = {
    "published_blocks": "Blocks this replica put into the store",
    "published_bytes": "Bytes of those blocks",
    "loaded_blocks": "Blocks this replica took from the store",
    "loaded_bytes": "Bytes of those blocks",
    "corrupt_blocks": "Blocks that failed their check, were taken out of sight and computed again",
    "missing_blocks": "Blocks that were gone between lookup and load, and computed",
    "unstored_blocks": "Blocks that found no room in staging or store",
    "evicted_blocks": "Blocks this replica evicted, least recently used first",
}


class WorkerCollector(Collector):
    """A replica's own metrics, read when they are scraped. vLLM's stand beside them unchanged."""

    def __init__(self, load: Callable[[], WorkerLoad], kv_totals: Callable[[], KvTotals]) -> None:
        self._load = load
        self._kv_totals = kv_totals

    def collect(self) -> Iterator[Metric]:
        """All families, now."""
        load = self._load()
        yield GaugeMetricFamily("tandem_worker_running_requests", "Accepted attempts that have not ended", load.running_requests)
        yield GaugeMetricFamily(
            "tandem_worker_pending_prefill_tokens", "Accepted prompt tokens before their first token", load.pending_prefill_tokens
        )
        yield GaugeMetricFamily("tandem_worker_kv_tokens", "Tokens whose KV running attempts hold", load.kv_tokens)
        yield CounterMetricFamily("tandem_worker_generated_tokens", "Tokens that left this replica", load.generated_tokens_total)
        for name, value in asdict(self._kv_totals()).items():
            yield CounterMetricFamily(f"tandem_kv_{name}", _KV_COUNTERS[name], value)
