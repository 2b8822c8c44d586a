"""Every Prometheus metric of Tandem's own, by component: base units, low-cardinality labels, never an id.

Declares only; each `main` makes the registry and serves it.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# One step per factor of about two: from a relayed message to the longest sensible request.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


class RouterMetrics:
    """Of one router process. `outcome` is "ok" or the error's reason."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter("tandem_router_requests_total", "Requests that ended", ("model", "outcome"), registry=registry)
        self.prompt_tokens = Counter("tandem_router_prompt_tokens_total", "Prompt tokens of admitted requests", ("model",), registry=registry)
        self.output_tokens = Counter("tandem_router_output_tokens_total", "Output tokens sent to clients", ("model",), registry=registry)
        self.retries = Counter("tandem_router_retries_total", "Attempts that failed and were continued elsewhere", ("reason",), registry=registry)
        self.ttft = Histogram(
            "tandem_router_ttft_seconds", "Arrival to first token sent", ("model",), buckets=_SECONDS, registry=registry
        )
        self.e2e = Histogram("tandem_router_e2e_seconds", "Arrival to last token sent", ("model",), buckets=_SECONDS, registry=registry)
        self.queue = Histogram("tandem_router_queue_seconds", "Arrival to dispatch", ("model",), buckets=_SECONDS, registry=registry)
        self.ttft_error = Histogram(
            "tandem_router_ttft_error_seconds", "Predicted against actual TTFT, absolute", ("model",), buckets=_SECONDS, registry=registry
        )
        self.queued_requests = Gauge("tandem_router_queued_requests", "Requests that wait in the router", registry=registry)
        self.running_requests = Gauge("tandem_router_running_requests", "Requests that are dispatched", registry=registry)
        self.replicas = Gauge("tandem_router_replicas", "Reachable replicas", ("role",), registry=registry)
        self.dropped_reports = Counter(
            "tandem_router_dropped_reports_total", "Reports of an older incarnation or out of order", registry=registry
        )
        self.task_failures = Counter("tandem_router_task_failures_total", "Unexpected errors at a task's root", ("task",), registry=registry)
        self.loop_lag = Histogram(
            "tandem_router_loop_lag_seconds", "How late the event loop runs a timer", buckets=_SECONDS, registry=registry
        )
