"""The two ends of a fetch between stores: a node without its process, and a peer that answers what a test tells it to."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from kv_transfer.arena_store import ArenaStore
from kv_transfer.peer_fetch import PeerConnections, PeerFetch
from kv_transfer.peer_server import PeerServer, receive
from kv_transfer.peer_wire import REQUEST_BYTES, Entry, FrameKind, RequestKind, hash_bytes, pack_frame, read_hashes, read_request_head
from kv_transfer.store import BlockOutcome, PutOutcome
from kv_transfer.store_totals import StoreTotals
from tandem.domain import BlockHash
from tests.arena_blocks import ArenaBlocks
from tests.dict_store import NAMESPACE, block_hash, key
from tests.store_benches import as_rows

SIZE_BYTES = 4096
CAPACITY_BYTES = 4 << 20  # slabs of 128 KiB
SLAB_BYTES = 128 << 10
WAIT_S = 10.0

Address = tuple[str, int]
Answer = Callable[[socket.socket, list[BlockHash]], None]


def payload_of(number: int, size_bytes: int = SIZE_BYTES) -> bytes:
    """The bytes of block `number`; no two blocks have the same."""
    return (block_hash(number + 1) * (size_bytes // 32 + 1))[:size_bytes]


def entry(place: int, payload: bytes) -> Entry:
    """How a block is announced."""
    return Entry(place, len(payload), xxhash.xxh3_64_intdigest(payload))


def blocks_frame(*payloads: bytes, first_place: int = 0) -> bytes:
    """Whole blocks, one after another."""
    return pack_frame(FrameKind.BLOCKS, [entry(first_place + at, payload) for at, payload in enumerate(payloads)]) + b"".join(payloads)


END = pack_frame(FrameKind.END)


class Side:
    """A node's arena and what a service has beside it, by the numbers of blocks. `close` it."""

    def __init__(self, folder: Path, *, store: ArenaStore | None = None, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self.folder = folder
        self.store = store or ArenaStore(folder, capacity_bytes=capacity_bytes)
        self.blocks = ArenaBlocks(folder)
        self.totals = StoreTotals()
        self.connections = PeerConnections()

    def put(self, *numbers: int, size_bytes: int = SIZE_BYTES) -> None:
        rows = as_rows(*(payload_of(number, size_bytes) for number in numbers))
        outcomes = self.store.put(NAMESPACE, [block_hash(number) for number in numbers], rows)
        assert set(outcomes) == {PutOutcome.STORED}

    def damage(self, number: int) -> None:
        self.blocks.flip(key(number), 100)

    def held(self, numbers: Sequence[int], *, size_bytes: int = SIZE_BYTES) -> list[int]:
        """Those that are here, each whole and its own."""
        rows = np.zeros((1, size_bytes), np.uint8)
        found = []
        for number in numbers:
            outcome = self.store.get_into(NAMESPACE, [block_hash(number)], rows)[0]
            assert outcome is not BlockOutcome.CORRUPT
            if outcome is BlockOutcome.HIT:
                assert rows.tobytes() == payload_of(number, size_bytes)
                found.append(number)
        return found

    def count(self, numbers: Sequence[int]) -> int:
        """How many of them are here, unchecked."""
        return sum(self.store.contains(NAMESPACE, [block_hash(number) for number in numbers]))

    def fetch_from(self, address: Address) -> PeerFetch:
        return PeerFetch(self.store, self.connections, self.totals, address)

    def fetch(self, address: Address, numbers: Sequence[int], *, timeout_s: float = WAIT_S, wait_s: float = 0.0) -> int:
        """Fetches blocks; how many were stored."""
        hashes = [block_hash(number) for number in numbers]
        return self.fetch_from(address).run(NAMESPACE, hashes, timeout_s=timeout_s, wait_s=wait_s)

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[Address]:
        """Its blocks are served."""
        with contextlib.closing(PeerServer(self.store, self.totals, self.folder, "127.0.0.1", port)) as server:
            yield "127.0.0.1", server.port
        soon(lambda: not server_threads())

    def close(self) -> None:
        """No slot is left behind, and no connection."""
        self.connections.close()
        self.store.close()
        assert self.blocks.granted() == []
        self.blocks.close()


class OddPeer:
    """Answers each fetch by `answer`, then waits for the next one on that connection; a check gets an END.

    `asked` are the names by request; `checked` those that a receiver says came damaged; `closed` counts connections that have ended.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[list[BlockHash]] = []
        self.checked: list[BlockHash] = []
        self.closed = 0
        self.check_answer = END
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(WAIT_S)
            while True:
                head = read_request_head(receive(connection, REQUEST_BYTES))
                hashes = read_hashes(receive(connection, hash_bytes(head)))
                if head.kind is RequestKind.CHECK:
                    self.checked += hashes
                    connection.sendall(self.check_answer)
                else:
                    self.asked.append(hashes)
                    self.answer(connection, hashes)
        self.closed += 1

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@contextmanager
def odd_peer(answer: Answer) -> Iterator[OddPeer]:
    """A peer for as long as the context lasts; connections to it are to be closed before."""
    peer = OddPeer(answer)
    try:
        yield peer
    finally:
        peer.close()


def saying(*parts: bytes) -> Answer:
    """Sends this, whatever it was asked."""

    def answer(connection: socket.socket, hashes: list[BlockHash]) -> None:
        connection.sendall(b"".join(parts))

    return answer


def silent(connection: socket.socket, hashes: list[BlockHash]) -> None:
    """Says nothing until the other side has gone."""
    connection.recv(1)
    raise OSError


def server_threads() -> list[threading.Thread]:
    """Threads of connections that are being served in this process."""
    return [thread for thread in threading.enumerate() if thread.name == "kv-peer"]


def soon(condition: Callable[[], bool]) -> None:
    """Waits until it is so."""
    ends_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends_s, "it did not come to be so"
        time.sleep(0.002)
