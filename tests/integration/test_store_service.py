"""Store services as real processes: two folders stand for two nodes."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from kv_transfer.blocks import BlockKey
from tandem.errors import CancelledRequestError, DeadlineError, InvalidRequestError, TandemError, UnavailableError
from tandem.rpc import call
from tandem.v1 import store_pb2
from tests.dict_store import NAMESPACE, key
from tests.layers import ROOT
from tests.store_benches import hashes_of, held
from tests.store_nodes import BLOCK_BYTES, WAIT_S, Node, running_nodes, until

pytestmark = pytest.mark.integration

KEYS = [key(number) for number in range(40)]
MANY = [key(number) for number in range(1500)]  # about 100 MB: a copy takes some hundred milliseconds


@pytest.fixture
def far(tmp_path: Path) -> Node:
    return Node("far", tmp_path)


@pytest.fixture
async def near(far: Node, tmp_path: Path) -> AsyncIterator[Node]:
    near = Node("near", tmp_path)
    async with running_nodes(far, near):
        await near.connect(far)
        yield near


async def ask(node: Node, method: str, request: store_pb2.LookupRequest | store_pb2.EvictRequest | store_pb2.StoreStatRequest) -> object:
    answers = {
        "Lookup": store_pb2.LookupResponse,
        "Evict": store_pb2.EvictResponse,
        "Stat": store_pb2.StoreStatResponse,
    }
    return await call(node.channel, f"tandem.v1.Store/{method}", request, answers[method], timeout_s=WAIT_S)


async def until_some_are_held(node: Node, keys: list[BlockKey], at_least: int) -> None:
    await until(lambda: sum(held(node.store, keys)) >= at_least)


class TestCopy:
    async def test_blocks_arrive_byte_for_byte(self, far: Node, near: Node) -> None:
        far.fill(KEYS)
        copied = await near.copy(KEYS, far.address)
        assert (copied.copied_blocks, copied.held_blocks, near.held(KEYS)) == (40, 40, 40)
        assert all(np.array_equal(near.blocks.payload(wanted), far.blocks.payload(wanted)) for wanted in KEYS)
        assert await far.metric("served_bytes_total") == await near.metric("fetched_bytes_total") == 40 * BLOCK_BYTES
        assert await near.metric("blocks") == 40

    async def test_what_is_here_already_is_not_fetched(self, far: Node, near: Node) -> None:
        far.fill(KEYS)
        near.fill(KEYS[10:20])
        copied = await near.copy(KEYS, far.address)
        assert (copied.copied_blocks, copied.held_blocks) == (30, 40)
        assert await far.metric("served_blocks_total") == 30
        assert (await near.copy(KEYS, far.address)).copied_blocks == 0
        assert await far.metric("served_blocks_total") == 30

    async def test_blocks_that_the_source_lacks_are_left_out(self, far: Node, near: Node) -> None:
        far.fill(KEYS[:8] + KEYS[20:])
        copied = await near.copy(KEYS, far.address)
        assert (copied.copied_blocks, copied.held_blocks, near.held(KEYS)) == (28, 8, 28)
        assert await far.metric("missing_blocks_total") == 12 + 1  # one by the fixture

    async def test_a_source_that_has_nothing_is_no_error(self, far: Node, near: Node) -> None:
        copied = await near.copy(KEYS, far.address)
        assert (copied.copied_blocks, copied.held_blocks) == (0, 0)

    async def test_a_name_given_twice_is_fetched_once(self, far: Node, near: Node) -> None:
        far.fill(KEYS[:2])
        assert (await near.copy([KEYS[0], KEYS[1], KEYS[0]], far.address)).copied_blocks == 2

    @pytest.mark.parametrize("position", [0, 1000, BLOCK_BYTES - 1])
    async def test_a_flipped_byte_in_the_source_is_not_served_onwards(self, far: Node, near: Node, position: int) -> None:
        far.fill(KEYS)
        far.blocks.flip(KEYS[5], position)
        copied = await near.copy(KEYS, far.address)
        assert (copied.copied_blocks, copied.held_blocks, near.held(KEYS)) == (39, 5, 39)
        assert await far.metric("corrupt_blocks_total") == 1
        assert held(far.store, [KEYS[5]]) == [False]

    async def test_concurrent_copies_of_the_same_blocks_fetch_them_once(self, far: Node, near: Node) -> None:
        far.fill(MANY[:400])
        answers = await asyncio.gather(*(near.copy(MANY[:400], far.address) for _ in range(4)))
        assert [copied.held_blocks for copied in answers] == [400] * 4
        assert sum(copied.copied_blocks for copied in answers) == 400
        assert await far.metric("served_blocks_total") == await near.metric("fetched_blocks_total") == 400

    async def test_a_copy_takes_over_what_a_cancelled_one_was_fetching(self, far: Node, near: Node) -> None:
        far.fill(MANY)
        first = asyncio.create_task(near.copy(MANY, far.address))
        await until_some_are_held(near, MANY, 20)
        second = asyncio.create_task(near.copy(MANY, far.address))
        await asyncio.sleep(0.02)
        first.cancel()
        assert (await second).held_blocks == len(MANY)
        assert near.held(MANY) == len(MANY)
        with pytest.raises((asyncio.CancelledError, CancelledRequestError)):
            await first

    async def test_blocks_that_are_still_being_computed_come_as_they_are_published(self, far: Node, near: Node) -> None:
        copying = asyncio.create_task(near.copy(KEYS, far.address, wait_s=WAIT_S))
        for wanted in KEYS:
            far.fill([wanted])
            far.store.announce()
            await until_some_are_held(near, [wanted], 1)
        assert (await copying).copied_blocks == 40

    async def test_blocks_that_never_come_are_waited_for_no_longer_than_was_said(self, far: Node, near: Node) -> None:
        far.fill(KEYS[:5])
        copied = await near.copy(KEYS, far.address, wait_s=0.3)
        assert (copied.copied_blocks, copied.held_blocks) == (5, 5)

    async def test_a_cancelled_copy_leaves_no_slot_in_use(self, far: Node, near: Node) -> None:
        far.fill(KEYS[:5])
        assert (await near.copy(KEYS, far.address)).copied_blocks == 5
        granted = near.store.upkeep.census().granted_slots
        for _ in range(5):
            copying = asyncio.create_task(near.copy(KEYS, far.address, wait_s=WAIT_S))
            await asyncio.sleep(0.05)
            copying.cancel()
            with pytest.raises((asyncio.CancelledError, CancelledRequestError)):
                await copying
        far.fill(KEYS)
        await near.connect(far)
        assert (await near.copy(KEYS, far.address)).held_blocks == 40
        assert near.store.upkeep.census().granted_slots <= granted

    async def test_a_stranger_at_the_port_of_blocks_is_cut_off_and_counted(self, far: Node, near: Node) -> None:
        far.fill(KEYS)
        answer = await ask(far, "Stat", store_pb2.StoreStatRequest())
        assert isinstance(answer, store_pb2.StoreStatResponse)
        reader, writer = await asyncio.open_connection("127.0.0.1", answer.peer_port)
        writer.write(bytes(32))
        assert await reader.read() == b""
        writer.close()
        assert await far.metric("bad_requests_total") == 1
        assert (await near.copy(KEYS, far.address)).copied_blocks == 40


class TestLostSources:
    async def test_a_source_killed_in_the_middle_leaves_whole_blocks_and_is_asked_again(self, far: Node, near: Node) -> None:
        far.fill(MANY)
        copying = asyncio.create_task(near.copy(MANY, far.address))
        await until_some_are_held(near, MANY, 50)
        far.signal(signal.SIGKILL)
        with pytest.raises(UnavailableError):
            await copying
        await far.wait()
        assert 50 <= near.held(MANY) < len(MANY)
        await far.start()
        await near.connect(far)
        assert (await near.copy(MANY, far.address)).held_blocks == len(MANY)
        assert near.held(MANY) == len(MANY)

    async def test_a_stopped_source_costs_no_more_than_the_deadline(self, far: Node, near: Node) -> None:
        far.fill(KEYS)
        far.signal(signal.SIGSTOP)
        started_s = time.monotonic()
        with pytest.raises(DeadlineError):
            await near.copy(KEYS, far.address, timeout_s=0.5)
        assert time.monotonic() - started_s < 5.0
        far.signal(signal.SIGCONT)
        assert (await near.copy(KEYS, far.address)).held_blocks == 40

    async def test_a_stopped_source_is_told_from_a_slow_one_by_its_silence(self, far: Node, near: Node) -> None:
        far.fill(KEYS)
        far.signal(signal.SIGSTOP)
        with pytest.raises(UnavailableError, match="silent: timed out"):
            await near.copy(KEYS, far.address, timeout_s=WAIT_S)

    async def test_nobody_at_the_address_is_an_error_at_once(self, near: Node) -> None:
        with pytest.raises(UnavailableError):
            await near.copy(KEYS, "127.0.0.1:1")

    async def test_a_failed_copy_lets_the_next_one_ask_another_source(self, far: Node, near: Node, tmp_path: Path) -> None:
        third = Node("third", tmp_path)
        third.fill(KEYS)
        async with running_nodes(third):
            await near.connect(third)
            far.signal(signal.SIGSTOP)
            stuck = asyncio.create_task(near.copy(KEYS, far.address, timeout_s=1.0))
            await asyncio.sleep(0.2)
            assert (await near.copy(KEYS, third.address)).held_blocks == 40
            with pytest.raises(DeadlineError):
                await stuck

    async def test_a_stopped_service_costs_its_caller_no_more_than_the_deadline(self, far: Node, near: Node) -> None:
        near.signal(signal.SIGSTOP)
        started_s = time.monotonic()
        with pytest.raises(DeadlineError):
            await near.copy(KEYS, far.address, timeout_s=0.5)
        assert time.monotonic() - started_s < 5.0


class TestRoom:
    async def test_copies_stay_within_the_capacity(self, far: Node, tmp_path: Path) -> None:
        small = Node("small", tmp_path, capacity_bytes=8 << 20)
        far.fill(MANY[:400])
        async with running_nodes(far, small):
            await small.connect(far)
            await small.copy(MANY[:400], far.address)
            assert small.store.stats().used_bytes <= 8 << 20
            assert 0 < small.held(MANY[:400]) <= 128

    async def test_room_is_made_ahead_of_what_workers_put(self, tmp_path: Path) -> None:
        node = Node("small", tmp_path, capacity_bytes=1 << 20)
        async with running_nodes(node):
            node.fill(KEYS[:16])  # all of it
            await until(lambda: sum(held(node.store, KEYS)) < 16)
            assert await node.metric("evicted_blocks_total") >= 1

    async def test_named_blocks_can_be_dropped(self, near: Node) -> None:
        near.fill(KEYS[:4])
        request = store_pb2.EvictRequest(namespace=NAMESPACE, block_hashes=hashes_of(KEYS[2:6]))
        assert await ask(near, "Evict", request) == store_pb2.EvictResponse(evicted_blocks=2)
        assert held(near.store, KEYS[:4]) == [True, True, False, False]

    async def test_without_names_only_what_is_over_the_capacity_is_dropped(self, near: Node) -> None:
        near.fill(KEYS[:4])
        assert await ask(near, "Evict", store_pb2.EvictRequest()) == store_pb2.EvictResponse(evicted_blocks=0)
        assert near.held(KEYS) == 4


class TestQuestions:
    async def test_lookup_says_what_is_held(self, near: Node) -> None:
        near.fill(KEYS[1:3])
        request = store_pb2.LookupRequest(namespace=NAMESPACE, block_hashes=hashes_of(KEYS[:4]))
        assert await ask(near, "Lookup", request) == store_pb2.LookupResponse(is_held=[False, True, True, False])

    async def test_stat_names_the_node_and_its_tier(self, near: Node) -> None:
        near.fill(KEYS)
        answer = await ask(near, "Stat", store_pb2.StoreStatRequest())
        assert isinstance(answer, store_pb2.StoreStatResponse)
        (tier,) = answer.tiers
        assert (answer.node, tier.tier, tier.blocks, tier.capacity_bytes) == ("near", "arena", 40, near.capacity_bytes)
        assert tier.used_bytes == 40 * BLOCK_BYTES
        assert (answer.leased_blocks, answer.leaked_slots) == (0, 0)
        assert answer.is_native
        assert answer.peer_port not in (0, int(near.address.rpartition(":")[2]))

    async def test_slots_of_a_dead_writer_are_given_back(self, near: Node) -> None:
        program = "import sys, os, pathlib; from kv_transfer.arena_store import ArenaStore\n"
        program += f"ArenaStore(pathlib.Path(sys.argv[1]), capacity_bytes=1).prepare({BLOCK_BYTES}, 100); os._exit(1)"
        dead = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(near.folder), cwd=ROOT)
        assert await dead.wait() == 1
        await until(lambda: near.store.upkeep.census().granted_slots == 0)

    @pytest.mark.parametrize(
        ("namespace", "block_hash", "field"),
        [
            ("../../../../tmp", b"x" * 32, "namespace"),
            (NAMESPACE.upper(), b"x" * 32, "namespace"),
            (f"{NAMESPACE}\n", b"x" * 32, "namespace"),
            (NAMESPACE, b"x" * 31, "block_hashes"),
        ],
    )
    async def test_what_names_no_block_is_refused(self, near: Node, namespace: str, block_hash: bytes, field: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            await ask(near, "Evict", store_pb2.EvictRequest(namespace=namespace, block_hashes=[block_hash]))
        assert caught.value.field == field

    @pytest.mark.parametrize("address", ["", "nowhere", ":1", "unix:/tmp/x", "host:http", "a:1,b:2"])
    async def test_an_address_that_is_none_is_refused(self, near: Node, address: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            await near.copy(KEYS, address)
        assert caught.value.field == "from_address"

    async def test_a_call_names_a_bounded_number_of_blocks(self, near: Node) -> None:
        with pytest.raises(TandemError, match="at most 16384"):
            await ask(near, "Lookup", store_pb2.LookupRequest(namespace=NAMESPACE, block_hashes=[b"x" * 32] * 16_385))
