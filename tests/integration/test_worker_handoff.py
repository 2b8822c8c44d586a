"""One request on two workers gives what it gives on one, whatever happens to the prefill worker. Real gRPC, engines of a few lines."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tandem.domain import FinishReason, PlannedWorker, ReplicaId, Sampling, StructuredKind, StructuredOutput, Usage
from tandem.errors import CancelledRequestError, EngineError, InternalError, InvalidRequestError, OverloadedError, TandemError
from tandem.rpc import ServerCall, service, start_server
from tandem.urgency import begun_priority
from tandem.v1 import worker_pb2
from tests.fake_engine import EOS, logprobs_of
from tests.worker_cluster import INCARNATION, PROMPT_TOKENS, FakeCluster, first_chunk, has_run, read, running_cluster

pytestmark = pytest.mark.integration


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with running_cluster() as made:
        yield made


class TestHandOff:
    async def test_both_workers_together_give_the_tokens_of_one(self, cluster: FakeCluster) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned))
        alone = await cluster.run(cluster.message())
        assert answer.token_ids == alone.token_ids == [6, 7, 8, 9]
        assert answer.text == alone.text == "w6 w7 w8 w9 "
        assert answer.end == alone.end == (FinishReason.LENGTH, None)
        assert [chunk.first_position for chunk in answer.chunks] == [0, 1, 2, 3]

    async def test_the_first_token_does_not_wait_for_the_blocks(self, cluster: FakeCluster) -> None:
        cluster.prefill.engine.publishes.clear()
        async with cluster.open(cluster.message(cluster.prefill.planned)) as stream:
            assert (await first_chunk(stream)).token_ids == (6,)
            assert cluster.decode.engine.requests == []
            cluster.prefill.engine.publishes.set()
            assert (await first_chunk(stream)).token_ids == (7,)
            while await read(stream) is not None:
                pass

    async def test_the_decode_engine_starts_from_prompt_and_first_token(self, cluster: FakeCluster) -> None:
        await cluster.run(cluster.message(cluster.prefill.planned))
        (prefill,), (decode,) = cluster.prefill.engine.requests, cluster.decode.engine.requests
        assert (prefill.token_ids, prefill.max_new_tokens) == ((1, 2, 3, 4, 5), 1)
        assert (decode.token_ids, decode.max_new_tokens) == ((1, 2, 3, 4, 5, 6), 3)

    async def test_priority_and_salt_reach_both_engines(self, cluster: FakeCluster) -> None:
        message = cluster.message(cluster.prefill.planned)
        message.priority, message.cache_salt = -3, "tenant"
        await cluster.run(message)
        (prefill,), (decode,) = cluster.prefill.engine.requests, cluster.decode.engine.requests
        assert (prefill.cache_salt, decode.cache_salt) == ("tenant", "tenant")
        assert begun_priority(-3) == decode.priority < prefill.priority < begun_priority(-2)

    async def test_eos_as_the_first_token_ends_it_without_a_decode_run(self, cluster: FakeCluster) -> None:
        cluster.prefill.engine.eos_after = PROMPT_TOKENS
        answer = await cluster.run(cluster.message(cluster.prefill.planned))
        assert (answer.token_ids, answer.text, answer.end) == ([EOS], "", (FinishReason.STOP, None))
        assert cluster.decode.engine.requests == []

    async def test_a_stop_token_as_the_first_token_ends_it_with_its_reason(self, cluster: FakeCluster) -> None:
        sampling = Sampling(max_tokens=4, stop_token_ids=(6,))
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=sampling))
        assert (answer.token_ids, answer.text, answer.end) == ([6], "", (FinishReason.STOP, "6"))
        assert cluster.decode.engine.requests == []

    async def test_one_token_needs_no_decode_run(self, cluster: FakeCluster) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=1)))
        assert (answer.token_ids, answer.text, answer.end) == ([6], "w6 ", (FinishReason.LENGTH, None))
        assert cluster.decode.engine.requests == []

    async def test_an_end_at_the_first_token_does_not_wait_for_the_blocks(self, cluster: FakeCluster) -> None:
        cluster.prefill.engine.publishes.clear()
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=1)))
        assert answer.token_ids == [6]

    async def test_a_stop_string_across_the_seam_is_seen(self, cluster: FakeCluster) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=9, stop=("w6 w7",))))
        assert (answer.token_ids, answer.text, answer.end) == ([6, 7], "", (FinishReason.STOP, "w6 w7"))

    async def test_a_stop_string_in_the_first_token_ends_it_without_a_decode_run(self, cluster: FakeCluster) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=9, stop=("6",))))
        assert (answer.token_ids, answer.text, answer.end) == ([6], "w", (FinishReason.STOP, "6"))
        assert cluster.decode.engine.requests == []

    @pytest.mark.parametrize("min_tokens", [0, 1, 2, 3])
    async def test_min_tokens_count_across_the_seam(self, cluster: FakeCluster, min_tokens: int) -> None:
        for worker in cluster.workers:
            worker.engine.eos_after = 0
        sampling = Sampling(max_tokens=9, min_tokens=min_tokens)
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=sampling))
        assert answer.token_ids == [*[6, 7, 8, 9][:min_tokens], EOS]
        assert answer.end == (FinishReason.STOP, None)

    @pytest.mark.parametrize("prefills", [0, 1])
    async def test_every_token_has_its_logprobs(self, cluster: FakeCluster, prefills: int) -> None:
        planned = [cluster.prefill.planned][:prefills]
        answer = await cluster.run(cluster.message(*planned, sampling=Sampling(max_tokens=3, logprobs=0)))
        assert [chunk.logprobs for chunk in answer.chunks] == [(logprobs_of(token_id),) for token_id in (6, 7, 8)]

    async def test_several_tokens_of_one_step_travel_together(self, cluster: FakeCluster) -> None:
        cluster.decode.engine.tokens_per_output = 2
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=6)))
        assert [chunk.token_ids for chunk in answer.chunks] == [(6,), (7, 8), (9, 10), (11,)]

    async def test_what_cannot_be_handed_off_exactly_stays_on_one_worker(self, cluster: FakeCluster) -> None:
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=Sampling(max_tokens=2, n=2)))
        assert cluster.prefill.engine.requests == []
        for choice in range(2):
            assert [token for chunk in answer.chunks if chunk.choice_index == choice for token in chunk.token_ids] == [6, 7]
        assert answer.receipt is not None
        assert (answer.receipt.one_worker_reason, answer.receipt.handed_off) == ("n", False)

    @pytest.mark.parametrize("resume", [(), (6, 7)])
    async def test_engines_are_told_which_tokens_are_output(self, cluster: FakeCluster, resume: tuple[int, ...]) -> None:
        sampling = Sampling(max_tokens=5, structured_output=StructuredOutput(kind=StructuredKind.REGEX, value=("a*",)))
        await cluster.run(cluster.message(cluster.prefill.planned, sampling=sampling, resume=resume))
        assert [request.resumed_tokens for request in cluster.prefill.engine.requests] == [len(resume)]
        assert [request.resumed_tokens for request in cluster.decode.engine.requests] == [len(resume) + 1]


class TestResume:
    @pytest.mark.parametrize("prefills", [0, 1])
    async def test_positions_and_text_go_on_after_the_resumed_tokens(self, cluster: FakeCluster, prefills: int) -> None:
        planned = [cluster.prefill.planned][:prefills]
        answer = await cluster.run(cluster.message(*planned, sampling=Sampling(max_tokens=5), resume=(6, 7)))
        assert [chunk.first_position for chunk in answer.chunks] == [2, 3, 4]
        assert (answer.token_ids, answer.text, answer.end) == ([8, 9, 10], "w8 w9 w10 ", (FinishReason.LENGTH, None))
        assert answer.chunks[-1].usage == Usage(prompt_tokens=5, output_tokens=5, cached_tokens=0)

    async def test_a_stop_string_may_begin_in_the_resumed_tokens(self, cluster: FakeCluster) -> None:
        sampling = Sampling(max_tokens=9, stop=("7 w8",))
        answer = await cluster.run(cluster.message(cluster.prefill.planned, sampling=sampling, resume=(6, 7)))
        # "w6 " has left with the resumed tokens, of "w7 w8 " only what stands before the stop string may.
        assert (answer.token_ids, answer.text, answer.end) == ([8], "w", (FinishReason.STOP, "7 w8"))

    @pytest.mark.parametrize("prefills", [0, 1])
    @pytest.mark.parametrize("resume", [(6,), (6, 7), (6, 7, 8)])
    async def test_min_tokens_count_the_resumed_ones(self, cluster: FakeCluster, resume: tuple[int, ...], prefills: int) -> None:
        for worker in cluster.workers:
            worker.engine.eos_after = 0
        message = cluster.message(*[cluster.prefill.planned][:prefills], sampling=Sampling(max_tokens=9, min_tokens=2), resume=resume)
        assert [*resume, *(await cluster.run(message)).token_ids] == [*([6, 7, 8][: max(2, len(resume))]), EOS]

    async def test_resumed_tokens_that_hold_a_stop_string_leave_nothing_to_do(self, cluster: FakeCluster) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            await cluster.run(cluster.message(sampling=Sampling(max_tokens=9, stop=("w7",)), resume=(6, 7, 8)))
        assert caught.value.field == "resume_token_ids"


class TestLostPrefillWorkers:
    async def closed(self, cluster: FakeCluster) -> PlannedWorker:
        await cluster.second.die()
        return cluster.second.planned

    async def test_the_next_of_the_plan_replaces_one_that_is_down(self, cluster: FakeCluster) -> None:
        answer = await cluster.run(cluster.message(await self.closed(cluster), cluster.prefill.planned))
        assert answer.token_ids == [6, 7, 8, 9]
        assert answer.receipt is not None
        assert answer.receipt.prefill_replica_id == "prefill-0"

    async def test_the_decode_worker_does_it_where_all_are_down(self, cluster: FakeCluster) -> None:
        message = cluster.message(await self.closed(cluster), await self.closed(cluster))
        cluster.decode.engine.gate.clear()
        running = asyncio.create_task(cluster.run(message))
        await has_run(cluster.decode)
        assert cluster.decode.state.pending_prefill_tokens == PROMPT_TOKENS
        cluster.decode.engine.gate.set()
        answer = await running
        assert answer.token_ids == [6, 7, 8, 9]
        assert answer.receipt is not None
        assert (answer.receipt.one_worker_reason, answer.receipt.handed_off) == ("prefill_lost", False)
        assert answer.receipt.prefill_replica_id == "decode-0"

    @pytest.mark.parametrize("error", [EngineError("broken"), OverloadedError("full", retry_after_s=1.0)], ids=["engine", "full"])
    async def test_one_that_fails_is_replaced(self, cluster: FakeCluster, error: TandemError) -> None:
        cluster.second.engine.error = error
        answer = await cluster.run(cluster.message(cluster.second.planned, cluster.prefill.planned))
        assert answer.token_ids == [6, 7, 8, 9]

    async def test_one_whose_engine_gives_up_is_replaced(self, cluster: FakeCluster) -> None:
        cluster.second.engine.abort_reason = FinishReason.ERROR
        answer = await cluster.run(cluster.message(cluster.second.planned, cluster.prefill.planned))
        assert answer.token_ids == [6, 7, 8, 9]

    async def test_one_that_dies_before_its_token_is_replaced(self, cluster: FakeCluster) -> None:
        cluster.second.engine.gate.clear()
        running = asyncio.create_task(cluster.run(cluster.message(cluster.second.planned, cluster.prefill.planned)))
        await has_run(cluster.second)
        await cluster.second.die()
        assert (await running).token_ids == [6, 7, 8, 9]

    async def test_one_that_dies_after_its_token_is_not_missed(self, cluster: FakeCluster) -> None:
        cluster.prefill.engine.publishes.clear()
        async with cluster.open(cluster.message(cluster.prefill.planned)) as stream:
            chunks = [await first_chunk(stream)]
            await cluster.prefill.die()
            while (chunk := await read(stream)) is not None:
                chunks.append(chunk)
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == [6, 7, 8, 9]

    async def test_one_that_falls_silent_after_its_token_is_not_waited_for(self, cluster: FakeCluster) -> None:
        cluster.prefill.engine.publishes.clear()
        assert (await cluster.run(cluster.message(cluster.prefill.planned))).token_ids == [6, 7, 8, 9]

    @pytest.mark.parametrize("error", [EngineError("broken"), InternalError("a bug")], ids=["engine", "bug"])
    async def test_a_failure_after_its_token_is_not_the_requests(self, cluster: FakeCluster, error: TandemError) -> None:
        cluster.prefill.engine.publish_error = error
        answer = await cluster.run(cluster.message(cluster.prefill.planned, cluster.second.planned))
        assert answer.token_ids == [6, 7, 8, 9]
        assert cluster.second.engine.requests == []

    async def test_what_it_says_of_the_request_itself_is_passed_on(self, cluster: FakeCluster) -> None:
        cluster.prefill.engine.error = InvalidRequestError("sampling.regex", "does not compile")
        with pytest.raises(InvalidRequestError, match="does not compile") as caught:
            await cluster.run(cluster.message(cluster.prefill.planned, cluster.second.planned))
        assert caught.value.field == "sampling.regex"
        assert cluster.second.engine.requests == cluster.decode.engine.requests == []

    async def test_one_that_takes_no_work_is_replaced(self, cluster: FakeCluster) -> None:
        cluster.second.state.drain()
        stale = replace(cluster.prefill.planned, incarnation=INCARNATION - 1)
        answer = await cluster.run(cluster.message(stale, cluster.second.planned, cluster.prefill.planned))
        assert answer.token_ids == [6, 7, 8, 9]
        assert answer.receipt is not None
        assert answer.receipt.prefill_replica_id == "prefill-0"

    @pytest.mark.parametrize("says", ["garbage", "nothing", "published first", "cancelled"])
    async def test_one_that_breaks_the_protocol_is_replaced(self, cluster: FakeCluster, says: str) -> None:
        class Odd:
            async def prefill(self, request: worker_pb2.PrefillRequest, its_call: ServerCall) -> None:
                match says:
                    case "garbage":
                        await its_call.write(b"\xff\xff")
                    case "published first":
                        await its_call.write(worker_pb2.PrefillResponse(published=worker_pb2.Published(published_blocks=1)))
                    case "cancelled":
                        raise CancelledRequestError

            async def refuse(self, request: object, its_call: ServerCall) -> None:
                raise AssertionError

            generate = watch = drain = refuse

        server = await start_server("127.0.0.1", 0, {"tandem.v1.Worker": service(worker_pb2, "Worker", Odd())})
        odd = PlannedWorker(replica_id=ReplicaId("odd"), incarnation=0, address=server.address)
        answer = await cluster.run(cluster.message(odd, cluster.prefill.planned))
        await server.stop(0.0)
        assert answer.token_ids == [6, 7, 8, 9]
