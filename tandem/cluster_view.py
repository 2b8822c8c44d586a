"""What a router tells about its cluster: the models it serves, its replicas and their load. Plain values from Control and ListModels."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.convert import lease_from_pb, load_from_pb, role_from_pb, role_to_pb
from tandem.domain import Lease, ModelId, ReplicaTarget, WorkerLoad
from tandem.v1 import control_pb2, inference_pb2
from tandem.wire import build, from_message


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A served model. Sizes in tokens."""

    id: ModelId
    context_tokens: int
    block_size_tokens: int
    prefill_replicas: int
    decode_replicas: int
    namespace: str
    engine: str = ""  # of its last replica


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica as the router sees it; `predicted_work_s` is the work booked on it, in seconds.

    `is_straggler`: its engine steps have long been slower than its pool's.
    """

    lease: Lease
    load: WorkerLoad
    is_reachable: bool
    predicted_work_s: float
    is_straggler: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelQueue:
    """What waits in a router for one model, requests held for a replica that is still to start included."""

    model: ModelId
    queued_requests: int = 0
    queued_work_s: float = 0.0  # predicted seconds of prefill
    requests_total: int = 0  # accepted since the router started


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionScore:
    """Predictions of one kind against what happened, over the last `window_outcomes`. Seconds, or tokens of `output_tokens`."""

    kind: str
    outcomes_total: int = 0
    window_outcomes: int = 0
    predicted_p50: float = 0.0
    actual_p50: float = 0.0
    mean_error_fraction: float = 0.0  # |predicted - actual| / actual
    q90_coverage_fraction: float = 0.0  # stayed within what nine in ten should


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPredictions:
    """What a router's predictions for one model are worth; where they are not trusted it decides without them."""

    model: ModelId
    is_trusted: bool
    scores: tuple[PredictionScore, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The cluster at a glance, by one router."""

    cluster: str
    router_id: str
    queued_requests: int
    running_requests: int
    replicas: tuple[ReplicaStatus, ...]
    targets: tuple[ReplicaTarget, ...]
    queues: tuple[ModelQueue, ...] = ()  # by model
    predictions: tuple[ModelPredictions, ...] = ()  # likewise


def models_from_pb(message: inference_pb2.ListModelsResponse) -> tuple[ModelCard, ...]:
    """The models in the router's order."""
    return tuple(from_message(ModelCard, model) for model in message.models)


def status_from_pb(message: control_pb2.GetStatusResponse) -> ClusterStatus:
    """The status, replicas by model, role and id. Raises ProtocolError where a lease or a role is incomplete or unknown."""
    replicas = [
        from_message(ReplicaStatus, replica, lease=lease_from_pb(replica.lease), load=load_from_pb(replica.load))
        for replica in message.replicas
    ]
    replicas.sort(key=lambda replica: (replica.lease.model, replica.lease.role, replica.lease.replica_id))
    targets = tuple(from_message(ReplicaTarget, target, role=role_from_pb(target.role)) for target in message.targets)
    queues = tuple(from_message(ModelQueue, queue) for queue in message.queues)
    predictions = tuple(
        from_message(ModelPredictions, one, scores=tuple(from_message(PredictionScore, score) for score in one.scores))
        for one in message.predictions
    )
    return from_message(ClusterStatus, message, replicas=tuple(replicas), targets=targets, queues=queues, predictions=predictions)


def targets_to_pb(targets: Sequence[ReplicaTarget]) -> control_pb2.SetTargetRequest:
    """Targets set by hand; a negative count gives the pool back to the autoscaler. Raises InvalidRequestError."""
    message = control_pb2.SetTargetRequest()
    for target in targets:
        message.targets.append(
            build(
                control_pb2.Target,
                "targets",
                model=target.model,
                role=role_to_pb(target.role),
                replicas=max(0, target.replicas),
                expires_in_s=target.expires_in_s,
                is_cleared=target.replicas < 0,
            )
        )
    return message
