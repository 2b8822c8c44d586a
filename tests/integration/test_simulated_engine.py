"""The simulated engine by itself, over a real arena: what it publishes and loads, how runs end, what it refuses."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_transfer.arena_store import ArenaStore
from kv_transfer.blocks import block_hashes, make_namespace
from kv_transfer.local_blocks import LocalBlocks
from tandem.config import EngineConfig, ReplicaConfig
from tandem.domain import BlockHash, FinishReason, Sampling, StructuredKind, StructuredOutput
from tandem.engine.base import EngineOutput, EngineRequest, KvLoaded
from tandem.engine.model_files import bundled_model_path
from tandem.engine.simulated import SimulatedEngine
from tandem.engine.simulated_model import namespace_parts, read_profile
from tandem.errors import ConfigError, EngineError, InvalidRequestError
from tandem.replica_engines import build_engine

pytestmark = pytest.mark.integration

CAPACITY_BYTES = 16 << 20
QUICK: dict[str, object] = {"base_s": 1e-4, "prefill_token_s": 0.0, "prefill_pair_s": 0.0, "decode_request_s": 0.0, "eos_fraction": 0.0}
PROMPT = tuple(range(3, 103))  # three full blocks
EOS = 0

Make = Callable[..., SimulatedEngine]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Engines that share one arena; keywords are of EngineConfig, those of the profile in `profile`."""
    made: list[SimulatedEngine] = []

    def make_engine(profile: dict[str, object] | None = None, *, has_store: bool = True, **changes: Any) -> SimulatedEngine:
        config = config_of(tmp_path, profile, **changes)
        store = LocalBlocks(config, make_namespace(namespace_parts(config)), read_profile(config).block_bytes) if has_store else None
        engine = SimulatedEngine(config, block_hashes, store)
        engine.start()
        made.append(engine)
        return engine

    yield make_engine
    for engine in made:
        engine.close()
        engine.close()
    await asyncio.sleep(0)


def config_of(folder: Path, profile: dict[str, object] | None = None, **changes: Any) -> EngineConfig:
    fields = {"store_dir": str(folder), "store_capacity_bytes": CAPACITY_BYTES, **changes}
    return EngineConfig(engine="simulated", step_profile={**QUICK, **(profile or {})}, **fields)


def request_of(token_ids: tuple[int, ...] = PROMPT, tokens: int = 8, run_id: str = "r", **changes: Any) -> EngineRequest:
    fields = {"sampling": Sampling(), **changes}
    return EngineRequest(run_id=run_id, token_ids=token_ids, max_new_tokens=tokens, **fields)


async def outputs_of(engine: SimulatedEngine, request: EngineRequest) -> list[EngineOutput]:
    async with aclosing(engine.generate(request)) as outputs:
        return [output async for output in outputs]


async def tokens_of(engine: SimulatedEngine, request: EngineRequest) -> tuple[int, ...]:
    return tuple(token for output in await outputs_of(engine, request) for token in output.token_ids)


def stored(folder: Path) -> ArenaStore:
    return ArenaStore(folder, capacity_bytes=CAPACITY_BYTES)


async def test_what_one_engine_publishes_another_loads(make: Make) -> None:
    first, second = make(), make()
    tokens = await tokens_of(first, request_of(tokens=40))
    assert await first.published("r", 1.0) == 3
    assert first.take_loaded("r") is None
    rest = await tokens_of(second, request_of((*PROMPT, *tokens[:30]), 10, resumed_tokens=30))
    assert rest == tokens[30:]
    assert second.take_loaded("r") == KvLoaded(local_tokens=0, blocks=4, payload_bytes=4 * 4096)
    assert second.take_loaded("r") is None
    assert first.kv_totals().published_blocks == 4
    assert (second.kv_totals().loaded_blocks, second.kv_totals().published_blocks) == (4, 0)
    for engine in (first, second):
        engine.forget("r")
        assert await engine.published("r", 1.0) == 0


