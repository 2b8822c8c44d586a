"""Fetches blocks from another node's store over TCP, from the socket straight into granted slots, and checks each there.

Blocking; run it in a thread, and `abort` it from another. Whatever goes wrong leaves whole blocks only.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby

import xxhash

from kv_transfer.arena_store import ArenaStore
from kv_transfer.peer_server import receive, receive_into, receiving
from kv_transfer.peer_wire import FRAME_BYTES, Entry, FrameKind, RequestKind, pack_request, read_frame, rest_bytes
from kv_transfer.store import PutOutcome
from kv_transfer.store_totals import StoreTotals
from tandem.domain import BlockHash, Namespace
from tandem.errors import ProtocolError, Reason, UnavailableError

_SILENCE_S = 2.0  # a peer that is stopped says nothing; a busy one sends its next bytes within milliseconds
_CONNECT_S = 2.0
_MAX_IDLE = 4  # connections kept for one address: a new one begins slowly
_BUFFER_BYTES = 4 << 20
_DRAIN_BYTES = 1 << 20


class PeerConnections:
    """Connections that are not in use, by address (host, port)."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, int], list[socket.socket]] = {}
        self._lock = threading.Lock()

    def take(self, address: tuple[str, int], *, is_fresh: bool = False) -> tuple[socket.socket, bool]:
        """A connection, a new one where `is_fresh`, and whether it was used before. Raises OSError."""
        with self._lock:
            idle = None if is_fresh else self._idle.get(address)
            if idle:
                return idle.pop(), True
        connection = socket.create_connection(address, timeout=_CONNECT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        return connection, False

    def give_back(self, address: tuple[str, int], connection: socket.socket) -> None:
        """Keeps one whose last answer was read to its end."""
        with self._lock:
            idle = self._idle.setdefault(address, [])
            if len(idle) < _MAX_IDLE:
                idle.append(connection)
                return
        connection.close()

    def forget(self, address: tuple[str, int]) -> None:
        """Closes the idle ones of that address: who answered there is gone, or not to be trusted."""
        with self._lock:
            for connection in self._idle.pop(address, ()):
                connection.close()

    def close(self) -> None:
        """Closes those that are idle."""
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()


class PeerFetch:
    """One fetch. `run` it once, in a thread; `abort` ends it from outside."""

    def __init__(self, store: ArenaStore, connections: PeerConnections, totals: StoreTotals, address: tuple[str, int]) -> None:
        self._store = store
        self._connections = connections
        self._totals = totals
        self._address = address
        self._connection: socket.socket | None = None
        self._is_aborted = False
        self._first_position = 0
        self._scratch = memoryview(b"")
        self.stored_blocks = 0

    def abort(self) -> None:
        """Has `run` end at once, with an error."""
        self._is_aborted = True
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def run(
        self, namespace: Namespace, hashes: Sequence[BlockHash], *, timeout_s: float, wait_s: float = 0.0, first_position: int = 0
    ) -> int:
        """Fetches what the other store holds of these blocks, or gets within `wait_s`; how many were stored here.

        `first_position` is the first one's place in its prompt.
        Raises UnavailableError where it is gone or silent, ProtocolError where it says what no store says; what came stays.
        """
        ends_s = time.monotonic() + timeout_s
        self._first_position = first_position
        for is_last in (False, True):
            try:
                connection, was_used = self._connections.take(self._address, is_fresh=is_last)
            except OSError as error:
                raise UnavailableError(f"no store answers at {self._name}: {error}", reason=Reason.WORKER_LOST) from error
            self._connection = connection
            try:
                self._check_aborted()
                damaged = self._fetch(connection, namespace, hashes, ends_s, wait_s)
                if damaged:
                    self._report(connection, namespace, damaged)
            except BaseException as error:
                connection.close()
                if isinstance(error, OSError):
                    if was_used and isinstance(error, ConnectionError) and not self.stored_blocks and not self._is_aborted:
                        continue  # the other store had begun again since
                    raise UnavailableError(f"the store at {self._name} is gone or silent: {error}", reason=Reason.WORKER_LOST) from error
                if isinstance(error, ProtocolError):
                    self._totals.bad_answers += 1
                raise
            else:
                self._connections.give_back(self._address, connection)
                break
            finally:
                self._connection = None
        return self.stored_blocks

    @property
    def _name(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def _check_aborted(self) -> None:
        if self._is_aborted:
            raise OSError("aborted")

    def _fetch(
        self, connection: socket.socket, namespace: Namespace, hashes: Sequence[BlockHash], ends_s: float, wait_s: float
    ) -> list[BlockHash]:
        """Reads the answer to its end; the blocks that came damaged."""
        connection.settimeout(_SILENCE_S)
        connection.sendall(pack_request(RequestKind.FETCH, namespace, hashes, wait_s))
        damaged: list[BlockHash] = []
        place = 0
        while True:
            if time.monotonic() > ends_s:
                raise OSError("out of time")
            head = receive(connection, FRAME_BYTES)
            rest = receive(connection, rest_bytes(head))
            largest_bytes = self._store.arena.geometry.slab_bytes
            kind, entries = read_frame(head, rest, first_place=place, blocks=len(hashes), max_payload_bytes=largest_bytes)
            if kind is FrameKind.END:
                return damaged
            for payload_bytes, group in groupby(entries, key=lambda entry: entry.payload_bytes):
                damaged += self._take(connection, namespace, hashes, list(group), payload_bytes)
            place = entries[-1].place + 1 if entries else place

    def _take(
        self, connection: socket.socket, namespace: Namespace, hashes: Sequence[BlockHash], entries: list[Entry], payload_bytes: int
    ) -> list[BlockHash]:
        """Payloads of one size into slots, as far as there are some; makes those visible that pass their check."""
        position = self._first_position + entries[0].place
        wanted = [hashes[entry.place] for entry in entries]
        staged, views = self._store.open_slots(namespace, wanted, payload_bytes, first_position=position)
        good: list[int] = []
        try:
            for index, found in _sums(receiving(connection, views), views, payload_bytes):
                staged.sums[index] = found
                if found == entries[index].checksum:
                    good.append(index)
            self._drain(connection, (len(entries) - len(views)) * payload_bytes)
        finally:
            outcomes = self._store.commit_some(staged, good)
        stored = outcomes.count(PutOutcome.STORED)
        self.stored_blocks += stored
        self._totals.fetched_blocks += stored
        self._totals.fetched_bytes += stored * payload_bytes
        self._totals.corrupt_blocks += len(views) - len(good)
        self._totals.unstored_blocks += len(entries) - len(views) + outcomes.count(PutOutcome.NO_ROOM)
        return [hashes[entries[index].place] for index in set(range(len(views))) - set(good)]

    def _drain(self, connection: socket.socket, size_bytes: int) -> None:
        """Reads past blocks that found no room."""
        if size_bytes and not self._scratch:
            self._scratch = memoryview(bytearray(_DRAIN_BYTES))
        while size_bytes > 0:
            part = self._scratch[: min(size_bytes, _DRAIN_BYTES)]
            receive_into(connection, part)
            size_bytes -= len(part)

    def _report(self, connection: socket.socket, namespace: Namespace, damaged: list[BlockHash]) -> None:
        """Has the other store look at what came damaged: what is damaged there goes no further."""
        connection.sendall(pack_request(RequestKind.CHECK, namespace, damaged))
        head = receive(connection, FRAME_BYTES)
        read_frame(head, receive(connection, rest_bytes(head)), first_place=0, blocks=0, max_payload_bytes=0)


def _sums(received: Iterator[int], views: Sequence[memoryview], payload_bytes: int) -> Iterator[tuple[int, int]]:
    """The checksum of each block that is there, by `received` (bytes by now); summed while the processor still has them."""
    digest, summed = xxhash.xxh3_64(), 0
    for there in received:
        while summed < there:
            index, begin = divmod(summed, payload_bytes)
            end = min(payload_bytes, begin + there - summed)
            digest.update(views[index][begin:end])
            summed += end - begin
            if end == payload_bytes:
                yield index, digest.intdigest()
                digest.reset()
