from tandem.v1 import common_pb2 as _common_pb2
from tandem.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("cluster", "router_id", "replicas", "targets", "queued_requests", "running_requests", "queues", "predictions")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    router_id: str
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    queued_requests: int
    running_requests: int
    queues: _containers.RepeatedCompositeFieldContainer[ModelQueue]
    predictions: _containers.RepeatedCompositeFieldContainer[ModelPredictions]
    def __init__(self, cluster: _Optional[str] = ..., router_id: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., queued_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., queues: _Optional[_Iterable[_Union[ModelQueue, _Mapping]]] = ..., predictions: _Optional[_Iterable[_Union[ModelPredictions, _Mapping]]] = ...) -> None: ...

class ModelPredictions(_message.Message):
    __slots__ = ("model", "is_trusted", "scores")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IS_TRUSTED_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    model: str
    is_trusted: bool
    scores: _containers.RepeatedCompositeFieldContainer[PredictionScore]
    def __init__(self, model: _Optional[str] = ..., is_trusted: _Optional[bool] = ..., scores: _Optional[_Iterable[_Union[PredictionScore, _Mapping]]] = ...) -> None: ...

class PredictionScore(_message.Message):
    __slots__ = ("kind", "outcomes_total", "window_outcomes", "predicted_p50", "actual_p50", "mean_error_fraction", "q90_coverage_fraction")
    KIND_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_P50_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_P50_FIELD_NUMBER: _ClassVar[int]
    MEAN_ERROR_FRACTION_FIELD_NUMBER: _ClassVar[int]
    Q90_COVERAGE_FRACTION_FIELD_NUMBER: _ClassVar[int]
    kind: str
    outcomes_total: int
    window_outcomes: int
    predicted_p50: float
    actual_p50: float
    mean_error_fraction: float
    q90_coverage_fraction: float
    def __init__(self, kind: _Optional[str] = ..., outcomes_total: _Optional[int] = ..., window_outcomes: _Optional[int] = ..., predicted_p50: _Optional[float] = ..., actual_p50: _Optional[float] = ..., mean_error_fraction: _Optional[float] = ..., q90_coverage_fraction: _Optional[float] = ...) -> None: ...

class ModelQueue(_message.Message):
    __slots__ = ("model", "queued_requests", "queued_work_s", "requests_total")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_WORK_S_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    model: str
    queued_requests: int
    queued_work_s: float
    requests_total: int
    def __init__(self, model: _Optional[str] = ..., queued_requests: _Optional[int] = ..., queued_work_s: _Optional[float] = ..., requests_total: _Optional[int] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("lease", "load", "is_reachable", "predicted_work_s", "is_straggler")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    IS_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_WORK_S_FIELD_NUMBER: _ClassVar[int]
    IS_STRAGGLER_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.Lease
    load: _worker_pb2.WorkerLoad
    is_reachable: bool
    predicted_work_s: float
    is_straggler: bool
    def __init__(self, lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., load: _Optional[_Union[_worker_pb2.WorkerLoad, _Mapping]] = ..., is_reachable: _Optional[bool] = ..., predicted_work_s: _Optional[float] = ..., is_straggler: _Optional[bool] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("model", "role", "replicas", "expires_in_s", "is_cleared")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    IS_CLEARED_FIELD_NUMBER: _ClassVar[int]
    model: str
    role: _common_pb2.Role
    replicas: int
    expires_in_s: float
    is_cleared: bool
    def __init__(self, model: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., replicas: _Optional[int] = ..., expires_in_s: _Optional[float] = ..., is_cleared: _Optional[bool] = ...) -> None: ...

class SetTargetRequest(_message.Message):
    __slots__ = ("targets",)
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    def __init__(self, targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ...) -> None: ...

class SetTargetResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class DrainReplicaRequest(_message.Message):
    __slots__ = ("replica_id", "deadline_remaining_s")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    deadline_remaining_s: float
    def __init__(self, replica_id: _Optional[str] = ..., deadline_remaining_s: _Optional[float] = ...) -> None: ...

class DrainReplicaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
