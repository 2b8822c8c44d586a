"""What every engine keeps to, seen through its replica: vLLM's and the simulated one's."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

import tandem
from tandem.demo import DirectCaller
from tandem.domain import FinishReason, Sampling
from tandem.errors import InvalidRequestError
from tests.integration.conftest import Cluster
from tests.integration.engine_replicas import engine_replica

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Bench:
    """One engine's replica and prompts for it."""

    caller: DirectCaller
    cluster: Cluster

    async def run(self, token_ids: list[int], **options: object) -> tandem.Completion:
        return await self.caller.complete(token_ids, Sampling(**{"temperature": 0.0, "ignore_eos": True, **options}))  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["vllm", "simulated"])
async def bench(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[Bench]:
    async with engine_replica(cluster, request.param) as replica:
        caller = DirectCaller(replica)
        yield Bench(caller, cluster)
        await caller.close()


async def test_output_ends_at_its_limit(bench: Bench) -> None:
    answer = await bench.run(bench.cluster.prompts.next(100), max_tokens=12)
    assert (len(answer.token_ids), answer.finish_reason) == (12, FinishReason.LENGTH)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.output_tokens) == (100, 12)
    assert answer.text


async def test_a_run_that_goes_on_from_its_own_output_gives_the_same_tokens(bench: Bench) -> None:
    prompt = bench.cluster.prompts.next(300)
    whole = await bench.run(prompt, max_tokens=40)
    for cut in (1, 17, 39):
        rest = await bench.run([*prompt, *whole.token_ids[:cut]], max_tokens=40 - cut)
        assert rest.token_ids == whole.token_ids[cut:]


async def test_the_same_prompt_again_comes_from_the_cache(bench: Bench) -> None:
    prompt = bench.cluster.prompts.next(200)
    first, again = await bench.run(prompt, max_tokens=4), await bench.run(prompt, max_tokens=4)
    assert first.token_ids == again.token_ids
    assert first.usage is not None
    assert again.usage is not None
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 192)


async def test_a_stop_token_ends_the_output_and_is_named(bench: Bench) -> None:
    prompt = bench.cluster.prompts.next(200)
    whole = await bench.run(prompt, max_tokens=20)
    stop_token = whole.token_ids[7]
    answer = await bench.run(prompt, max_tokens=20, stop_token_ids=(stop_token,))
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(stop_token) + 1]
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, str(stop_token))


async def test_a_stop_token_does_not_come_before_the_least_tokens(bench: Bench) -> None:
    prompt = bench.cluster.prompts.next(200)
    first = (await bench.run(prompt, max_tokens=1)).token_ids[0]
    answer = await bench.run(prompt, max_tokens=20, stop_token_ids=(first,), min_tokens=5)
    assert len(answer.token_ids) > 5
    assert first not in answer.token_ids[:5]


async def test_a_stop_string_ends_the_text_before_it(bench: Bench) -> None:
    prompt = bench.cluster.prompts.next(200)
    whole = await bench.run(prompt, max_tokens=30)
    stop = whole.text[5:9]
    answer = await bench.run(prompt, max_tokens=30, stop=(stop,))
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, stop)


async def test_a_prompt_longer_than_the_context_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidRequestError):
        await bench.run([5] * 5000, max_tokens=4)
