from tandem.v1 import common_pb2 as _common_pb2
from tandem.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteRequest(_message.Message):
    __slots__ = ("request", "avoid_replica_ids")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    AVOID_REPLICA_IDS_FIELD_NUMBER: _ClassVar[int]
    request: _inference_pb2.GenerateRequest
    avoid_replica_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request: _Optional[_Union[_inference_pb2.GenerateRequest, _Mapping]] = ..., avoid_replica_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("request_id", "plan", "prompt_token_ids", "router_addresses")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    plan: _common_pb2.Plan
    prompt_token_ids: _inference_pb2.TokenIds
    router_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., plan: _Optional[_Union[_common_pb2.Plan, _Mapping]] = ..., prompt_token_ids: _Optional[_Union[_inference_pb2.TokenIds, _Mapping]] = ..., router_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class ReportOutcomeRequest(_message.Message):
    __slots__ = ("plan_id", "receipt", "error_reason")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    plan_id: str
    receipt: _common_pb2.Receipt
    error_reason: str
    def __init__(self, plan_id: _Optional[str] = ..., receipt: _Optional[_Union[_common_pb2.Receipt, _Mapping]] = ..., error_reason: _Optional[str] = ...) -> None: ...

class ReportOutcomeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("request_id", "plan", "candidates", "receipt", "state", "reason", "message", "predicted")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    plan: _common_pb2.Plan
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    receipt: _common_pb2.Receipt
    state: str
    reason: str
    message: str
    predicted: _containers.RepeatedCompositeFieldContainer[_common_pb2.PredictedTerm]
    def __init__(self, request_id: _Optional[str] = ..., plan: _Optional[_Union[_common_pb2.Plan, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., receipt: _Optional[_Union[_common_pb2.Receipt, _Mapping]] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., predicted: _Optional[_Iterable[_Union[_common_pb2.PredictedTerm, _Mapping]]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("prefill", "decode", "terms", "is_chosen")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    IS_CHOSEN_FIELD_NUMBER: _ClassVar[int]
    prefill: _common_pb2.PlannedWorker
    decode: _common_pb2.PlannedWorker
    terms: _containers.RepeatedCompositeFieldContainer[_common_pb2.PredictedTerm]
    is_chosen: bool
    def __init__(self, prefill: _Optional[_Union[_common_pb2.PlannedWorker, _Mapping]] = ..., decode: _Optional[_Union[_common_pb2.PlannedWorker, _Mapping]] = ..., terms: _Optional[_Iterable[_Union[_common_pb2.PredictedTerm, _Mapping]]] = ..., is_chosen: _Optional[bool] = ...) -> None: ...
