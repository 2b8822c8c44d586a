"""The overflow tier: blocks in a Redis of its own, which evicts by itself. Not the control database.

Each block is one value, header and payload. A server that is down, slow, full, misbehaving or not set up for this is one log line and a
pause during which it is not asked, never an exception.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
from redis import BlockingConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

from kv_transfer.blocks import BlockKey
from kv_transfer.codec import HEADER_BYTES, is_intact, pack_header
from kv_transfer.outage import Outage
from kv_transfer.store import BlockOutcome, Bytes, PutOutcome, StoreStats
from tandem.domain import BlockHash, Namespace
from tandem.errors import ConfigError
from tandem.redis_link import EXPECTED_URL
from tandem.redis_server import redis_arguments

_CALL_BYTES = 8 << 20  # in one exchange: it keeps the server from others for some 5 ms
_CALL_KEYS = 1_000
_MIN_BLOCKS = 8  # that the server must have memory for: a larger block would push out nearly all others
_CONNECTIONS = 8
_SAMPLES = 16  # of blocks whose size in memory is asked for
_URL_OPTIONS = frozenset({"db", "username", "password"})  # others would undo the limits that are set here
# What redis-py raises where a server sends what is not its protocol.
_FAILURES = (RedisError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)

_QUOTE = re.compile("['`\"]")
_ERROR_CHARS = 200

Command = tuple[bytes | str | int, ...]
_T = TypeVar("_T")


def kv_redis_arguments(socket_path: Path, folder: Path, maxmemory_bytes: int) -> list[str]:
    """Arguments of a server for KV blocks: on a Unix socket of this user alone, nothing kept on disk, least recently used blocks go.

    Raises ConfigError where the kernel takes no socket of that path.
    """
    settings = {
        "maxmemory": str(maxmemory_bytes),
        "maxmemory-policy": "allkeys-lru",
        "lazyfree-lazy-eviction": "yes",  # large values are freed beside
        "hz": "10",
    }
    # The last word on a setting counts.
    return [*redis_arguments(socket_path, folder), *(part for name, value in settings.items() for part in (f"--{name}", value))]


class KvRedisStore:
    """`BlockStore` in the Redis at `url`, for any number of processes and threads.

    An exchange is of 8 MiB at most and fails where the server is silent for `timeout_s`; nothing is tried twice. After a failure the
    server is left alone for `pause_s`, longer each time. The server evicts: leases and `make_room` do nothing. Blocks over 8 MiB, or an
    eighth of its memory, are not stored. Raises ConfigError where `url` is none, or has options other than of access.
    """

    def __init__(self, url: str, *, cluster: str, timeout_s: float, pause_s: float = 2.0) -> None:
        self._prefix = f"{cluster}:kv:".encode()
        self._max_block_bytes: int | None = None  # until the server was asked
        name = _name_of(url)
        self._link = Outage(f"redis {name}", pause_s=pause_s)
        self._writes = Outage(f"redis {name}, writing", pause_s=pause_s)
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                socket_read_size=1 << 20,
                retry=Retry(NoBackoff(), 0),
                protocol=2,  # one exchange less at the start
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{name} is no Redis for KV blocks ({error}); expected {EXPECTED_URL}") from error
        self._redis = Redis(connection_pool=pool)

    @property
    def error(self) -> str:
        """What is wrong with the server; empty while all is well."""
        return self._link.error or self._writes.error

    def _ask(self, commands: Sequence[Command]) -> list[object] | None:
        """The replies to one exchange, refusals among them as errors; None where there was none, which begins an outage."""
        pipeline = self._redis.pipeline(transaction=False)
        try:
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            replies: list[object] = pipeline.execute(raise_on_error=False)
            refused = next((one for one in replies if isinstance(one, Exception) and not isinstance(one, OutOfMemoryError)), None)
            if refused is None and len(replies) == len(commands):
                self._link.end()
                return replies
            what: object = refused or "it answered something else"
        except _FAILURES as error:
            what = error
        # Some servers quote what they were sent: no keys in the log.
        self._link.begin(f"{type(what).__name__}: {_QUOTE.split(str(what))[0][:_ERROR_CHARS]}")
        self._max_block_bytes = None
        # Also those of other threads: what comes in on them now may be anything.
        self._redis.connection_pool.disconnect()
        return None

    def _key(self, namespace: Namespace, block_hash: BlockHash) -> bytes:
        return self._prefix + bytes.fromhex(namespace) + block_hash

    def _are_held(self, keys: Sequence[bytes]) -> list[bool] | None:
        """Which keys have a value; None where the server does not say."""
        held: list[bool] = []
        for some in _chunks(keys, _CALL_KEYS):
            replies = self._ask([("EXISTS", key) for key in some])
            if replies is None:
                return None
            held += [reply == 1 for reply in replies]
        return held

    def contains(self, namespace: Namespace, hashes: Sequence[BlockHash], *, lease_s: float = 0.0) -> list[bool]:
        """Which blocks are held; none where the server does not say. Nothing is leased: the server evicts what it will."""
        none = [False] * len(hashes)
        if not hashes or not self._link.allows():
            return none
        return self._are_held([self._key(namespace, one) for one in hashes]) or none

    def put(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes, *, first_position: int = 0) -> list[PutOutcome]:
        """Sends the blocks that are not there; NO_ROOM where the server does not take them. May evict."""
        outcomes = [PutOutcome.NO_ROOM] * len(hashes)
        if not hashes or not self._link.allows() or not self._writes.allows():
            return outcomes
        first: dict[BlockHash, int] = {}
        for position, one in enumerate(hashes):
            first.setdefault(one, position)
        keys = [self._key(namespace, one) for one in first]
        held = self._are_held(keys)
        if held is None:
            return outcomes
        for position, is_held in zip(first.values(), held, strict=True):
            if is_held:
                outcomes[position] = PutOutcome.EXISTS
        record_bytes = HEADER_BYTES + rows.shape[1]
        if record_bytes <= self._block_limit_bytes():
            missing = [position for position, is_held in zip(first.values(), held, strict=True) if not is_held]
            for some in _chunks(missing, max(1, _CALL_BYTES // record_bytes)):
                blocks = [(BlockKey(namespace, hashes[position]), np.ascontiguousarray(rows[position]).data) for position in some]
                replies = self._ask(
                    [("SET", self._key(namespace, key.block_hash), b"".join((pack_header(key, row), row)), "NX") for key, row in blocks]
                )
                if replies is None:
                    break
                for position, reply in zip(some, replies, strict=True):
                    outcomes[position] = _put_outcome(reply)
                if any(isinstance(reply, OutOfMemoryError) for reply in replies):
                    self._writes.begin("the server has no memory left, and nothing to evict")
                    break
                self._writes.end()
        for position, one in enumerate(hashes):
            if first[one] != position and outcomes[first[one]] is not PutOutcome.NO_ROOM:
                outcomes[position] = PutOutcome.EXISTS
        return outcomes

    def _block_limit_bytes(self) -> int:
        """The largest block to store; 0 where the server is not one that evicts, which begins an outage of writing."""
        if self._max_block_bytes is None:
            replies = self._ask([("INFO", "memory")])
            if replies is None:
                return 0
            maxmemory_bytes = _number(replies[0], "maxmemory")
            policy = replies[0].get("maxmemory_policy", "") if isinstance(replies[0], dict) else ""
            if not maxmemory_bytes or not str(policy).startswith("allkeys-"):
                self._writes.begin(f"it must have a maxmemory and an allkeys policy, and has {maxmemory_bytes} bytes and {policy!r}")
                return 0
            self._max_block_bytes = min(_CALL_BYTES, maxmemory_bytes // _MIN_BLOCKS)
        return self._max_block_bytes

    def get_into(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes) -> list[BlockOutcome]:
        """Receives block i, verifies it and copies it into row i (n, payload_bytes); a corrupt one is deleted."""
        outcomes = [BlockOutcome.MISSING] * len(hashes)
        if not hashes or not self._link.allows():
            return outcomes
        corrupt: list[bytes] = []
        for some in _chunks(range(len(hashes)), min(_CALL_KEYS, max(1, _CALL_BYTES // (HEADER_BYTES + rows.shape[1])))):
            replies = self._ask([("MGET", *(self._key(namespace, hashes[position]) for position in some))])
            if replies is None:
                return outcomes
            values = replies[0] if isinstance(replies[0], list) else []
            for position, value in zip(some, values, strict=False):
                if value is None:
                    continue
                outcomes[position] = _unpack(BlockKey(namespace, hashes[position]), value, rows[position])
                if outcomes[position] is BlockOutcome.CORRUPT:
                    corrupt.append(self._key(namespace, hashes[position]))
        if corrupt:
            self._ask([("UNLINK", *corrupt)])
        return outcomes

    def payload_bytes(self, namespace: Namespace, block_hash: BlockHash) -> int | None:
        """Size of a held block; None where it is not held or the server does not say. A hint."""
        if not self._link.allows():
            return None
        replies = self._ask([("STRLEN", self._key(namespace, block_hash))])
        size_bytes = replies[0] if replies is not None else 0
        return max(0, size_bytes - HEADER_BYTES) if isinstance(size_bytes, int) and size_bytes else None

    def drop(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> int:
        """Deletes blocks; how many there were, as far as the server says."""
        if not hashes or not self._link.allows():
            return 0
        dropped = 0
        for some in _chunks(hashes, _CALL_KEYS):
            replies = self._ask([("UNLINK", *(self._key(namespace, one) for one in some))])
            if replies is None:
                break
            dropped += replies[0] if isinstance(replies[0], int) else 0
        return dropped

    def make_room(self) -> int:
        """Nothing: the server evicts."""
        return 0

    def stats(self) -> StoreStats:
        """What all clusters have there: memory by the size of some blocks, so about. Zeros where the server does not say."""
        none = StoreStats(used_bytes=0, capacity_bytes=0, blocks=0)
        if not self._link.allows():
            return none
        replies = self._ask([("DBSIZE",), ("INFO", "memory"), *[("RANDOMKEY",)] * _SAMPLES])
        if replies is None:
            return none
        blocks = replies[0] if isinstance(replies[0], int) else 0
        sampled = self._ask([("MEMORY USAGE", key) for key in replies[2:] if isinstance(key, bytes)]) or []
        sizes = [size_bytes for size_bytes in sampled if isinstance(size_bytes, int)]
        used_bytes = blocks * sum(sizes) // len(sizes) if sizes else 0
        return StoreStats(used_bytes=used_bytes, capacity_bytes=_number(replies[1], "maxmemory"), blocks=blocks)

    def close(self) -> None:
        """Closes the connections; blocks stay."""
        self._redis.connection_pool.disconnect()


def _unpack(wanted: BlockKey, value: object, row: Bytes) -> BlockOutcome:
    if not isinstance(value, bytes):
        return BlockOutcome.MISSING
    payload = memoryview(value)[HEADER_BYTES:]
    if not is_intact(wanted, value[:HEADER_BYTES], payload):
        return BlockOutcome.CORRUPT
    if len(payload) != len(row):
        return BlockOutcome.MISSING
    row[:] = np.frombuffer(payload, np.uint8)
    return BlockOutcome.HIT


def _put_outcome(reply: object) -> PutOutcome:
    if reply is True:
        return PutOutcome.STORED
    return PutOutcome.EXISTS if reply is None else PutOutcome.NO_ROOM


def _number(info: object, name: str) -> int:
    value = info.get(name) if isinstance(info, dict) else None
    return value if isinstance(value, int) else 0


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _name_of(url: str) -> str:
    """The URL without user, password and options, for messages. Raises ConfigError where it sets what is set here."""
    try:
        parts = urlsplit(url)
        options = set(parse_qs(parts.query, keep_blank_values=True)) - _URL_OPTIONS
        host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname or ""
        name = f"{parts.scheme}://{host}{f':{parts.port}' if parts.port is not None else ''}{parts.path}"
    except ValueError as error:  # its text may hold the password
        raise ConfigError(f"the URL of the Redis for KV blocks is none; expected {EXPECTED_URL}") from error
    if unknown := sorted(one for one in options if not one.startswith("ssl_")):
        raise ConfigError(f"{name} has options that are not taken here ({', '.join(unknown)}); expected {EXPECTED_URL}")
    return name
