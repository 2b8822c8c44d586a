"""What the command line prints and writes: lines, tables and JSON from plain values. Must not call anybody."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from tandem.cluster_view import ClusterStatus, ModelCard, PredictionScore, ReplicaStatus
from tandem.completion import Completion
from tandem.domain import ModelId, Receipt, ReplicaState, ReplicaTarget, Role
from tandem.errors import ConfigError

_SHOWN_KINDS = {"ttft": "TTFT", "queue": "queue wait", "tpot": "TPOT", "e2e": "E2E"}


def receipt_line(receipt: Receipt) -> str:
    """One line for people: where the time went and who did it."""
    workers = f"{receipt.prefill_replica_id} -> {receipt.decode_replica_id}" if receipt.handed_off else receipt.decode_replica_id
    reason = f" ({receipt.one_worker_reason})" if receipt.one_worker_reason and not receipt.handed_off else ""
    return (
        f"receipt {receipt.request_id}: ttft {receipt.ttft_s:.3f} s"
        f" (queue {receipt.queue_s:.3f}, dispatch {receipt.dispatch_s:.3f}, prefill {receipt.prefill_s:.3f}),"
        f" handoff gap {receipt.handoff_gap_s:.3f} s, e2e {receipt.e2e_s:.3f} s;"
        f" prompt {receipt.prompt_tokens} tokens ({receipt.cached_tokens} cached), output {receipt.output_tokens} tokens;"
        f" kv shipped {receipt.kv_bytes_shipped} bytes; workers {workers}{reason}; attempts {receipt.attempts}"
    )


def generate_report(completion: Completion) -> dict[str, object]:
    """The one output of `tandem generate` as a JSON object."""
    choice = dataclasses.asdict(completion.choices[0])
    return {
        "schema": "tandem.generate/1",
        **{name: choice[name] for name in ("text", "token_ids", "finish_reason", "stop_reason")},
        "usage": None if completion.usage is None else dataclasses.asdict(completion.usage),
        "receipt": None if completion.receipt is None else dataclasses.asdict(completion.receipt),
    }


def models_report(models: Sequence[ModelCard]) -> dict[str, object]:
    """The served models as a JSON object."""
    return {"schema": "tandem.models/1", "models": [dataclasses.asdict(model) for model in models]}


def status_report(status: ClusterStatus) -> dict[str, object]:
    """The cluster's status as a JSON object."""
    return {"schema": "tandem.status/1", **dataclasses.asdict(status)}


def write_report(path: Path, report: dict[str, object]) -> None:
    """Writes one JSON object and makes the folders above it; raises ConfigError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def models_table(models: Sequence[ModelCard]) -> Table:
    """One row a model."""
    table = Table("model", "engine", title="models")
    for heading in ("context tokens", "block tokens", "prefill replicas", "decode replicas"):
        table.add_column(heading, justify="right")
    for model in models:
        counts = (model.context_tokens, model.block_size_tokens, model.prefill_replicas, model.decode_replicas)
        table.add_row(model.id, model.engine, *(str(count) for count in counts))
    return table


def status_table(status: ClusterStatus) -> Table:
    """One row a replica."""
    where = f"cluster {status.cluster}" if status.cluster else f"router {status.router_id}"
    title = f"{where}: {status.running_requests} running, {status.queued_requests} queued"
    table = Table("replica", "role", "model", "engine", "state", title=title)
    for heading in ("running", "waiting", "KV used", "work"):
        table.add_column(heading, justify="right")
    for replica in status.replicas:
        table.add_row(*_status_row(replica))
    table.caption = pools_caption(status)
    return table


def predictions_table(status: ClusterStatus) -> Table | None:
    """Predicted beside actual, by model; None before the first request has ended."""
    table = Table("model", "predictions", "", title="predicted and actual, of the last requests")
    for heading in ("predicted p50", "actual p50", "mean error", "within q90", "requests"):
        table.add_column(heading, justify="right")
    for of_model in status.predictions:
        scores = {score.kind: score for score in of_model.scores}
        trust = "trusted" if of_model.is_trusted else "not trusted, decides without"
        for kind, words in _SHOWN_KINDS.items():
            if kind in scores:
                table.add_row(of_model.model, trust, words, *_score_row(scores[kind]))
    return table if table.row_count else None


def _score_row(score: PredictionScore) -> tuple[str, ...]:
    return (
        f"{score.predicted_p50:.3f} s",
        f"{score.actual_p50:.3f} s",
        f"{score.mean_error_fraction:.0%}",
        f"{score.q90_coverage_fraction:.0%}",
        str(score.window_outcomes),
    )


def pools_caption(status: ClusterStatus) -> str:
    """Each pool's replicas of those wanted, and what waits; "" where no autoscaler has said what it wants."""
    serving = (item.lease for item in status.replicas if item.is_reachable and item.lease.state is ReplicaState.READY)
    ready = Counter((lease.model, lease.role) for lease in serving)
    queued = {queue.model: queue.queued_requests for queue in status.queues if queue.queued_requests}
    models: dict[ModelId, list[str]] = {}
    for target in status.targets:
        models.setdefault(target.model, []).append(f"{target.role} {ready[target.model, target.role]} of {target.replicas}")
    return "\n".join(
        f"{model}: {', '.join(pools)}" + (f", {queued[model]} queued" if model in queued else "") for model, pools in models.items()
    )


def _status_row(replica: ReplicaStatus) -> tuple[str, ...]:
    lease, load = replica.lease, replica.load
    words = (lease.state.value, "" if replica.is_reachable else "unreachable", "straggler" if replica.is_straggler else "")
    counts = (str(load.running_requests), str(load.waiting_requests))
    return (
        lease.replica_id,
        lease.role.value,
        lease.model,
        lease.engine.engine,
        ", ".join(filter(None, words)),
        *counts,
        f"{load.kv_used_fraction:.1%}",
        f"{replica.predicted_work_s:.2f} s",
    )


def parse_target(text: str, *, model: str, expires_in_s: float) -> ReplicaTarget:
    """`prefill=2` or `decode=auto`. Raises ConfigError."""
    name, _, count = text.partition("=")
    if name not in list(Role) or not (count == "auto" or count.isdecimal()):
        raise ConfigError(f"{text!r} is not ROLE=N: prefill=2, decode=1, decode=auto")
    return ReplicaTarget(model=ModelId(model), role=Role(name), replicas=-1 if count == "auto" else int(count), expires_in_s=expires_in_s)


def rates_caption(before: ClusterStatus, now: ClusterStatus, passed_s: float) -> str:
    """Tokens per second over all replicas that are in both views."""
    past = {(item.lease.replica_id, item.lease.incarnation): item.load.generated_tokens_total for item in before.replicas}
    made = [
        item.load.generated_tokens_total - past[key]
        for item in now.replicas
        if (key := (item.lease.replica_id, item.lease.incarnation)) in past
    ]
    return f"{sum(made) / passed_s if passed_s > 0 else 0.0:.1f} tokens/s"
