"""Hand-off on real vLLM: every token equals a plain engine's, whatever the length, the load, the damage."""

import asyncio
import random
import urllib.request

import pytest

import tandem
from kv_transfer.arena_store import ArenaStore
from kv_transfer.blocks import BlockKey, block_hashes
from kv_transfer.writers import Writers
from tandem.demo import DirectCaller
from tandem.domain import Role
from tests.arena_blocks import ArenaBlocks
from tests.integration.conftest import Cluster
from tests.store_benches import hashes_of

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

LENGTHS = (5, 31, 32, 33, 63, 64, 65, 200, 320, 321, 777, 1024, 1025, 1500)


async def test_greedy_tokens_equal_a_plain_engine_at_every_length(cluster: Cluster) -> None:
    for length in LENGTHS:
        token_ids = cluster.prompts.next(length)
        ours = await cluster.client.generate(token_ids, max_tokens=32, temperature=0.0)
        plain = await cluster.plain.run(token_ids, 32)
        assert list(ours.token_ids) == plain.token_ids, length
        assert ours.text == plain.text
        assert ours.receipt is not None
        assert ours.receipt.handed_off == (length >= 64)
        assert ours.receipt.decode_recomputed_tokens <= 32 or not ours.receipt.handed_off
        if ours.receipt.handed_off:
            assert ours.receipt.kv_bytes_shipped == length // 32 * 65_536


async def test_24_concurrent_mixed_requests_are_all_exact(cluster: Cluster) -> None:
    cases = [(cluster.prompts.next(length), max_tokens) for length, max_tokens in zip((LENGTHS * 2)[:24], (8, 16, 33, 64) * 6, strict=True)]
    plains = [await cluster.plain.run(token_ids, max_tokens) for token_ids, max_tokens in cases]
    ours = await asyncio.gather(
        *(cluster.client.generate(token_ids, max_tokens=max_tokens, temperature=0.0) for token_ids, max_tokens in cases)
    )
    assert [list(completion.token_ids) for completion in ours] == [run.token_ids for run in plains]


async def test_200_random_cancels_leave_engines_store_and_ledger_as_they_were(cluster: Cluster) -> None:
    rng = random.Random(7)

    async def cancel_one() -> None:
        stream = cluster.client.stream(cluster.prompts.next(rng.choice(LENGTHS)), max_tokens=64, temperature=0.0)
        wait_s = rng.random() * 0.15
        try:
            async with asyncio.timeout(wait_s), stream:
                async for _ in stream:
                    if rng.random() < 0.05:
                        break
        except TimeoutError:
            return

    for _ in range(20):
        await asyncio.gather(*(cancel_one() for _ in range(10)))
    await settle(cluster)
    assert arena_faults(cluster) == []  # no staged block of a cancelled request
    token_ids = cluster.prompts.next(500)
    ours = await cluster.client.generate(token_ids, max_tokens=16, temperature=0.0)
    assert list(ours.token_ids) == (await cluster.plain.run(token_ids, 16)).token_ids
    for name in ("prefill-0", "decode-0"):
        assert await kv_usage(cluster, name) == 0.0


def arena_faults(cluster: Cluster) -> list[str]:
    """What is wrong with the arena's slots. Those that publishers hold ready are theirs for as long as they live."""
    blocks, writers = ArenaBlocks(cluster.platform.store_dir), Writers(cluster.platform.store_dir)
    try:
        assert 0 < len(blocks.granted()) < len(blocks.free()) + len(blocks.committed())
        return blocks.faults(writers.is_alive)
    finally:
        blocks.close()


async def kv_usage(cluster: Cluster, name: str) -> float:
    """What vLLM itself said of its KV blocks after its last step."""
    status = await cluster.client.status()
    address = next(replica.lease.metrics_address for replica in status.replicas if replica.lease.replica_id == name)
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics").read().decode())
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:kv_cache_usage_perc"))


async def settle(cluster: Cluster) -> None:
    """Waits until nothing is held anywhere: routers, ledgers, workers, engines. Fails after 5 s."""
    for _ in range(100):
        status = await cluster.client.status()
        idle = status.running_requests == 0 and status.queued_requests == 0
        idle = idle and all(
            replica.load.running_requests == 0
            and replica.load.waiting_requests == 0
            and replica.load.pending_prefill_tokens == 0
            and replica.load.kv_tokens == 0
            and replica.load.kv_used_fraction == 0.0
            and replica.predicted_work_s == 0.0
            for replica in status.replicas
        )
        if idle:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"still held after 5 s: {status}")


async def test_a_byte_flipped_in_every_tenth_block_is_recomputed_and_counted(cluster: Cluster) -> None:
    cases = [cluster.prompts.next(length) for length in (320, 700, 1000, 1500)]
    plains = [await cluster.plain.run(token_ids, 24) for token_ids in cases]
    fresh = await cluster.platform.add_replica(Role.DECODE, "fresh-decode")  # an empty engine cache: it must read the store
    caller = DirectCaller(fresh, [cluster.platform.replicas["prefill-0"]])
    for token_ids in cases:
        await cluster.client.generate(token_ids, max_tokens=1, temperature=0.0)  # published by the prefill worker
    rng = random.Random(3)
    blocks, flipped_blocks = ArenaBlocks(cluster.platform.store_dir), []
    for token_ids in cases:
        flipped = (await published_blocks(blocks, token_ids))[::10]
        flipped_blocks.append(len(flipped))
        for wanted in flipped:
            blocks.flip(wanted, rng.randrange(len(blocks.payload(wanted))), 1 << rng.randrange(8))
    blocks.close()
    assert flipped_blocks == [1, 3, 4, 5]
    runs = [await caller.run(token_ids, 24) for token_ids in cases]
    assert [run.token_ids for run in runs] == [plain.token_ids for plain in plains]
    assert await corrupt_blocks(cluster, fresh.address) == 4  # a load ends at the first
    other = await cluster.platform.add_replica(Role.DECODE, "fresh-decode-2")
    again = DirectCaller(other, [cluster.platform.replicas["prefill-0"]])
    runs = [await again.run(token_ids, 24) for token_ids in cases]
    assert [run.token_ids for run in runs] == [plain.token_ids for plain in plains]
    assert await corrupt_blocks(cluster, other.address) == 3
    assert runs[0].receipt is not None
    assert runs[0].receipt.decode_recomputed_tokens <= 32  # made good by then
    for one in (caller, again):
        await one.close()
    for name in ("fresh-decode", "fresh-decode-2"):
        await cluster.platform.remove_replica(name)