async def test_blocks_that_do_not_hold_what_their_hash_says_are_computed(make: Make, tmp_path: Path) -> None:
    engine = make()
    store = stored(tmp_path)
    hashes: list[BlockHash] = block_hashes(PROMPT, 32)
    namespace = make_namespace(namespace_parts(config_of(tmp_path)))
    rows = np.tile(np.frombuffer(b"".join(hashes), np.uint8).reshape(3, 32), 128)
    rows[1] ^= 1
    store.put(namespace, hashes, rows)
    outputs = await outputs_of(engine, request_of())
    assert outputs[0].cached_tokens == 32
    assert engine.take_loaded("r") == KvLoaded(local_tokens=0, blocks=1, payload_bytes=4096)
    assert engine.kv_totals().corrupt_blocks == 1
    store.close()


async def test_a_run_may_neither_load_nor_publish(make: Make) -> None:
    first, second = make(), make()
    await tokens_of(first, request_of(publish_kv=False))
    assert first.kv_totals().published_blocks == 0
    assert await first.published("r", 0.01) == 0
    await tokens_of(first, request_of(run_id="s"))
    await tokens_of(second, request_of(load_kv=False))
    assert (first.kv_totals().published_blocks, second.kv_totals().loaded_blocks) == (3, 0)


async def test_without_a_store_it_serves_from_its_own_cache(make: Make) -> None:
    engine = make(has_store=False)
    first = await outputs_of(engine, request_of())
    again = await outputs_of(engine, request_of())
    assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 96)
    assert await engine.published("r", 1.0) == 0
    assert engine.kv_totals().published_blocks == 0


async def test_faults_lose_and_delay_blocks_as_in_a_real_engine(make: Make) -> None:
    losing, slow = make(faults="kv_put.drop_every=1"), make(faults="kv_publish.delay_s=0.2")
    await tokens_of(losing, request_of())
    assert await losing.published("r", 1.0) == 0
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await tokens_of(slow, request_of(tokens=1))
    assert await slow.published("r", 0.0) == 0
    assert await slow.published("r", 5.0) == 3
    assert loop.time() - began_s >= 0.2


async def test_a_run_that_nobody_reads_any_more_holds_nothing(make: Make) -> None:
    engine = make()
    async with aclosing(engine.generate(request_of(tokens=1000))) as outputs:
        assert (await anext(outputs)).token_ids
        assert engine.load().running_requests == 1
        assert engine.load().kv_used_fraction > 0.0
        assert engine.pulse.is_busy
    load = engine.load()
    assert (load.running_requests, load.waiting_requests, load.kv_used_fraction) == (0, 0, 0.0)
    assert not engine.pulse.is_busy


async def test_many_runs_share_few_blocks_and_all_end(make: Make) -> None:
    engine = make({"kv_blocks": 10}, context_tokens=256, has_store=False)
    alone = make(context_tokens=256, has_store=False)
    requests = [request_of(tuple(range(number, number + 90)), 60, f"r{number}", priority=number % 3) for number in range(3, 15)]
    together = await asyncio.gather(*(tokens_of(engine, request) for request in requests))
    assert together == [await tokens_of(alone, request) for request in requests]
    assert engine.load().kv_used_fraction == 0.0


async def test_the_end_of_the_sequence_ends_a_run_unless_it_is_ignored_or_too_early(make: Make) -> None:
    engine = make({"eos_fraction": 1.0})
    (output,) = await outputs_of(engine, request_of())
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ((EOS,), FinishReason.STOP, None)
    assert await tokens_of(engine, request_of(sampling=Sampling(ignore_eos=True))) == (EOS,) * 8
    tokens = await tokens_of(engine, request_of(sampling=Sampling(min_tokens=3)))
    assert (len(tokens), tokens.index(EOS)) == (4, 3)


