"""The router's shell against fake workers over real gRPC: streams, other services, books."""

import asyncio
import time
from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from router.instructions import Instruction
from tandem import rpc
from tandem.domain import ModelId
from tandem.errors import Code, EngineError, Reason, TandemError
from tandem.v1 import common_pb2, control_pb2, inference_pb2, router_pb2
from tests.integration.fake_worker import Faults, serve_workers
from tests.integration.router_shell import (
    CONFIG,
    Output,
    eventually,
    expected,
    message,
    sample_request,
    serve_router,
)
from tests.layers import ROOT

pytestmark = pytest.mark.integration

BUNDLED_MODEL = ROOT / "tandem" / "bundled_model"
CHAT = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="Hi")])


async def test_tokens_and_the_receipt_come_through() -> None:
    async with serve_workers(prefill_0=Faults(), decode_0=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message(), timeout_s=15.0)
        assert output.tokens == {0: expected(sample_request())}
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
        assert (output.messages, output.tokens) == (3, {0: expected(sample_request())})


async def test_several_choices_come_through_side_by_side() -> None:
    async with serve_workers(prefill_0=Faults(), decode_0=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message(sampling=common_pb2.Sampling(max_tokens=8, n=2, seed=0)))
        assert output.tokens == {0: expected(sample_request()), 1: expected(sample_request(), choice=1)}
        assert output.usage is not None
        assert output.usage.output_tokens == 16
        assert output.receipt is not None
        assert (output.receipt.request_id, output.receipt.output_tokens) == (workers["decode_0"].requests[0].request_id[:-2], 16)


async def test_the_last_message_of_several_choices_counts_the_output_of_all() -> None:
    async with serve_workers(prefill_0=Faults(), decode_0=Faults()) as workers, serve_router(workers) as router:
        for seed in range(10):
            output = await router.generate(message(sampling=common_pb2.Sampling(max_tokens=8, n=4, seed=seed)))
            assert output.usage is not None
            assert output.usage.output_tokens == 32


async def test_a_missing_receipt_is_filled_by_what_the_router_knows() -> None:
    async with serve_workers(decode_0=Faults(has_no_receipt=True)) as workers, serve_router(workers) as router:
        receipt = (await router.generate(message())).receipt
        assert receipt is not None
        assert (receipt.prompt_tokens, receipt.output_tokens, receipt.one_worker_reason) == (100, 8, "no_prefill_worker")


async def test_a_client_goes_on_with_the_tokens_it_has() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        whole = expected(sample_request())
        output = await router.generate(message(resume_token_ids=whole[:3], first_position=3))
        assert output.tokens == {0: whole[3:]}
        assert output.receipt is not None
        assert output.receipt.output_tokens == 8


async def test_without_decode_workers_a_prefill_worker_serves() -> None:
    async with serve_workers(prefill_0=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert output.tokens == {0: expected(sample_request())}
        assert output.receipt is not None
        assert output.receipt.one_worker_reason == "no_decode_worker"


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
                assert result.tokens == {0: expected(sample_request(20 + number))}
            else:
                assert isinstance(result, EngineError | asyncio.CancelledError | TandemError)
        assert sum(isinstance(result, Output) for result in results) >= 50
        await router.becomes_idle()
        await eventually(lambda: router.shell.core._ledger.settling() == 0)
        assert {status.predicted_work_s for status in router.shell.core.replicas(router.shell.clock())} == {0.0}
        assert router.metric("tandem_router_output_tokens_total", model="m") >= 400
        assert router.metric("tandem_router_ttft_seconds_count", model="m") >= 50


async def test_text_and_chat_are_tokenised_by_the_models_own_files() -> None:
    faults = Faults()
    async with serve_workers(decode_0=faults) as workers:
        state = workers["decode_0"].state
        state.lease = replace(state.lease, model_path=str(BUNDLED_MODEL))
        async with serve_router(workers) as router:
            for prompt in ({"text": "You may reproduce"}, {"chat": CHAT}):
                await router.generate(inference_pb2.GenerateRequest(sampling=common_pb2.Sampling(max_tokens=2), **prompt))
        ids = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json")).encode("You may reproduce").ids
        assert list(workers["decode_0"].requests[0].prompt_token_ids) == ids
        assert len(workers["decode_0"].requests[1].prompt_token_ids) > 3


async def test_a_stall_of_the_routers_own_loop_is_not_a_workers_silence() -> None:
    config = replace(CONFIG, watch_silence_s=1.5)
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers, config) as router:
        time.sleep(0.8)  # noqa: ASYNC251
        await asyncio.sleep(0.2)
        assert router.shell.core.fleet.leases
        assert len(router.shell.core.replicas(router.shell.clock())) == 1


async def test_a_worker_that_breaks_the_watch_protocol_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    async with serve_workers(decode_0=Faults()) as workers:
        state = workers["decode_0"].state
        state.lease = replace(state.lease, model=ModelId(""))
        with caplog.at_level("INFO", logger="router.workers"):
            async with serve_router(workers, is_waiting=False) as router:
                await eventually(lambda: "without replica id, model or engine limits" in caplog.text)
                assert router.shell.core.fleet.leases == ()


async def test_late_reports_are_dropped_and_counted() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:
        router.shell.report(workers["decode_0"].state.lease, 1, 0, None, ())
        assert router.metric("tandem_router_dropped_reports_total") == 1


async def test_a_bug_in_a_tick_is_counted_and_the_router_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers) as router:

        def fail(now_s: float) -> list[Instruction]:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(router.shell.core, "tick", fail)
            await eventually(lambda: router.metric("tandem_router_task_failures_total", task="tick"))
        assert (await router.generate(message())).tokens == {0: expected(sample_request())}
