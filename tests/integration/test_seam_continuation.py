"""A continuation on another worker draws what the undisturbed run draws, wherever it starts. Real vLLM, with and without KV transfer."""

import asyncio
import json
import math
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

import tandem
from tandem.completion import assemble
from tandem.convert import chunk_from_pb, receipt_from_pb, request_to_worker_pb
from tandem.demo import DirectCaller
from tandem.domain import ModelId, Plan, PlannedWorker, ReplicaId, Request, RequestId, Role
from tandem.errors import InvalidRequestError
from tandem.launch import ReplicaProcess
from tandem.rpc import open_channel, open_stream, parse_answer
from tandem.v1 import common_pb2, inference_pb2, worker_pb2
from tests.integration.conftest import Cluster
from tests.seam_cases import EXACT, JSON_SCHEMA, REGEX, no_blanks

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

EOS = 0
KV_BLOCK_BYTES = 65_536


class Continuer:
    """Continues requests on one replica, without a router."""

    def __init__(self, replica: ReplicaProcess) -> None:
        config = replica.config
        worker = PlannedWorker(replica_id=ReplicaId(config.replica_id), incarnation=config.incarnation, address=replica.address)
        self._plan = Plan(plan_id="direct", decode=worker)
        self._channel = open_channel(replica.address)
        self._number = 0

    async def rest(self, token_ids: Sequence[int], resumed: Sequence[int], **options: Any) -> tandem.Completion:
        """What comes after the resumed tokens."""
        self._number += 1
        request = Request(
            request_id=RequestId(f"continued-{id(self)}-{self._number}"),
            model=ModelId("bundled"),
            prompt_token_ids=tuple(token_ids),
            sampling=tandem.Sampling(**{"temperature": 0.0, **options}),
            resume_token_ids=tuple(resumed),
        )
        message = request_to_worker_pb(request, self._plan, 0, self._plan.decode.incarnation)
        async with open_stream(self._channel, "tandem.v1.Worker/Generate", message, timeout_s=60.0) as stream:
            chunks = [chunk_from_pb(inference_pb2.GenerateResponse.FromString(payload)) async for payload in stream]
            receipt = await stream.receipt()
        assert receipt is not None
        return assemble(chunks, num_choices=1, receipt=receipt_from_pb(common_pb2.Receipt.FromString(receipt)))

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close(None)


@asynccontextmanager
async def continuer(replica: ReplicaProcess) -> AsyncIterator[Continuer]:
    made = Continuer(replica)
    try:
        yield made
    finally:
        await made.close()


