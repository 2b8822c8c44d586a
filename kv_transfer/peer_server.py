"""Serves this node's blocks to other nodes' stores over TCP: straight out of the arena, a thread a connection.

Copies nothing itself and trusts no caller: a block that is overwritten while it is being sent fails the receiver's check.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kv_transfer.arena_store import ArenaStore, Held
from kv_transfer.peer_wire import (
    MAX_BLOCKS_PER_FRAME,
    REQUEST_BYTES,
    Entry,
    FrameKind,
    RequestHead,
    RequestKind,
    hash_bytes,
    pack_frame,
    read_hashes,
    read_request_head,
)
from kv_transfer.published import PUBLISHED_SOCKET
from kv_transfer.store_totals import StoreTotals
from tandem.domain import BlockHash, Namespace
from tandem.errors import ConfigError, Reason, TandemError

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 512  # a thread each, and most of them wait
_IDLE_S = 300.0
_STALL_S = 10.0  # a reader that takes nothing for so long is dropped
_MAX_WAIT_S = 60.0
_SAY_WAITING_S = 0.5  # shorter than a receiver's patience
_FRAME_PAYLOAD_BYTES = 2 << 20  # half of what the sockets hold: the receiver checks one while the next is on its way
_LEASE_S = 10.0
_BUFFER_BYTES = 4 << 20
_BUFFERS_PER_CALL = 64  # of at most 1,024 that the kernel takes


def _nothing() -> None:
    return


class PeerServer:
    """Listens from its construction on; `close` ends every thread. Raises ConfigError where the port cannot be had."""

    def __init__(
        self,
        store: ArenaStore,
        totals: StoreTotals,
        folder: Path,
        host: str,
        port: int = 0,
        *,
        on_published: Callable[[], object] = _nothing,
    ) -> None:
        self._store = store
        self._totals = totals
        self._on_published = on_published  # called in a thread
        self._published = threading.Condition()
        self._is_closed = False
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        try:
            self._listener = socket.create_server((host, port), backlog=_MAX_CONNECTIONS)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} for other nodes' stores: {error.strerror}", reason=Reason.PORT_IN_USE
            ) from error
        self.port: int = self._listener.getsockname()[1]
        self._signals = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._signal_path = folder / PUBLISHED_SOCKET
        self._signal_path.unlink(missing_ok=True)
        self._signals.bind(str(self._signal_path))
        self._threads = [
            threading.Thread(target=self._accept, name="kv-peer-accept", daemon=True),
            threading.Thread(target=self._listen, name="kv-peer-published", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends what runs."""
        self._is_closed = True
        for one in (self._listener, self._signals):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.notify()
        for thread in self._threads:
            thread.join(timeout=5.0)
        self._listener.close()
        self._signals.close()
        self._signal_path.unlink(missing_ok=True)

    def notify(self) -> None:
        """Blocks became visible: those who wait look again."""
        self._on_published()
        with self._published:
            self._published.notify_all()

    def _listen(self) -> None:
        while not self._is_closed:
            try:
                self._signals.recv(64)
            except OSError:
                return
            self.notify()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._is_closed:
                    return
                time.sleep(0.05)  # no descriptors left
                continue
            with self._lock:
                is_welcome = len(self._connections) < _MAX_CONNECTIONS and not self._is_closed
                if is_welcome:
                    self._connections.add(connection)
            if is_welcome:
                threading.Thread(target=self._serve, args=(connection,), name="kv-peer", daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            while True:
                connection.settimeout(_IDLE_S)
                first = connection.recv(REQUEST_BYTES)
                if not first:
                    return
                connection.settimeout(_STALL_S)
                head = read_request_head(first + receive(connection, REQUEST_BYTES - len(first)))
                self._answer(connection, head, read_hashes(receive(connection, hash_bytes(head))))
        except TandemError as error:
            self._totals.bad_requests += 1
            logger.warning("peer_refused error=%s", error.message)
        except OSError:
            pass  # it is gone, or takes nothing
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, head: RequestHead, hashes: Sequence[BlockHash]) -> None:
        if head.kind is RequestKind.CHECK:
            self._totals.corrupt_blocks += self._check(head.namespace, hashes)
        else:
            self._send(connection, head.namespace, hashes, time.monotonic() + min(_MAX_WAIT_S, head.wait_ms / 1000))
        connection.sendall(pack_frame(FrameKind.END))

    def _check(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> int:
        """Reads blocks that came damaged; those that are so here are quarantined."""
        corrupt = 0
        for block_hash in hashes:
            payload_bytes = self._store.payload_bytes(namespace, block_hash)
            if payload_bytes is not None and payload_bytes <= self._store.arena.geometry.slab_bytes:
                corrupt += self._store.get_into(namespace, [block_hash], np.empty((1, payload_bytes), np.uint8))[0] == "corrupt"
        return corrupt

    def _send(self, connection: socket.socket, namespace: Namespace, hashes: Sequence[BlockHash], ends_s: float) -> None:
        """Sends what is held, in order; waits until `ends_s` for the first that is not."""
        place, frame_blocks = 0, MAX_BLOCKS_PER_FRAME
        said_s = time.monotonic()
        while place < len(hashes):
            batch = self._held(namespace, hashes[place : place + frame_blocks])
            if batch[0] is None and time.monotonic() < ends_s:
                with self._published:
                    if self._is_closed:
                        return
                    if self._held(namespace, hashes[place : place + 1])[0] is None:
                        self._published.wait(min(_SAY_WAITING_S, max(0.0, ends_s - time.monotonic())))
                if time.monotonic() - said_s >= _SAY_WAITING_S:
                    connection.sendall(pack_frame(FrameKind.WAITING))
                    said_s = time.monotonic()
                continue
            taken = self._frame(batch, is_waiting=time.monotonic() < ends_s)
            blocks = [(place + index, block) for index, block in enumerate(batch[:taken]) if block is not None]
            if blocks:
                entries = [Entry(at, len(block.payload), block.checksum) for at, block in blocks]
                send_all(connection, [memoryview(pack_frame(FrameKind.BLOCKS, entries)), *(block.payload for _, block in blocks)])
                said_s = time.monotonic()
                frame_blocks = min(MAX_BLOCKS_PER_FRAME, 1 + _FRAME_PAYLOAD_BYTES // len(blocks[-1][1].payload))
            self._totals.served_blocks += len(blocks)
            self._totals.served_bytes += sum(len(block.payload) for _, block in blocks)
            self._totals.missing_blocks += taken - len(blocks)
            place += taken

    def _held(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> list[Held | None]:
        """What can be sent; a block of no bytes is damage."""
        held = self._store.held(namespace, hashes, lease_s=_LEASE_S)
        return [block if block is not None and block.payload else None for block in held]

    def _frame(self, batch: Sequence[Held | None], *, is_waiting: bool) -> int:
        """How many of the batch the next frame answers: up to 2 MiB, and while something may still come not past the first gap."""
        payload_bytes = 0
        for index, block in enumerate(batch):
            payload_bytes += 0 if block is None else len(block.payload)
            if index and (payload_bytes > _FRAME_PAYLOAD_BYTES or (block is None and is_waiting)):
                return index
        return len(batch)


def receive(connection: socket.socket, size_bytes: int) -> bytes:
    """Exactly so many bytes. Raises OSError where the other side is gone or silent."""
    buffer = bytearray(size_bytes)
    receive_into(connection, memoryview(buffer))
    return bytes(buffer)


def receive_into(connection: socket.socket, *buffers: memoryview) -> None:
    """Fills the buffers, one after another. Raises OSError where the other side is gone or silent."""
    for _ in receiving(connection, buffers):
        pass


def receiving(connection: socket.socket, buffers: Sequence[memoryview]) -> Iterator[int]:
    """Fills the buffers, one after another; yields how many bytes are there. Raises OSError where the other side is gone or silent."""
    return _moving(lambda some: connection.recvmsg_into(some)[0], buffers)


def send_all(connection: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Sends all of them. Raises OSError where the other side is gone, or takes nothing for the connection's time-out."""
    for _ in _moving(connection.sendmsg, buffers):
        pass


def _moving(move: Callable[[Sequence[memoryview]], int], buffers: Sequence[memoryview]) -> Iterator[int]:
    """Calls `move` with what is left until nothing is: few calls, as each takes many buffers. Yields how many bytes are done."""
    rest, done, moved_bytes = list(buffers), 0, 0
    while True:
        while done < len(rest) and not rest[done]:
            done += 1
        yield moved_bytes
        if done == len(rest):
            return
        moved = move(rest[done : done + _BUFFERS_PER_CALL])
        if not moved:
            raise ConnectionResetError("the other store has closed the connection")
        moved_bytes += moved
        while moved:
            part = min(moved, len(rest[done]))
            rest[done] = rest[done][part:]
            moved -= part
            done += not rest[done]
