"""A store service in this process, and a peer that sends what it should not."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kv_transfer.codec import pack_header
from kv_transfer.copier import BlockCopier, StoreTotals
from kv_transfer.main import StoreAddresses, StoreOptions, serve
from kv_transfer.shm_store import ShmStore
from tandem.channel_pool import ChannelPool
from tandem.errors import ProtocolError, TandemError
from tandem.rpc import ServerCall, service, start_server
from tandem.v1 import store_pb2
from tests.dict_store import DictStore, key
from tests.store_benches import get
from tests.store_nodes import until

pytestmark = pytest.mark.integration

A, B, C = key(1), key(2), key(3)
PAYLOAD = bytes(range(256)) * 4
WAIT_S = 10.0


def stored_block(**changes: bytes) -> store_pb2.StoredBlock:
    """A whole block A, but for the changes."""
    block = {"block_hash": bytes(A.block_hash), "header": pack_header(A, PAYLOAD), "payload": PAYLOAD, **changes}
    return store_pb2.StoredBlock(**block)


class OddPeer:
    """Answers each Fetch with the next of `messages`, waiting for `gate` before."""

    def __init__(self) -> None:
        self.messages: list[store_pb2.FetchResponse | bytes] = []
        self.asked: list[list[bytes]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, request: store_pb2.FetchRequest, its_call: ServerCall) -> None:
        self.asked.append(list(request.block_hashes))
        await self.gate.wait()
        for message in self.messages:
            await its_call.write(message)

    async def refuse(self, request: object, its_call: ServerCall) -> None:
        raise AssertionError

    stat = lookup = copy = evict = refuse


@dataclass
class Pair:
    peer: OddPeer
    address: str
    store: DictStore
    totals: StoreTotals
    copier: BlockCopier


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    peer, store, totals, channels = OddPeer(), DictStore(), StoreTotals(), ChannelPool()
    server = await start_server("127.0.0.1", 0, {"tandem.v1.Store": service(store_pb2, "Store", peer)})
    yield Pair(peer, server.address, store, totals, BlockCopier(store, channels, totals, evict_after_bytes=1 << 20))
    await channels.close()
    await server.stop(0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": PAYLOAD[:-1] + b"!"},
        {"payload": PAYLOAD[:-1]},
        {"payload": b""},
        {"header": b""},
        {"header": pack_header(A, PAYLOAD)[:-1] + b"!"},
        {"block_hash": bytes(B.block_hash)},
        {"block_hash": bytes(C.block_hash), "header": pack_header(C, PAYLOAD)},
    ],
    ids=["flipped", "short", "empty", "no header", "bad header", "another name", "not asked for"],
)
async def test_what_is_not_the_block_that_was_asked_for_is_not_stored(pair: Pair, changes: dict[str, bytes]) -> None:
    pair.peer.messages = [store_pb2.FetchResponse(blocks=[stored_block(**changes)])]
    assert await pair.copier.copy([A, B], pair.address, WAIT_S) == 0
    assert pair.store.blocks == {}
    assert pair.totals == StoreTotals(corrupt_blocks=1)


async def test_whole_blocks_beside_a_damaged_one_are_stored(pair: Pair) -> None:
    good = store_pb2.StoredBlock(block_hash=B.block_hash, header=pack_header(B, PAYLOAD), payload=PAYLOAD)
    pair.peer.messages = [store_pb2.FetchResponse(blocks=[stored_block(payload=b""), good])]
    assert await pair.copier.copy([A, B], pair.address, WAIT_S) == 1
    assert get(pair.store, B)[1] == PAYLOAD
    assert pair.totals == StoreTotals(fetched_blocks=1, fetched_bytes=len(PAYLOAD), corrupt_blocks=1)


async def test_bytes_that_are_no_message_end_the_copy(pair: Pair) -> None:
    pair.peer.messages = [store_pb2.FetchResponse(blocks=[stored_block()]), b"\xff\xff"]
    with pytest.raises(ProtocolError):
        await pair.copier.copy([A, B], pair.address, WAIT_S)
    assert list(pair.store.blocks) == [A]


async def test_a_block_without_room_is_counted_and_asks_for_an_eviction(pair: Pair) -> None:
    copier = BlockCopier(DictStore(max_bytes=10), ChannelPool(), pair.totals, evict_after_bytes=1 << 20)
    pair.peer.messages = [store_pb2.FetchResponse(blocks=[stored_block()])]
    assert await copier.copy([A], pair.address, WAIT_S) == 0
    assert pair.totals == StoreTotals(unstored_blocks=1)
    assert copier.needs_room.is_set()


async def test_blocks_on_their_way_are_asked_for_once_and_others_at_once(pair: Pair) -> None:
    pair.peer.gate.clear()
    pair.peer.messages = [store_pb2.FetchResponse(blocks=[stored_block()])]
    copies = [asyncio.create_task(pair.copier.copy(keys, pair.address, WAIT_S)) for keys in ([A], [A], [A, C])]
    await until(lambda: len(pair.peer.asked) == 2)
    pair.peer.gate.set()
    assert [await copy for copy in copies] == [1, 0, 0]
    assert sorted(pair.peer.asked) == [[A.block_hash], [C.block_hash]]  # two calls at once arrive in any order


async def test_who_waits_for_a_fetch_that_fails_fetches_by_itself(pair: Pair) -> None:
    pair.peer.gate.clear()
    first = asyncio.create_task(pair.copier.copy([A], pair.address, 0.3))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(pair.copier.copy([A], pair.address, WAIT_S))
    with pytest.raises((TimeoutError, TandemError)):
        await first
    pair.peer.messages = [store_pb2.FetchResponse(blocks=[stored_block()])]
    pair.peer.gate.set()
    assert await second == 1


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


def test_the_size_of_a_held_block_is_told(tmp_path: Path) -> None:
    store = ShmStore(tmp_path, capacity_bytes=1 << 20)
    store.put([A], [memoryview(PAYLOAD)])
    assert (store.payload_bytes(A), store.payload_bytes(B)) == (len(PAYLOAD), None)