async def test_a_run_ends_where_the_context_does(make: Make) -> None:
    engine = make(context_tokens=104)
    outputs = await outputs_of(engine, request_of(tokens=50))
    assert sum(len(output.token_ids) for output in outputs) == 4
    assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_tokens_that_were_not_read_in_time_come_together(make: Make) -> None:
    engine = make()
    async with aclosing(engine.generate(request_of(tokens=20))) as outputs:
        first = await anext(outputs)
        await asyncio.sleep(0.2)
        rest = await anext(outputs)
    assert len(first.token_ids) + len(rest.token_ids) == 20
    assert rest.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("n", Sampling(n=2)),
        ("logprobs", Sampling(logprobs=0)),
        ("presence_penalty", Sampling(presence_penalty=1.0)),
        ("frequency_penalty", Sampling(frequency_penalty=1.0)),
        ("repetition_penalty", Sampling(repetition_penalty=1.1)),
        ("logit_bias", Sampling(logit_bias={1: 1.0})),
        ("structured_output", Sampling(structured_output=StructuredOutput(kind=StructuredKind.JSON_OBJECT, value=()))),
    ],
)
async def test_what_needs_a_model_is_refused_by_name(make: Make, field: str, sampling: Sampling) -> None:
    with pytest.raises(InvalidRequestError, match="is not simulated") as caught:
        await tokens_of(make(), request_of(sampling=sampling))
    assert caught.value.field == f"sampling.{field}"


async def test_resumed_tokens_that_hold_an_end_are_refused(make: Make) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await tokens_of(make(), request_of((*PROMPT, EOS), resumed_tokens=1))
    assert caught.value.field == "resume_token_ids"


async def test_prompts_that_do_not_fit_are_refused(make: Make) -> None:
    engine = make(context_tokens=64)
    for token_ids in ((), tuple(range(64))):
        with pytest.raises(InvalidRequestError, match="from 1 to 63 tokens"):
            await tokens_of(engine, request_of(token_ids))


async def test_a_slow_replica_takes_longer_and_its_samples_say_so(make: Make) -> None:
    profile: dict[str, object] = {"base_s": 5e-3}
    usual, slow = make(profile), make({**profile, "slowdown": 4.0})
    for engine in (usual, slow):
        await tokens_of(engine, request_of())
    fastest_s = [min(step.duration_s for step in engine.take_steps()) for engine in (usual, slow)]
    assert fastest_s[0] >= 4.99e-3
    assert fastest_s[1] >= 19.99e-3


async def test_health_is_that_of_its_steps(make: Make) -> None:
    engine = make()
    await asyncio.sleep(0)
    await engine.check_health()
    engine.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(EngineError):
        await engine.check_health()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "vlm"}, "engine 'vlm' is not known; valid are vllm, simulated"),
        ({"step_profile": {"bases": 1.0}}, "step_profile.unknown key 'bases'"),
        ({"step_profile": {"kv_blocks": 2}}, "kv_blocks = 2 hold 64 tokens, and one request may have 4096"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, object], words: str) -> None:
    fields: dict[str, Any] = {"engine": "simulated", "is_kv_transfer_on": False, **changes}
    config = ReplicaConfig(replica_id="r", role="decode", incarnation=1, served_model="m", engine=EngineConfig(**fields))
    with pytest.raises(ConfigError, match=words):
        build_engine(config)


def test_a_model_without_a_tokenizer_or_its_limits_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(bundled_model_path(), model, ignore=shutil.ignore_patterns("tokenizer.json", "*.txt", "*.py"))
    for words in ("has no tokenizer.json", "does not tell its limits"):
        with pytest.raises(ConfigError, match=words):
            SimulatedEngine(config_of(tmp_path, model=str(model)), block_hashes, None)
        (model / "config.json").write_text(json.dumps({"architectures": []}))


def test_its_blocks_are_never_those_of_another_engine_or_size(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    parts = namespace_parts(config)
    assert str(parts["engine"]).startswith("simulated ")
    assert make_namespace(parts) != make_namespace(namespace_parts(config_of(tmp_path, {"block_bytes": 8192})))
