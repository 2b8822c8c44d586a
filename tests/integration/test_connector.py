"""The worker's half of vLLM's connector interface, step by step: store, threads and notices are real, the engine is left out."""

import asyncio
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kv_transfer.arena_store import ArenaStore
from kv_transfer.link import StoreLink
from kv_transfer.planner import LoadJob, SaveJob, StepJobs
from tandem.config import EngineConfig
from tandem.errors import ConfigError
from tests.dict_store import NAMESPACE, chain

if TYPE_CHECKING:
    from kv_transfer.connector import StepReport, TandemConnector

pytestmark = pytest.mark.integration

HASHES = chain(6)
CAPACITY_BYTES = 8 << 20
BLOCK_TOKENS = 4
BLOCKS = 12


@pytest.fixture(scope="module")
def connector_module() -> Any:
    """Imports vLLM, whose own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kv_transfer.connector
    return kv_transfer.connector


class Steps:
    """Drives one connector as the engine's model runner does."""

    def __init__(self, module: Any, link: StoreLink, store: ArenaStore) -> None:
        self.module = module
        self.link = link
        self.store = store
        self.connector: TandemConnector = make_connector(module, link)
        self.layers = {f"layers.{number}": torch.full((BLOCKS, 2, 4, 8), number + 1.0) for number in range(2)}
        self.connector.register_kv_caches(self.layers)

    def step(
        self, *, loads: list[LoadJob] | None = None, saves: list[SaveJob] | None = None
    ) -> tuple[set[str], set[int], "StepReport | None"]:
        """Runs one step; returns requests whose load has ended, invalid blocks and the report to the scheduler."""
        connector = self.connector
        connector.bind_connector_metadata(self.module.StepMetadata(StepJobs(loads=loads or [], saves=saves or [])))
        connector.start_load_kv(None)
        for name, layer in self.layers.items():
            connector.wait_for_layer_load(name)
            connector.save_kv_layer(name, layer, None)
        connector.wait_for_save()
        sending, receiving = connector.get_finished(set())
        assert sending is None
        invalid = connector.get_block_ids_with_load_errors()
        report = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        return receiving or set(), invalid, report

    async def publish(self, blocks: int) -> None:
        """Puts the first blocks of the chain into the store."""
        self.link.run_params("s", load=True, publish=True)
        self.step(saves=[save("s", 0, blocks, ends_prompt=True)])
        assert await self.link.published("s", 10.0) == blocks


def make_connector(module: Any, link: StoreLink, *, groups: int = 1, world_size: int = 1) -> "TandemConnector":
    vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=link.connector()[2]),
        parallel_config=SimpleNamespace(world_size=world_size),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8 * BLOCK_TOKENS),
    )
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK_TOKENS))
    connector: TandemConnector = module.TandemConnector(
        vllm_config, module.KVConnectorRole.WORKER, SimpleNamespace(kv_cache_groups=[group] * groups)
    )
    return connector


@pytest.fixture
async def link(tmp_path: Path) -> AsyncIterator[StoreLink]:
    made = StoreLink(EngineConfig(store_dir=str(tmp_path / "store"), store_capacity_bytes=CAPACITY_BYTES), NAMESPACE, tmp_path, "replica")
    made.listen()
    yield made
    made.close()


@pytest.fixture
async def steps(connector_module: Any, link: StoreLink, tmp_path: Path) -> AsyncIterator[Steps]:
    store = ArenaStore(tmp_path / "store", capacity_bytes=CAPACITY_BYTES)
    made = Steps(connector_module, link, store)
    yield made
    store.close()
    made.connector.shutdown()
    made.connector.shutdown()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")] == []


def save(request_id: str, first: int, last: int, *, ends_prompt: bool) -> SaveJob:
    return SaveJob(
        request_id=request_id,
        tag=request_id,
        block_ids=list(range(first, last)),
        hashes=HASHES[first:last],
        first_position=first,
        tenant=0,
        prompt_hashes=HASHES[:last] if ends_prompt else None,
    )


