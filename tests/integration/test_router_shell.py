"""The router's shell against fake workers over real gRPC: streams, losses, cancels, deadlines, refusals."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tandem import rpc
from tandem.domain import ReplicaState, Request
from tandem.errors import Code, EngineError, InvalidRequestError, Reason, TandemError
from tandem.v1 import common_pb2, control_pb2, inference_pb2, router_pb2
from tests.integration.fake_worker import FakeWorker, Faults, serve_workers
from tests.integration.router_shell import CONFIG, GENERATE, Output, Router, eventually, expected, message, serve_router
from tests.samples import make_request

pytestmark = pytest.mark.integration


def _request(prompt_tokens: int = 100, max_tokens: int = 8) -> Request:
    request = make_request(prompt_tokens=prompt_tokens)
    return replace(request, sampling=replace(request.sampling, max_tokens=max_tokens))


async def _refused(router: Router, request: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0) -> TandemError:
    with pytest.raises(TandemError) as caught:
        await router.generate(request, timeout_s)
    await router.becomes_idle()
    return caught.value


async def test_tokens_and_the_receipt_come_through() -> None:
    async with serve_workers(prefill_0=Faults(), decode_0=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message(), timeout_s=15.0)
        assert output.tokens == {0: expected(_request())}
        assert output.finish_reason == common_pb2.FINISH_REASON_LENGTH
        receipt = output.receipt
        assert receipt is not None
        assert receipt.ttft_s == pytest.approx(receipt.queue_s + receipt.dispatch_s + receipt.prefill_s)
        assert 0.0 < receipt.ttft_s <= receipt.e2e_s
        assert (receipt.attempts, receipt.output_tokens, receipt.decode_replica_id) == (1, 8, "decode_0")
        actual = {term.name: term.actual for term in receipt.predicted}
        assert actual["ttft_s"] == receipt.ttft_s
        assert actual["tpot_s"] is not None
        (sent,) = workers["decode_0"].requests
        assert [worker.replica_id for worker in sent.plan.prefill] == ["prefill_0"]
        assert (sent.attempt, sent.incarnation, sent.plan.manifest.prompt_blocks) == (1, 1, 3)
        assert 0.0 < sent.plan.deadline_remaining_s < 15.0
        remaining_s = workers["decode_0"].time_remaining_s
        assert remaining_s is not None
        assert 0.0 < remaining_s < 15.0
        await router.becomes_idle()


async def test_workers_bytes_are_passed_on_unchanged() -> None:
    async with serve_workers(decode_0=Faults(coalesced_tokens=3)) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert (output.messages, output.tokens) == (3, {0: expected(_request())})


async def test_several_choices_come_through_side_by_side() -> None:
    async with serve_workers(prefill_0=Faults(), decode_0=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message(sampling=common_pb2.Sampling(max_tokens=8, n=2)))
        assert output.tokens == {0: expected(_request()), 1: expected(_request(), choice=1)}
        assert output.receipt is not None
        assert output.receipt.one_worker_reason == "n"


async def test_a_stream_goes_on_on_another_worker_without_a_repeated_token() -> None:
    async with serve_workers(decode_0=Faults(error_at=3), decode_1=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert output.tokens == {0: expected(_request())}
        assert output.receipt is not None
        assert (output.receipt.attempts, output.receipt.output_tokens) == (2, 8)
        (second,) = workers["decode_1"].requests
        assert list(second.resume_token_ids) == expected(_request())[:3]
        assert second.attempt == 2
        assert router.metric("tandem_router_retries_total", reason="engine_failed") == 1
        await router.becomes_idle()


async def test_a_worker_that_fails_before_its_first_token_is_replaced() -> None:
    async with serve_workers(decode_0=Faults(error_at=0), decode_1=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message(sampling=common_pb2.Sampling(max_tokens=8, n=2)))
        assert output.tokens == {0: expected(_request()), 1: expected(_request(), choice=1)}


async def test_several_choices_are_not_continued_elsewhere() -> None:
    async with serve_workers(decode_0=Faults(error_at=3), decode_1=Faults()) as workers, serve_router(workers) as router:
        error = await _refused(router, message(sampling=common_pb2.Sampling(max_tokens=8, n=2)))
        assert error.reason is Reason.ENGINE_FAILED
        assert workers["decode_1"].requests == []


async def test_a_killed_worker_is_replaced_mid_stream() -> None:
    async with serve_workers(decode_0=Faults(hang_at=4), decode_1=Faults()) as workers, serve_router(workers) as router:
        call = asyncio.create_task(router.generate(message()))
        await workers["decode_0"].hangs.wait()
        await workers["decode_0"].stop()
        output = await call
        assert output.tokens == {0: expected(_request())}
        assert [lease.replica_id for lease in router.shell.core.fleet.leases] == ["decode_1"]


async def test_a_worker_that_hangs_is_replaced_when_its_watch_falls_silent() -> None:
    faults = Faults(hang_at=4)
    async with serve_workers(decode_0=faults, decode_1=Faults()) as workers, serve_router(workers) as router:
        call = asyncio.create_task(router.generate(message()))
        await workers["decode_0"].hangs.wait()
        faults.is_watch_silent = True
        output = await call
        assert output.tokens == {0: expected(_request())}
        await asyncio.wait_for(workers["decode_0"].was_cancelled.wait(), 5)
        assert router.metric("tandem_router_retries_total", reason="worker_lost") == 1


async def test_an_engine_that_breaks_off_is_a_failure_not_an_end() -> None:
    async with serve_workers(decode_0=Faults(break_off_at=2), decode_1=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert output.tokens == {0: expected(_request())}
        assert output.finish_reason == common_pb2.FINISH_REASON_LENGTH


async def test_the_retry_budget_ends_with_the_workers_error() -> None:
    faults = {f"decode_{number}": Faults(error_at=number) for number in range(4)}
    async with serve_workers(**faults) as workers, serve_router(workers) as router:
        error = await _refused(router, message())
        assert (error.reason, error.code) == (Reason.ENGINE_FAILED, Code.UNAVAILABLE)
        assert [len(worker.requests) for worker in workers.values()] == [1, 1, 1, 0]


async def test_an_error_that_another_worker_would_repeat_is_passed_on() -> None:
    faults = Faults(error_at=2, error=InvalidRequestError("sampling.regex", "is not a regular expression"))
    async with serve_workers(decode_0=faults, decode_1=Faults()) as workers, serve_router(workers) as router:
        error = await _refused(router, message())
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "sampling.regex")
        assert workers["decode_1"].requests == []


async def test_a_gap_is_an_error_and_not_passed_on() -> None:
    async with serve_workers(decode_0=Faults(skip_at=2), decode_1=Faults()) as workers, serve_router(workers) as router:
        output = Output()
        with pytest.raises(TandemError) as caught:
            await router.generate(message(), into=output)
        assert (caught.value.reason, output.tokens) == (Reason.PROTOCOL, {0: expected(_request())[:2]})


async def test_a_lost_end_after_the_last_token_is_made_good() -> None:
    async with serve_workers(decode_0=Faults(is_end_lost=True)) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert output.tokens == {0: expected(_request())}
        assert (output.finish_reason, output.usage is not None) == (common_pb2.FINISH_REASON_LENGTH, True)
        assert output.receipt is not None
        assert (output.receipt.decode_replica_id, output.receipt.prompt_tokens) == ("decode_0", 100)


async def test_a_missing_receipt_is_filled_by_what_the_router_knows() -> None:
    async with serve_workers(decode_0=Faults(has_no_receipt=True)) as workers, serve_router(workers) as router:
        receipt = (await router.generate(message())).receipt
        assert receipt is not None
        assert (receipt.prompt_tokens, receipt.output_tokens, receipt.one_worker_reason) == (100, 8, "no_prefill_worker")


async def test_a_client_goes_on_with_the_tokens_it_has() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        whole = expected(_request())
        output = await router.generate(message(resume_token_ids=whole[:3], first_position=3))
        assert output.tokens == {0: whole[3:]}
        assert output.receipt is not None
        assert output.receipt.output_tokens == 8


async def test_without_decode_workers_a_prefill_worker_serves() -> None:
    async with serve_workers(prefill_0=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert output.tokens == {0: expected(_request())}
        assert output.receipt is not None
        assert output.receipt.one_worker_reason == "no_decode_worker"


async def test_a_draining_worker_gets_nothing_new() -> None:
    async with serve_workers(decode_0=Faults(), decode_1=Faults()) as workers, serve_router(workers) as router:
        workers["decode_0"].state.drain()
        await eventually(lambda: router.shell.core.fleet.leases[0].state is ReplicaState.DRAINING)
        await router.generate(message())
        assert workers["decode_0"].requests == []


async def test_a_restarted_worker_is_found_again() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        old = workers["decode_0"]
        assert old.server is not None
        await old.stop()
        call = asyncio.create_task(router.generate(message()))
        new = FakeWorker(replace(old.state.lease, incarnation=2))
        await new.start(old.server.port)
        output = await call
        await new.stop()
        assert output.tokens == {0: expected(_request())}
        assert new.requests[0].incarnation == 2


# Cancels and deadlines.


async def _cancel_when(router: Router, is_there: Callable[[], bool], request: inference_pb2.GenerateRequest) -> None:
    call = asyncio.create_task(router.generate(request))
    await eventually(is_there)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await router.becomes_idle()


@pytest.mark.parametrize("hang_at", [0, 4])
async def test_a_cancel_frees_router_and_worker(hang_at: int) -> None:
    async with serve_workers(decode_0=Faults(hang_at=hang_at)) as workers, serve_router(workers) as router:
        worker = workers["decode_0"]
        await _cancel_when(router, worker.hangs.is_set, message())
        await asyncio.wait_for(worker.was_cancelled.wait(), 5)
        assert worker.state.running_requests == 0
        assert router.metric("tandem_router_requests_total", model="m", outcome="client_cancelled") == 1


async def test_a_cancel_in_the_queue_frees_the_place() -> None:
    config = replace(CONFIG, max_running_requests=1)
    async with serve_workers(decode_0=Faults(hang_at=4)) as workers, serve_router(workers, config) as router:
        first = asyncio.create_task(router.generate(message()))
        await workers["decode_0"].hangs.wait()
        second = asyncio.create_task(router.generate(message()))
        await eventually(lambda: router.shell.core.queued_requests == 1)
        second.cancel()
        await eventually(lambda: router.shell.core.queued_requests == 0)
        assert len(workers["decode_0"].requests) == 1
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await router.becomes_idle()


async def test_a_cancel_while_waiting_for_the_first_worker_frees_the_call() -> None:
    config = replace(CONFIG, no_replica_wait_s=60.0)
    async with serve_router({}, config) as router:
        await _cancel_when(router, lambda: router.shell._calls == 1, message())


async def test_the_deadline_ends_a_stream_that_hangs() -> None:
    async with serve_workers(decode_0=Faults(hang_at=4)) as workers, serve_router(workers) as router:
        error = await _refused(router, message(), timeout_s=0.5)
        assert error.code is Code.DEADLINE_EXCEEDED
        await asyncio.wait_for(workers["decode_0"].was_cancelled.wait(), 5)


async def test_the_deadline_ends_a_wait_in_the_queue() -> None:
    config = replace(CONFIG, max_running_requests=1)
    async with serve_workers(decode_0=Faults(hang_at=4)) as workers, serve_router(workers, config) as router:
        first = asyncio.create_task(router.generate(message()))
        await workers["decode_0"].hangs.wait()
        with pytest.raises(TandemError) as caught:
            await router.generate(message(), timeout_s=0.3)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        assert len(workers["decode_0"].requests) == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await router.becomes_idle()


async def test_a_deadline_that_has_passed_dispatches_nothing() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await _refused(router, message(), timeout_s=0.0)
        assert error.code is Code.DEADLINE_EXCEEDED
        assert workers["decode_0"].requests == []


# Refusals.


async def test_without_any_worker_the_router_answers_unavailable_in_time() -> None:
    async with serve_router({}) as router:
        error = await _refused(router, message())
        assert (error.reason, error.retryable) == (Reason.NO_REPLICA, True)


async def test_the_first_worker_is_waited_for() -> None:
    async with serve_workers(decode_0=Faults()) as workers:
        config = replace(CONFIG, no_replica_wait_s=10.0)
        async with serve_router(workers, config, is_waiting=False) as router:
            assert (await router.generate(message())).tokens == {0: expected(_request())}


async def test_a_model_without_replicas_is_unavailable_after_a_wait() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        await workers["decode_0"].stop()
        error = await _refused(router, message())
        assert error.reason is Reason.NO_REPLICA


async def test_an_unknown_model_is_refused_with_the_names() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await _refused(router, message(model="gpt-17"))
        assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.UNKNOWN_MODEL)
        assert "served are: m" in error.message
        assert (await router.generate(message(model=""))).tokens
        assert router.metric("tandem_router_requests_total", model="unknown", outcome="unknown_model") == 1


BAD_REQUESTS = {
    "bad token id": (message(token_ids=inference_pb2.TokenIds(ids=[1, 2048])), "prompt.token_ids"),
    "no prompt": (inference_pb2.GenerateRequest(model="m"), "prompt"),
    "empty token ids": (message(prompt_tokens=0), "prompt"),
    "empty text": (inference_pb2.GenerateRequest(model="m", text=""), "prompt"),
    "empty chat": (inference_pb2.GenerateRequest(model="m", chat=inference_pb2.ChatMessages()), "prompt"),
    "too long": (message(prompt_tokens=1024), "prompt"),
    "bad first position": (message(first_position=1), "first_position"),
    "bad resumed id": (message(resume_token_ids=[5000], first_position=1), "resume_token_ids"),
    "several resumed": (
        message(resume_token_ids=[5], first_position=1, sampling=common_pb2.Sampling(max_tokens=8, n=2)),
        "resume_token_ids",
    ),
    "bad sampling": (message(sampling=common_pb2.Sampling(temperature=-1.0)), "sampling.temperature"),
    "long id": (message(request_id="x" * 129), "request_id"),
    "odd id": (message(request_id="a\nb"), "request_id"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_a_bad_request_is_refused_by_field(name: str) -> None:
    request, field = BAD_REQUESTS[name]
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await _refused(router, request)
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, field)
        assert workers["decode_0"].requests == []


async def test_text_for_a_model_without_tokenizer_says_what_to_send() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await _refused(router, inference_pb2.GenerateRequest(model="m", text="hello"))
        assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, Reason.BAD_MODEL)


async def test_an_id_in_use_is_refused_and_its_owner_served() -> None:
    faults = Faults(hang_at=4)
    async with serve_workers(decode_0=faults) as workers, serve_router(workers) as router:
        output = Output()
        first = asyncio.create_task(router.generate(message(request_id="mine"), into=output))
        await workers["decode_0"].hangs.wait()
        with pytest.raises(TandemError) as caught:
            await router.generate(message(request_id="mine"))
        assert caught.value.field == "request_id"
        assert router.shell.core.running_requests == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await router.becomes_idle()
        faults.hang_at = None
        assert (await router.generate(message(request_id="mine"))).tokens == {0: expected(_request())}
        assert [sent.request_id for sent in workers["decode_0"].requests] == ["mine", "mine"]


async def test_bytes_that_are_no_message_are_refused() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        invalid_utf8 = b"\x12\x02\xff\xfe"  # field 2, model
        with pytest.raises(TandemError) as caught:
            async with rpc.open_stream(router.channel, GENERATE, invalid_utf8, timeout_s=10) as stream:
                await stream.read()
        assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, Reason.BAD_BYTES)


async def test_a_message_of_100_mb_is_refused_and_the_router_lives() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        error = await _refused(router, inference_pb2.GenerateRequest(model="m", text="x" * 100_000_000))
        assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, Reason.MESSAGE_TOO_LARGE)
        assert (await router.generate(message())).tokens == {0: expected(_request())}


async def test_a_full_queue_says_when_to_come_back() -> None:
    config = replace(CONFIG, max_running_requests=1, max_queued_requests=1)
    async with serve_workers(decode_0=Faults(hang_at=4)) as workers, serve_router(workers, config) as router:
        calls = [asyncio.create_task(router.generate(message())) for _ in range(2)]
        await eventually(lambda: router.shell.core.queued_requests == 1)
        stub = router.channel.unary_stream(f"/{GENERATE}", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub(message().SerializeToString())))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = cast("Iterable[tuple[str, bytes]]", caught.value.trailing_metadata() or ())
        details = status_pb2.Status.FromString(dict(trailing)["grpc-status-details-bin"]).details
        (retry,) = [detail for detail in details if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
        assert error_details_pb2.RetryInfo.FromString(retry.value).retry_delay.ToNanoseconds() > 0
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await router.becomes_idle()


# The other services, and the books.


async def test_models_and_status_are_told() -> None:
    async with serve_workers(prefill_0=Faults(), decode_0=Faults(), decode_1=Faults()) as workers, serve_router(workers) as router:
        models = await rpc.call(
            router.channel,
            "tandem.v1.Inference/ListModels",
            inference_pb2.ListModelsRequest(),
            inference_pb2.ListModelsResponse,
            timeout_s=5,
        )
        (model,) = models.models
        assert (model.id, model.prefill_replicas, model.decode_replicas, model.block_size_tokens) == ("m", 1, 2, 32)
        await workers["decode_1"].stop()
        await eventually(lambda: len(router.shell.core.fleet.leases) == 2)
        status = await rpc.call(
            router.channel, "tandem.v1.Control/GetStatus", control_pb2.GetStatusRequest(), control_pb2.GetStatusResponse, timeout_s=5
        )
        assert {replica.lease.replica_id: replica.is_reachable for replica in status.replicas} == {
            "prefill_0": True,
            "decode_0": True,
            "decode_1": False,
        }


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("Router/Route", router_pb2.RouteRequest),
        ("Router/ReportOutcome", router_pb2.ReportOutcomeRequest),
        ("Router/Explain", router_pb2.ExplainRequest),
        ("Control/SetTarget", control_pb2.SetTargetRequest),
        ("Control/DrainReplica", control_pb2.DrainReplicaRequest),
    ],
)
async def test_what_is_not_built_says_so(method: str, request_type: type[router_pb2.RouteRequest]) -> None:
    async with serve_router({}) as router:
        with pytest.raises(TandemError) as caught:
            await rpc.call(router.channel, f"tandem.v1.{method}", request_type(), router_pb2.RouteResponse, timeout_s=5)
        assert (caught.value.code, caught.value.reason) == (Code.UNIMPLEMENTED, Reason.NOT_BUILT)


async def test_many_requests_at_once_over_failing_workers_leave_nothing_behind() -> None:
    faults = {"prefill_0": Faults(), "decode_0": Faults(error_at=5), "decode_1": Faults(), "decode_2": Faults()}
    config = replace(CONFIG, max_running_requests=8)
    async with serve_workers(**faults) as workers, serve_router(workers, config) as router:
        calls = [asyncio.create_task(router.generate(message(prompt_tokens=20 + number))) for number in range(60)]
        await asyncio.sleep(0.05)
        for call in calls[::7]:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        for number, result in enumerate(results):
            if isinstance(result, Output):
                assert result.tokens == {0: expected(_request(20 + number))}
            else:
                assert isinstance(result, EngineError | asyncio.CancelledError | TandemError)
        assert sum(isinstance(result, Output) for result in results) >= 50
        await router.becomes_idle()
        await eventually(lambda: router.shell.core._ledger.settling() == 0)
        assert {status.predicted_work_s for status in router.shell.core.replicas()} == {0.0}
        assert router.metric("tandem_router_output_tokens_total", model="m") >= 400
        assert router.metric("tandem_router_ttft_seconds_count", model="m") >= 50
