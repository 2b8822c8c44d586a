"""Fetches from peers that send garbage, lie, stall or go: what is stored is whole, what is not is counted, nothing is waited for long."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kv_transfer import peer_fetch
from kv_transfer.peer_wire import Entry, FrameKind, pack_frame
from kv_transfer.store_totals import StoreTotals
from tandem.domain import BlockHash
from tandem.errors import ProtocolError, UnavailableError
from tests.dict_store import NAMESPACE, block_hash
from tests.peer_sides import END, SIZE_BYTES, SLAB_BYTES, Side, blocks_frame, entry, odd_peer, payload_of, saying, silent, soon

pytestmark = pytest.mark.integration

WAITING = pack_frame(FrameKind.WAITING)
HEAD_BYTES = 48  # of a frame with two blocks
A, B, C = (payload_of(number) for number in range(3))


@pytest.fixture
def near(tmp_path: Path) -> Iterator[Side]:
    side = Side(tmp_path / "near")
    yield side
    side.close()


class TestBadAnswers:
    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            bytes(64),
            END[:-1] + b"!",
            pack_frame(FrameKind.BLOCKS),
            pack_frame(FrameKind.END, [entry(0, A)]),
            pack_frame(FrameKind.BLOCKS, [Entry(0, 0, 0)]),
            pack_frame(FrameKind.BLOCKS, [Entry(0, SLAB_BYTES + 1, 0)]),
            pack_frame(FrameKind.BLOCKS, [Entry(0, 2**32 - 1, 0)]),
            pack_frame(FrameKind.BLOCKS, [Entry(3, 100, 0)]),
            pack_frame(FrameKind.BLOCKS, [Entry(2**32 - 1, 100, 0)]),
            pack_frame(FrameKind.BLOCKS, [entry(1, A), entry(0, A)]),
            struct.pack("<4sHH", b"TKV1", FrameKind.BLOCKS, 257),
        ],
        ids=[
            *("another protocol", "zeros", "a damaged frame", "blocks that are none", "blocks at the end", "an empty block"),
            *("a block larger than a slab", "a block of 4 GiB", "one block too many", "one far out", "backwards", "too many at once"),
        ],
    )
    def test_what_no_store_says_ends_the_fetch_and_the_connection(self, near: Side, answer: bytes) -> None:
        with odd_peer(saying(answer)) as peer:
            with pytest.raises(ProtocolError):
                near.fetch(peer.address, [0, 1, 2])
            soon(lambda: peer.closed == 1)
        assert near.totals == StoreTotals(bad_answers=1)
        assert near.count([0, 1, 2]) == 0

    def test_what_came_whole_before_garbage_stays(self, near: Side) -> None:
        with odd_peer(saying(blocks_frame(A, B), b"garbage!" * 8)) as peer, pytest.raises(ProtocolError):
            near.fetch(peer.address, [0, 1, 2])
        assert near.held([0, 1, 2]) == [0, 1]
        assert (near.totals.fetched_blocks, near.totals.fetched_bytes, near.totals.bad_answers) == (2, 2 * SIZE_BYTES, 1)

    def test_a_block_that_comes_twice_ends_the_fetch(self, near: Side) -> None:
        with odd_peer(saying(blocks_frame(A), blocks_frame(A))) as peer, pytest.raises(ProtocolError, match="not asked for"):
            near.fetch(peer.address, [0, 1])
        assert near.held([0, 1]) == [0]

    def test_more_bytes_than_were_announced_are_taken_for_no_block(self, near: Side) -> None:
        with odd_peer(saying(blocks_frame(A), b"\0" * 100, END)) as peer, pytest.raises(ProtocolError):
            near.fetch(peer.address, [0, 1])
        assert near.held([0, 1]) == [0]


class TestWrongBytes:
    def test_are_not_stored_and_the_source_is_told_to_look(self, near: Side) -> None:
        frame = pack_frame(FrameKind.BLOCKS, [entry(0, A), entry(1, B), entry(2, C)]) + A + C + C
        with odd_peer(saying(frame, END)) as peer:
            assert near.fetch(peer.address, [0, 1, 2]) == 2
            near.connections.close()
        assert peer.checked == [block_hash(1)]
        assert near.held([0, 1, 2]) == [0, 2]
        assert near.totals == StoreTotals(fetched_blocks=2, fetched_bytes=2 * SIZE_BYTES, corrupt_blocks=1)

    def test_of_every_block_leave_nothing(self, near: Side) -> None:
        frame = pack_frame(FrameKind.BLOCKS, [Entry(place, SIZE_BYTES, 1) for place in range(3)]) + A + B + C
        with odd_peer(saying(frame, END)) as peer:
            assert near.fetch(peer.address, [0, 1, 2]) == 0
            near.connections.close()
        assert set(peer.checked) == {block_hash(number) for number in range(3)}
        assert near.totals == StoreTotals(corrupt_blocks=3)

    def test_whose_source_answers_nonsense_when_told_cost_no_whole_block(self, near: Side) -> None:
        frame = pack_frame(FrameKind.BLOCKS, [entry(0, A), entry(1, A)]) + A + B
        with odd_peer(saying(frame, END)) as peer:
            peer.check_answer = b"what? why? who says so?!"
            with pytest.raises(ProtocolError):
                near.fetch(peer.address, [0, 1])
        assert near.held([0, 1]) == [0]


class TestSilence:
    def test_is_not_waited_for_longer_than_the_bound(self, near: Side, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer_fetch, "_SILENCE_S", 0.1)
        with odd_peer(silent) as peer:
            with pytest.raises(UnavailableError, match="silent"):
                near.fetch(peer.address, [0])
            soon(lambda: peer.closed == 1)

    def test_in_the_middle_of_a_payload_leaves_whole_blocks(self, near: Side, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer_fetch, "_SILENCE_S", 0.1)

        def answer(connection: socket.socket, hashes: list[BlockHash]) -> None:
            connection.sendall(blocks_frame(A, B)[:-1])
            silent(connection, hashes)

        with odd_peer(answer) as peer, pytest.raises(UnavailableError):
            near.fetch(peer.address, [0, 1])
        assert near.held([0, 1]) == [0]

    def test_on_a_connection_that_worked_is_not_tried_again(self, near: Side, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer_fetch, "_SILENCE_S", 0.1)
        with odd_peer(saying(END)) as peer:
            near.fetch(peer.address, [0])
            peer.answer = silent
            with pytest.raises(UnavailableError):
                near.fetch(peer.address, [0])
        assert len(peer.asked) == 2

    def test_broken_by_promises_for_ever_ends_with_the_calls_time(self, near: Side) -> None:
        gone = threading.Event()

        def answer(connection: socket.socket, hashes: list[BlockHash]) -> None:
            while not gone.wait(0.01):
                connection.sendall(WAITING)

        with odd_peer(answer) as peer:
            with pytest.raises(UnavailableError, match="out of time"):
                near.fetch(peer.address, [0], timeout_s=0.2, wait_s=60.0)
            soon(lambda: peer.closed == 1)
            gone.set()
        assert len(peer.asked) == 1

    def test_of_nobody_at_the_address_is_an_error_at_once(self, near: Side) -> None:
        with odd_peer(silent) as peer:
            address = peer.address
        with pytest.raises(UnavailableError, match="no store answers"):
            near.fetch(address, [0])


class TestLostPeers:
    @pytest.mark.parametrize("sent_bytes", [0, 5, 30, HEAD_BYTES, HEAD_BYTES + SIZE_BYTES, HEAD_BYTES + 2 * SIZE_BYTES - 1])
    def test_a_peer_that_goes_leaves_whole_blocks(self, near: Side, sent_bytes: int) -> None:
        def answer(connection: socket.socket, hashes: list[BlockHash]) -> None:
            connection.sendall(blocks_frame(A, B)[:sent_bytes])
            raise OSError

        with odd_peer(answer) as peer, pytest.raises(UnavailableError):
            near.fetch(peer.address, [0, 1])
        assert near.held([0, 1]) == ([0] if sent_bytes >= HEAD_BYTES + SIZE_BYTES else [])

    def test_a_source_that_began_again_costs_no_fetch_however_many_connections_it_had(self, near: Side, tmp_path: Path) -> None:
        far = Side(tmp_path / "far")
        far.put(0)
        with far.serving() as address:
            used = [near.connections.take(address)[0] for _ in range(3)]
            for connection in used:
                near.connections.give_back(address, connection)
        with far.serving(address[1]):
            assert near.fetch(address, [0]) == 1
        far.close()

    def test_a_connection_is_used_again(self, near: Side) -> None:
        connections = set[int]()

        def answer(connection: socket.socket, hashes: list[BlockHash]) -> None:
            connections.add(connection.fileno())
            connection.sendall(END)

        with odd_peer(answer) as peer:
            for _ in range(3):
                near.fetch(peer.address, [0])
            near.connections.close()
        assert (len(peer.asked), len(connections), peer.closed) == (3, 1, 1)


class TestAbort:
    @pytest.fixture
    def running(self, near: Side) -> Iterator[Callable[[bytes], None]]:
        """Starts a fetch of two blocks from a peer that says this and no more, and aborts it once the peer has."""
        with ThreadPoolExecutor(1) as threads:

            def run_and_abort(said: bytes) -> None:
                has_said = threading.Event()

                def answer(connection: socket.socket, hashes: list[BlockHash]) -> None:
                    connection.sendall(said)
                    has_said.set()
                    silent(connection, hashes)

                with odd_peer(answer) as peer:
                    fetch = near.fetch_from(peer.address)
                    fetched = threads.submit(fetch.run, NAMESPACE, [block_hash(0), block_hash(1)], timeout_s=1e6, wait_s=1e6)
                    assert has_said.wait(10.0)
                    fetch.abort()
                    with pytest.raises(UnavailableError):
                        fetched.result(timeout=10.0)

            yield run_and_abort

    @pytest.fixture(autouse=True)
    def _patient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer_fetch, "_SILENCE_S", 100.0)

    @pytest.mark.parametrize("said_bytes", [0, 8, HEAD_BYTES, HEAD_BYTES + 1, HEAD_BYTES + SIZE_BYTES])
    def test_ends_a_fetch_wherever_it_waits_and_leaves_no_slot_behind(
        self, near: Side, running: Callable[[bytes], None], said_bytes: int
    ) -> None:
        running(blocks_frame(A, B)[:said_bytes])
        granted = near.store.upkeep.census().granted_slots
        for _ in range(3):
            near.store.drop(NAMESPACE, [block_hash(0)])
            running(blocks_frame(A, B)[:said_bytes])
        assert near.store.upkeep.census().granted_slots <= granted + 1  # of the block that was dropped
        assert near.store.prepare(SIZE_BYTES, 1) == near.store.upkeep.census().granted_slots

    def test_before_the_start_ends_it_at_once(self, near: Side) -> None:
        with odd_peer(silent) as peer:
            fetch = near.fetch_from(peer.address)
            fetch.abort()
            with pytest.raises(UnavailableError):
                fetch.run(NAMESPACE, [block_hash(0)], timeout_s=1e6)
