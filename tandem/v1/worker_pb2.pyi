from tandem.v1 import common_pb2 as _common_pb2
from tandem.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerGenerateRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "model", "prompt_token_ids", "resume_token_ids", "sampling", "plan", "priority", "cache_salt", "incarnation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    model: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    resume_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.Sampling
    plan: _common_pb2.Plan
    priority: int
    cache_salt: str
    incarnation: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., resume_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., plan: _Optional[_Union[_common_pb2.Plan, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "model", "prompt_token_ids", "resumed_tokens", "sampling", "priority", "cache_salt", "incarnation", "router_id", "slack_s", "replica_id", "namespace", "prefill_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    SLACK_S_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    model: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    resumed_tokens: int
    sampling: _common_pb2.Sampling
    priority: int
    cache_salt: str
    incarnation: int
    router_id: str
    slack_s: float
    replica_id: str
    namespace: str
    prefill_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., resumed_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., incarnation: _Optional[int] = ..., router_id: _Optional[str] = ..., slack_s: _Optional[float] = ..., replica_id: _Optional[str] = ..., namespace: _Optional[str] = ..., prefill_tokens: _Optional[int] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("first_token", "published")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    first_token: FirstToken
    published: Published
    def __init__(self, first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., published: _Optional[_Union[Published, _Mapping]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token_id", "logprobs", "finish_reason", "stop_reason", "cached_tokens", "prefill_s")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprobs: _common_pb2.Logprobs
    finish_reason: _common_pb2.FinishReason
    stop_reason: str
    cached_tokens: int
    prefill_s: float
    def __init__(self, token_id: _Optional[int] = ..., logprobs: _Optional[_Union[_common_pb2.Logprobs, _Mapping]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., stop_reason: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class Published(_message.Message):
    __slots__ = ("published_blocks", "published_bytes")
    PUBLISHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    published_blocks: int
    published_bytes: int
    def __init__(self, published_blocks: _Optional[int] = ..., published_bytes: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("incarnation", "sequence", "lease", "load", "stamps", "block_events", "progress", "steps")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STAMPS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_EVENTS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    sequence: int
    lease: _common_pb2.Lease
    load: WorkerLoad
    stamps: _containers.RepeatedCompositeFieldContainer[RequestStamp]
    block_events: _containers.RepeatedCompositeFieldContainer[BlockEvent]
    progress: _containers.RepeatedCompositeFieldContainer[RequestProgress]
    steps: _containers.RepeatedCompositeFieldContainer[StepSample]
    def __init__(self, incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., stamps: _Optional[_Iterable[_Union[RequestStamp, _Mapping]]] = ..., block_events: _Optional[_Iterable[_Union[BlockEvent, _Mapping]]] = ..., progress: _Optional[_Iterable[_Union[RequestProgress, _Mapping]]] = ..., steps: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("prefill_tokens", "prefill_pairs", "decode_requests", "kv_tokens", "duration_s")
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PAIRS_FIELD_NUMBER: _ClassVar[int]
    DECODE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    prefill_tokens: int
    prefill_pairs: int
    decode_requests: int
    kv_tokens: int
    duration_s: float
    def __init__(self, prefill_tokens: _Optional[int] = ..., prefill_pairs: _Optional[int] = ..., decode_requests: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., duration_s: _Optional[float] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("running_requests", "waiting_requests", "pending_prefill_tokens", "kv_used_fraction", "kv_tokens", "generated_tokens_total", "corrupt_blocks_total", "missing_blocks_total", "loaded_bytes_total", "published_bytes_total")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PENDING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USED_FRACTION_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MISSING_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    waiting_requests: int
    pending_prefill_tokens: int
    kv_used_fraction: float
    kv_tokens: int
    generated_tokens_total: int
    corrupt_blocks_total: int
    missing_blocks_total: int
    loaded_bytes_total: int
    published_bytes_total: int
    def __init__(self, running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., pending_prefill_tokens: _Optional[int] = ..., kv_used_fraction: _Optional[float] = ..., kv_tokens: _Optional[int] = ..., generated_tokens_total: _Optional[int] = ..., corrupt_blocks_total: _Optional[int] = ..., missing_blocks_total: _Optional[int] = ..., loaded_bytes_total: _Optional[int] = ..., published_bytes_total: _Optional[int] = ...) -> None: ...

class RequestStamp(_message.Message):
    __slots__ = ("request_id", "attempt", "kind")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[RequestStamp.Kind]
        KIND_ACCEPTED: _ClassVar[RequestStamp.Kind]
        KIND_FINISHED: _ClassVar[RequestStamp.Kind]
    KIND_UNSPECIFIED: RequestStamp.Kind
    KIND_ACCEPTED: RequestStamp.Kind
    KIND_FINISHED: RequestStamp.Kind
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    kind: RequestStamp.Kind
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., kind: _Optional[_Union[RequestStamp.Kind, str]] = ...) -> None: ...

class RequestProgress(_message.Message):
    __slots__ = ("request_id", "attempt", "position")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    position: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class BlockEvent(_message.Message):
    __slots__ = ("kind", "short_hashes")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[BlockEvent.Kind]
        KIND_STORED: _ClassVar[BlockEvent.Kind]
        KIND_REMOVED: _ClassVar[BlockEvent.Kind]
        KIND_CLEARED: _ClassVar[BlockEvent.Kind]
    KIND_UNSPECIFIED: BlockEvent.Kind
    KIND_STORED: BlockEvent.Kind
    KIND_REMOVED: BlockEvent.Kind
    KIND_CLEARED: BlockEvent.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    SHORT_HASHES_FIELD_NUMBER: _ClassVar[int]
    kind: BlockEvent.Kind
    short_hashes: bytes
    def __init__(self, kind: _Optional[_Union[BlockEvent.Kind, str]] = ..., short_hashes: _Optional[bytes] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("deadline_remaining_s",)
    DEADLINE_REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    deadline_remaining_s: float
    def __init__(self, deadline_remaining_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("running_requests",)
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    def __init__(self, running_requests: _Optional[int] = ...) -> None: ...