async def test_a_request_that_is_aborted_while_its_load_fails_leaves_nothing_for_others(cluster: Cluster) -> None:
    """vLLM handles aborts between a step's loads and their result: what was not loaded must not be found in its prefix cache then."""
    writer = DirectCaller(cluster.platform.replicas["decode-0"])
    reader = DirectCaller(await cluster.platform.add_replica(Role.DECODE, "fresh-aborts"))
    rng, blocks = random.Random(7), ArenaBlocks(cluster.platform.store_dir)

    async def later(token_ids: list[int]) -> list[int]:
        await asyncio.sleep(rng.uniform(0.0, 0.04))
        return (await reader.run(token_ids, 16)).token_ids

    for _ in range(10):
        cases = [cluster.prompts.next(rng.randint(150, 1500)) for _ in range(3)]
        expected = [(await cluster.plain.run(token_ids, 16)).token_ids for token_ids in cases]
        for token_ids in cases:
            await writer.run(token_ids, 1)
            for wanted in await published_blocks(blocks, token_ids):
                if rng.random() < 0.3:
                    blocks.flip(wanted, rng.randrange(len(blocks.payload(wanted))), 1 << rng.randrange(8))
        aborted = [asyncio.create_task(later(token_ids)) for token_ids in cases]
        others = [asyncio.create_task(later(token_ids)) for token_ids in cases]
        for task in aborted:
            await asyncio.sleep(rng.uniform(0.0, 0.03))
            task.cancel()
        await asyncio.gather(*aborted, return_exceptions=True)
        assert await asyncio.gather(*others) == expected
        assert [await later(token_ids) for token_ids in cases] == expected
    blocks.close()
    for one in (writer, reader):
        await one.close()
    await cluster.platform.remove_replica("fresh-aborts")


async def published_blocks(blocks: ArenaBlocks, token_ids: list[int]) -> list[BlockKey]:
    """The prompt's blocks, in order, once they are all there."""
    wanted = block_hashes(token_ids, 32)
    for _ in range(100):
        found = {key.block_hash: key for key in blocks.held()}  # other tests' replicas may have left blocks of another namespace
        if set(wanted) <= set(found):
            return [found[block_hash] for block_hash in wanted]
        await asyncio.sleep(0.02)
    raise AssertionError("the prompt's blocks were not published")


async def corrupt_blocks(cluster: Cluster, address: str) -> int:
    """corrupt_blocks_total as the replica reports it over Watch."""
    from tandem.rpc import open_channel, open_stream, parse
    from tandem.v1 import worker_pb2

    channel = open_channel(address)
    try:
        async with open_stream(channel, "tandem.v1.Worker/Watch", worker_pb2.WatchRequest(router_id="test"), timeout_s=5.0) as stream:
            payload = await stream.read()
            assert payload is not None
            return parse(worker_pb2.WatchResponse, payload).load.corrupt_blocks_total
    finally:
        await channel.close(None)


async def test_a_missing_block_is_recomputed(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(640)
    plain = await cluster.plain.run(token_ids, 16)
    await cluster.client.generate(token_ids, max_tokens=1, temperature=0.0)
    blocks = ArenaBlocks(cluster.platform.store_dir)
    lost = (await published_blocks(blocks, token_ids))[5::7]
    blocks.close()
    store = ArenaStore(cluster.platform.store_dir, capacity_bytes=1)
    assert store.drop(lost[0].namespace, hashes_of(lost)) == len(lost)
    store.close()
    fresh = await cluster.platform.add_replica(Role.DECODE, "fresh-missing")
    caller = DirectCaller(fresh, [cluster.platform.replicas["prefill-0"]])
    assert (await caller.run(token_ids, 16)).token_ids == plain.token_ids
    await caller.close()
    await cluster.platform.remove_replica("fresh-missing")


async def test_first_token_does_not_wait_for_a_transfer_that_is_held_back(cluster: Cluster) -> None:
    held = await cluster.platform.add_replica(Role.PREFILL, "held", faults="kv_publish.delay_s=0.55")  # from before the token is read
    caller = DirectCaller(cluster.platform.replicas["decode-0"], [held])
    await caller.run(cluster.prompts.next(320), 2)
    runs = [await caller.run(cluster.prompts.next(320), 3) for _ in range(3)]
    assert min(run.times_s[0] for run in runs) < 0.4
    assert all(run.times_s[1] - run.times_s[0] >= 0.5 for run in runs)
    await caller.close()
    await cluster.platform.remove_replica("held")


async def test_generation_is_refused_with_a_typed_error_when_nothing_serves_the_model(cluster: Cluster) -> None:
    with pytest.raises(tandem.NotFoundError, match="bundled"):
        await cluster.client.generate("x", model="no-such-model")
