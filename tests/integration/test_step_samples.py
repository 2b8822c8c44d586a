"""Steps that an engine measures of itself, as routers are told of them: vLLM's and the simulated one's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tandem.channel_pool import ChannelPool
from tandem.convert import step_from_pb
from tandem.demo import DirectCaller
from tandem.domain import Sampling
from tandem.rpc import open_stream, parse_answer
from tandem.step_sample import StepSample
from tandem.v1 import worker_pb2
from tests.integration.conftest import Cluster
from tests.integration.engine_replicas import engine_replica

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

WAIT_S = 60.0
QUIET_S = 2.5  # a worker without requests says a word every second
PROMPT_TOKENS = 1000
OUTPUT_TOKENS = 50


@asynccontextmanager
async def told_steps(address: str, router_id: str) -> AsyncIterator[list[StepSample]]:
    """The steps that come over a Watch stream, from its first message on; all of them once the context has ended."""
    channels, steps = ChannelPool(), list[StepSample]()
    request = worker_pb2.WatchRequest(router_id=router_id)
    async with open_stream(channels(address), "tandem.v1.Worker/Watch", request, timeout_s=WAIT_S) as stream:
        await stream.read()

        async def read() -> None:
            while (payload := await stream.read()) is not None:
                steps.extend(step_from_pb(step) for step in parse_answer(worker_pb2.WatchResponse, payload).steps)

        reading = asyncio.create_task(read())
        yield steps
        await asyncio.sleep(QUIET_S)
        reading.cancel()
    await channels.close()


@pytest.mark.parametrize("engine", ["vllm", "simulated"])
async def test_a_prompt_and_its_output_give_samples_to_every_router(cluster: Cluster, engine: str) -> None:
    async with (
        engine_replica(cluster, engine) as replica,
        told_steps(replica.address, "one") as one,
        told_steps(replica.address, "two") as two,
    ):
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await DirectCaller(replica).complete(
            cluster.prompts.next(PROMPT_TOKENS), Sampling(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        )
        took_s = loop.time() - began_s
    for steps in (one, two):
        prefill = [step for step in steps if step.prefill_tokens]
        decode = [step for step in steps if not step.prefill_tokens]
        assert sum(step.prefill_tokens for step in prefill) == PROMPT_TOKENS
        assert sum(step.prefill_pairs for step in prefill) == PROMPT_TOKENS**2 // 2
        assert 10 < len(decode) < OUTPUT_TOKENS
        assert {step.decode_requests for step in decode} == {1}
        kv_tokens = [step.kv_tokens for step in decode]
        assert kv_tokens == sorted(set(kv_tokens))
        assert PROMPT_TOKENS < kv_tokens[0] <= kv_tokens[-1] == PROMPT_TOKENS + OUTPUT_TOKENS - 1
        assert all(step.duration_s > 0.0 for step in steps)
        assert sum(step.duration_s for step in steps) < took_s
        assert min(step.duration_s for step in prefill) > sorted(step.duration_s for step in decode)[len(decode) // 2]
    assert [step for step in one if step.prefill_tokens] == [step for step in two if step.prefill_tokens]
    # Decode steps that are too many for a message each router's stream drops at its own time.
    told = {step.kv_tokens: step for step in one if not step.prefill_tokens}
    assert all(told.get(step.kv_tokens, step) == step for step in two if not step.prefill_tokens)
