"""Every Prometheus metric of Tandem's own, by component: base units, low-cardinality labels, never an id.

Declares only; each `main` makes the registry and serves it.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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
