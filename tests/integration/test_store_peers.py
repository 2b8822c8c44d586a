"""Copies from one node's store to another's: each block fetched once, by whoever asks first, and nothing lost where a fetch fails."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kv_transfer import peer_fetch
from kv_transfer.copier import BlockCopier
from kv_transfer.main import StoreAddresses, serve
from kv_transfer.peer_wire import FrameKind, pack_frame
from kv_transfer.store_options import StoreOptions
from kv_transfer.store_totals import StoreTotals
from tandem.channel_pool import ChannelPool
from tandem.domain import BlockHash
from tandem.errors import ProtocolError, TandemError, UnavailableError
from tandem.rpc import ServerCall, service, start_server
from tandem.v1 import store_pb2
from tests.dict_store import NAMESPACE, block_hash
from tests.peer_sides import END, SIZE_BYTES, OddPeer, Side, blocks_frame, entry, odd_peer, payload_of, saying
from tests.store_nodes import until

pytestmark = pytest.mark.integration

A, B, C = (block_hash(number) for number in range(3))
BLOCK_A, BLOCK_B = payload_of(0), payload_of(1)
WAIT_S = 10.0


def leaving(connection: socket.socket, hashes: list[BlockHash]) -> None:
    """Closes the connection without an answer."""
    raise OSError


class StatOnly:
    """The service of the other node as a copier sees it: where blocks are to be had."""

    def __init__(self) -> None:
        self.peer_port = 0
        self.asked = 0

    async def stat(self, request: store_pb2.StoreStatRequest, its_call: ServerCall) -> store_pb2.StoreStatResponse:
        self.asked += 1
        return store_pb2.StoreStatResponse(peer_port=self.peer_port)

    async def refuse(self, request: object, its_call: ServerCall) -> None:
        raise AssertionError

    lookup = copy = prefetch = evict = watch = refuse


@dataclass
class Pair:
    """A copier into `near`, from a peer that answers with a block A once its gate is open."""

    peer: OddPeer
    gate: threading.Event
    far: StatOnly
    address: str
    near: Side
    copier: BlockCopier

    async def copy(self, *hashes: BlockHash, timeout_s: float = WAIT_S, wait_s: float = 0.0) -> int:
        return await self.copier.copy(NAMESPACE, hashes, self.address, timeout_s, wait_s)


@pytest.fixture
def near(tmp_path: Path) -> Iterator[Side]:
    with contextlib.closing(Side(tmp_path / "near")) as near:
        yield near


@pytest.fixture
async def pair(near: Side) -> AsyncIterator[Pair]:
    gate = threading.Event()
    gate.set()

    def answer(connection: socket.socket, hashes: list[BlockHash]) -> None:
        gate.wait(WAIT_S)
        connection.sendall((blocks_frame(BLOCK_A, first_place=hashes.index(A)) if A in hashes else b"") + END)

    far, channels = StatOnly(), ChannelPool()
    server = await start_server("127.0.0.1", 0, {"tandem.v1.Store": service(store_pb2, "Store", far)})
    with odd_peer(answer) as peer:
        far.peer_port = peer.address[1]
        with contextlib.closing(BlockCopier(near.store, channels, near.totals)) as copier:
            yield Pair(peer, gate, far, server.address, near, copier)
        gate.set()
    await channels.close()
    await server.stop(0.0)


async def test_what_is_not_the_block_that_was_asked_for_is_not_stored_and_what_is_beside_it_is(pair: Pair) -> None:
    frame = pack_frame(FrameKind.BLOCKS, [entry(0, BLOCK_A), entry(1, BLOCK_B)]) + BLOCK_B + BLOCK_B
    pair.peer.answer = saying(frame, END)
    assert await pair.copy(A, B) == 1
    assert pair.near.held([0, 1]) == [1]
    assert pair.near.totals == StoreTotals(fetched_blocks=1, fetched_bytes=SIZE_BYTES, corrupt_blocks=1)
    assert pair.peer.checked == [A]


async def test_bytes_that_are_no_answer_end_the_copy(pair: Pair) -> None:
    pair.peer.answer = saying(blocks_frame(BLOCK_A), b"\xff" * 100)
    with pytest.raises(ProtocolError):
        await pair.copy(A, B)
    assert pair.near.held([0, 1]) == [0]


async def test_what_is_here_is_not_asked_for(pair: Pair) -> None:
    pair.near.put(0, 1)
    assert await pair.copy(A, B) == 0
    assert (pair.peer.asked, pair.far.asked) == ([], 0)


async def test_blocks_on_their_way_are_asked_for_once_and_others_at_once(pair: Pair) -> None:
    pair.gate.clear()
    copies = [asyncio.create_task(pair.copy(*hashes)) for hashes in ([A], [A], [A, C])]
    await until(lambda: len(pair.peer.asked) == 2)
    pair.gate.set()
    assert [await copy for copy in copies] == [1, 0, 0]
    assert sorted(pair.peer.asked) == sorted([[A], [C]])  # two calls at once arrive in any order


async def test_who_waits_for_a_fetch_that_fails_fetches_by_itself(pair: Pair) -> None:
    pair.gate.clear()
    first = asyncio.create_task(pair.copy(A, timeout_s=0.3))
    await until(lambda: len(pair.peer.asked) == 1)
    second = asyncio.create_task(pair.copy(A))
    with pytest.raises((TimeoutError, TandemError)):
        await first
    pair.gate.set()
    assert await second == 1
    assert len(pair.peer.asked) == 2


async def test_a_cancelled_copy_ends_at_once_and_so_does_its_connection(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_fetch, "_SILENCE_S", 1000.0)
    pair.gate.clear()
    copying = asyncio.create_task(pair.copy(A, timeout_s=1e6, wait_s=1e6))
    await until(lambda: len(pair.peer.asked) == 1)
    copying.cancel()
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(asyncio.CancelledError):
            await copying
    pair.gate.set()
    await until(lambda: pair.peer.closed == 1)
    assert await pair.copy(A) == 1


async def test_where_a_peer_answers_is_asked_once_and_again_after_a_failure(pair: Pair) -> None:
    for _ in range(3):
        await pair.copy(B)
    assert pair.far.asked == 1
    pair.peer.answer = leaving
    with odd_peer(saying(blocks_frame(BLOCK_A), END)) as moved:
        pair.far.peer_port = moved.address[1]
        with pytest.raises(UnavailableError):
            await pair.copy(A)
        assert await pair.copy(A) == 1
        pair.copier.close()
    assert pair.far.asked == 2


async def test_nobody_at_the_address_is_an_error(pair: Pair) -> None:
    with pytest.raises(UnavailableError):
        await pair.copier.copy(NAMESPACE, [A], "127.0.0.1:1", WAIT_S)


async def test_a_coroutine_beside_the_service_knows_its_addresses_and_ends_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop, seen = asyncio.Event(), list[StoreAddresses]()

    async def beside(addresses: StoreAddresses) -> None:
        seen.append(addresses)
        stop.set()
        await asyncio.Event().wait()

    await serve(StoreOptions(store_dir=str(tmp_path / "store"), capacity_bytes=1 << 20), stop, beside)
    (addresses,) = seen
    assert capsys.readouterr().out == f"store ready address={addresses.address} metrics={addresses.metrics_address}\n"