def load(request_id: str, blocks: int, *, is_async: bool = False) -> LoadJob:
    """The first blocks of the chain into engine blocks 6, 7, ..."""
    block_ids = list(range(6, 6 + blocks))
    return LoadJob(request_id=request_id, tag=request_id, local_tokens=0, block_ids=block_ids, hashes=HASHES[:blocks], is_async=is_async)


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(2_000):
        if is_so():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to be so in 10 s")


async def test_blocks_that_a_step_saved_are_loaded_by_a_later_one(steps: Steps) -> None:
    await steps.publish(3)
    for layer in steps.layers.values():
        layer[6:] = 0.0
    assert steps.step(loads=[load("r", 3)]) == (set(), set(), None)
    assert all(torch.equal(layer[6:9], layer[:3]) for layer in steps.layers.values())
    assert not any(layer[9:].any() for layer in steps.layers.values())


async def test_a_failed_load_is_reported_once_with_its_blocks(steps: Steps) -> None:
    await steps.publish(2)
    receiving, invalid, report = steps.step(loads=[load("r", 4)])
    assert (receiving, invalid) == (set(), {8, 9})
    assert report == steps.module.StepReport({"r"}, set())
    assert steps.step() == (set(), set(), None)


async def test_nothing_of_a_step_with_a_failed_load_is_saved(steps: Steps) -> None:
    report = steps.step(loads=[load("r", 1)], saves=[save("r", 0, 2, ends_prompt=False), save("t", 0, 3, ends_prompt=False)])[2]
    assert report == steps.module.StepReport({"r"}, {"r", "t"})
    await steps.publish(0)  # the publisher has nothing before this one
    assert steps.store.contains(NAMESPACE, HASHES) == [False] * 6
    assert steps.step(saves=[save("t", 0, 3, ends_prompt=False)])[2] is None
    await until(lambda: steps.store.contains(NAMESPACE, HASHES[:3]) == [True] * 3)


async def test_a_prompt_that_ends_beside_a_failed_load_is_told_without_delay(steps: Steps) -> None:
    # Its run may end with this step, so that nobody would save its blocks again and its caller wait in vain.
    await steps.publish(1)
    steps.link.run_params("t", load=True, publish=True)
    steps.link.run_params("r", load=True, publish=True)
    steps.step(loads=[load("r", 2)], saves=[save("t", 0, 3, ends_prompt=True), save("r", 0, 3, ends_prompt=True)])
    async with asyncio.timeout(10.0):
        assert await steps.link.published("t", 60.0) == 1
    assert await steps.link.published("r", 0.05) == 0  # it is computed again, and told then


async def test_a_load_outside_the_step_ends_once_with_its_failures(steps: Steps) -> None:
    await steps.publish(2)
    steps.step(loads=[load("r", 2, is_async=True), load("t", 3, is_async=True)])
    ended: list[tuple[set[str], set[int], Any]] = []
    for _ in range(2_000):
        ended.append(steps.step())
        if sum(len(receiving) for receiving, _, _ in ended) == 2:
            break
        await asyncio.sleep(0.005)
    assert {request_id for receiving, _, _ in ended for request_id in receiving} == {"r", "t"}
    failed = next(one for one in ended if "t" in one[0])
    assert failed[1:] == ({8}, steps.module.StepReport({"t"}, set()))
    assert steps.step() == (set(), set(), None)


async def test_reports_of_several_workers_become_one(connector_module: Any) -> None:
    report = connector_module.StepReport({"a"}, {"b"}).aggregate(connector_module.StepReport({"c"}, {"b", "d"}))
    assert report == connector_module.StepReport({"a", "c"}, {"b", "d"})


@pytest.mark.parametrize(("groups", "world_size"), [(2, 1), (1, 2)])
async def test_models_that_it_cannot_serve_are_refused_with_what_to_do(
    connector_module: Any, link: StoreLink, groups: int, world_size: int
) -> None:
    with pytest.raises(ConfigError, match="--no-kv-transfer"):
        make_connector(connector_module, link, groups=groups, world_size=world_size)
