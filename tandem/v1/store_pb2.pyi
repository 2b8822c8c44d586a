from tandem.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StoreStatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreStatResponse(_message.Message):
    __slots__ = ("node", "tiers", "granted_slots", "leased_blocks", "leaked_slots", "is_native", "peer_port")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    GRANTED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEAKED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    IS_NATIVE_FIELD_NUMBER: _ClassVar[int]
    PEER_PORT_FIELD_NUMBER: _ClassVar[int]
    node: str
    tiers: _containers.RepeatedCompositeFieldContainer[TierStat]
    granted_slots: int
    leased_blocks: int
    leaked_slots: int
    is_native: bool
    peer_port: int
    def __init__(self, node: _Optional[str] = ..., tiers: _Optional[_Iterable[_Union[TierStat, _Mapping]]] = ..., granted_slots: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., leaked_slots: _Optional[int] = ..., is_native: _Optional[bool] = ..., peer_port: _Optional[int] = ...) -> None: ...

class TierStat(_message.Message):
    __slots__ = ("tier", "capacity_bytes", "used_bytes", "blocks", "hits_total", "misses_total", "corrupt_total", "evicted_total", "promoted_total", "demoted_total", "error")
    TIER_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HITS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MISSES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EVICTED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DEMOTED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    tier: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    hits_total: int
    misses_total: int
    corrupt_total: int
    evicted_total: int
    promoted_total: int
    demoted_total: int
    error: str
    def __init__(self, tier: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., hits_total: _Optional[int] = ..., misses_total: _Optional[int] = ..., corrupt_total: _Optional[int] = ..., evicted_total: _Optional[int] = ..., promoted_total: _Optional[int] = ..., demoted_total: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("namespace", "block_hashes")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("is_held",)
    IS_HELD_FIELD_NUMBER: _ClassVar[int]
    is_held: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, is_held: _Optional[_Iterable[bool]] = ...) -> None: ...

class CopyRequest(_message.Message):
    __slots__ = ("namespace", "block_hashes", "from_address", "wait_ms")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    FROM_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    from_address: str
    wait_ms: int
    def __init__(self, namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ..., from_address: _Optional[str] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class CopyResponse(_message.Message):
    __slots__ = ("copied_blocks", "held_blocks")
    COPIED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    copied_blocks: int
    held_blocks: int
    def __init__(self, copied_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("namespace", "block_hashes")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("held_blocks",)
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    held_blocks: int
    def __init__(self, held_blocks: _Optional[int] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("namespace", "block_hashes")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, namespace: _Optional[str] = ..., block_hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("evicted_blocks",)
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    evicted_blocks: int
    def __init__(self, evicted_blocks: _Optional[int] = ...) -> None: ...

class StoreWatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreWatchResponse(_message.Message):
    __slots__ = ("node", "namespaces")
    NODE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    node: str
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceEvents]
    def __init__(self, node: _Optional[str] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceEvents, _Mapping]]] = ...) -> None: ...

class NamespaceEvents(_message.Message):
    __slots__ = ("namespace", "block_events")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_EVENTS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    block_events: _containers.RepeatedCompositeFieldContainer[_worker_pb2.BlockEvent]
    def __init__(self, namespace: _Optional[str] = ..., block_events: _Optional[_Iterable[_Union[_worker_pb2.BlockEvent, _Mapping]]] = ...) -> None: ...