def cuts(whole: tandem.Completion) -> list[int]:
    """After none of the tokens, the first, some, and all but one."""
    tokens = len(whole.token_ids)
    return sorted({0, 1, tokens // 3, tokens // 2, tokens - 1})


async def check(cluster: Cluster, token_ids: list[int], whole: tandem.Completion, **options: Any) -> None:
    """Continues at every cut through the router (with KV transfer) and on the plain replica (without)."""
    async with continuer(cluster.platform.replicas["plain"]) as plain:
        for cut in cuts(whole):
            resumed = whole.token_ids[:cut]
            routed = await cluster.client.generate(token_ids, resume_token_ids=resumed, **{"temperature": 0.0, **options})
            for rest in (routed, await plain.rest(token_ids, resumed, **options)):
                assert rest.token_ids == whole.token_ids[cut:], cut
                assert whole.text.endswith(rest.text)
                assert (rest.finish_reason, rest.stop_reason) == (whole.finish_reason, whole.stop_reason)
                assert rest.usage is not None
                assert rest.usage.output_tokens == len(whole.token_ids)
                assert rest.receipt is not None
                assert rest.receipt.not_exact == ()


async def undisturbed(cluster: Cluster, token_ids: list[int], **options: Any) -> tandem.Completion:
    return await cluster.plain.complete(token_ids, tandem.Sampling(**{"temperature": 0.0, **options}))


@pytest.mark.parametrize("name", EXACT)
async def test_what_counts_or_constrains_output_goes_on_exactly(cluster: Cluster, name: str) -> None:
    token_ids, options = cluster.prompts.next(200), {"max_tokens": 40, **EXACT[name]}
    await check(cluster, token_ids, await undisturbed(cluster, token_ids, **options), **options)


async def test_json_by_schema_goes_on_inside_its_strings_and_parses(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(200)
    options = {"max_tokens": 200, "structured_output": JSON_SCHEMA, "logit_bias": no_blanks()}
    whole = await undisturbed(cluster, token_ids, **options)
    assert set(json.loads(whole.text)) == {"name", "count", "is_new"}
    await check(cluster, token_ids, whole, **options)


async def test_output_after_the_end_of_a_grammar_is_as_free_as_without_a_seam(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(200)
    options = {"max_tokens": 30, "structured_output": REGEX, "ignore_eos": True}
    whole = await undisturbed(cluster, token_ids, **options)
    assert len(whole.token_ids) == 30
    await check(cluster, token_ids, whole, **options)


async def test_limits_and_ends_count_the_resumed_tokens(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(200)
    plain = await undisturbed(cluster, token_ids, max_tokens=30)
    for options in (
        {"max_tokens": 30},
        {"max_tokens": 12, "min_tokens": 5, "logit_bias": {EOS: 100.0}},
        {"max_tokens": 6, "ignore_eos": True, "logit_bias": {EOS: 100.0}},
        {"max_tokens": 30, "stop_token_ids": (plain.token_ids[9],)},
        {"max_tokens": 30, "stop": (plain.text[12:20],)},
        {"max_tokens": 30, "stop": (plain.text[12:20],), "include_stop_str_in_output": True},
        {"max_tokens": 30, "stop": (plain.text[3:5],), "min_tokens": 9},
    ):
        await check(cluster, token_ids, await undisturbed(cluster, token_ids, **options), **options)


async def test_logprobs_after_the_resumed_tokens_are_those_of_the_undisturbed_run(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(200)
    for more in ({}, EXACT["all_penalties"], EXACT["seed"]):
        options = {"max_tokens": 12, "logprobs": 3, **more}
        whole = await undisturbed(cluster, token_ids, **options)
        rest = await cluster.client.generate(token_ids, resume_token_ids=whole.token_ids[:5], **{"temperature": 0.0, **options})
        assert len(rest.logprobs) == 7
        for one, other in zip(rest.logprobs, whole.logprobs[5:], strict=True):
            assert one.sampled.token_id == other.sampled.token_id
            assert math.isclose(one.sampled.logprob, other.sampled.logprob, abs_tol=1e-4)
            assert [entry.token_id for entry in one.top] == [entry.token_id for entry in other.top]


@pytest.mark.parametrize(
    ("resumed", "options"),
    [
        ((5, EOS), {}),
        ((5, 6), {"stop_token_ids": (5,)}),
        ((5, 6, 7), {"structured_output": REGEX}),
        ((5, 6), {"max_tokens": 2}),
        ((5, 99_999), {}),
        ((5, 6), {"temperature": 0.5, "n": 2}),
    ],
    ids=["end", "stop_token", "grammar", "max_tokens", "vocabulary", "n"],
)
async def test_resumed_tokens_that_no_run_could_go_on_from_are_refused(
    cluster: Cluster, resumed: tuple[int, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await cluster.client.generate(cluster.prompts.next(200), resume_token_ids=resumed, **{"temperature": 0.0, **options})
    assert caught.value.field == "resume_token_ids"


async def test_resumed_tokens_that_hold_a_stop_string_are_refused(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(200)
    whole = await undisturbed(cluster, token_ids, max_tokens=20)
    with pytest.raises(InvalidRequestError) as caught:
        await cluster.client.generate(token_ids, resume_token_ids=whole.token_ids, max_tokens=30, temperature=0.0, stop=(whole.text[4:9],))
    assert caught.value.field == "resume_token_ids"


async def test_preempted_continuations_in_many_chunks_are_exact(cluster: Cluster) -> None:
    names = ("all_penalties", "seed", "seed_filters", "seed_penalties", "grammar", "seed_regex")
    cases = [(cluster.prompts.next(200), {"max_tokens": 100, "ignore_eos": True, **EXACT[name]}) for name in names]
    wholes = [await undisturbed(cluster, token_ids, **options) for token_ids, options in cases]
    small = await cluster.platform.add_replica(
        Role.DECODE, "small", is_kv_transfer_on=False, kv_cache_bytes=28 * KV_BLOCK_BYTES, context_tokens=512, max_num_batched_tokens=64
    )
    async with continuer(small) as direct:
        rests = await asyncio.gather(
            *(direct.rest(token_ids, whole.token_ids[:7], **options) for (token_ids, options), whole in zip(cases, wholes, strict=True))
        )
        again = DirectCaller(small)
        fresh = [await again.complete(token_ids, tandem.Sampling(**{"temperature": 0.0, **options})) for token_ids, options in cases]
        await again.close()
    preempted = await preemptions(small)
    await cluster.platform.remove_replica("small")
    assert [rest.token_ids for rest in rests] == [whole.token_ids[7:] for whole in wholes]
    assert [one.token_ids for one in fresh] == [whole.token_ids for whole in wholes]
    assert preempted > 0


async def preemptions(replica: ReplicaProcess) -> float:
    """How often vLLM took a request's blocks away, as the replica's metrics say."""
    channel = open_channel(replica.address)
    try:
        async with open_stream(channel, "tandem.v1.Worker/Watch", worker_pb2.WatchRequest(router_id="test"), timeout_s=5.0) as stream:
            address = parse_answer(worker_pb2.WatchResponse, await stream.read() or b"").lease.metrics_address
    finally:
        await channel.close(None)
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics").read().decode())
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_preemptions_total"))
