"""The router's shell against fake workers over real gRPC: workers that fail, hang, drain and come back."""

import asyncio
from dataclasses import replace

import pytest

from tandem.domain import ReplicaState
from tandem.errors import Code, InvalidRequestError, Reason, TandemError
from tandem.v1 import common_pb2
from tests.integration.fake_worker import FakeWorker, Faults, serve_workers
from tests.integration.router_shell import (
    Output,
    eventually,
    expected,
    message,
    refused,
    sample_request,
    serve_router,
)

pytestmark = pytest.mark.integration


async def test_a_stream_goes_on_on_another_worker_without_a_repeated_token() -> None:
    async with serve_workers(decode_0=Faults(error_at=3), decode_1=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert output.tokens == {0: expected(sample_request())}
        assert output.receipt is not None
        assert (output.receipt.attempts, output.receipt.output_tokens) == (2, 8)
        (second,) = workers["decode_1"].requests
        assert list(second.resume_token_ids) == expected(sample_request())[:3]
        assert second.attempt == 2
        assert router.metric("tandem_router_retries_total", reason="engine_failed") == 1
        await router.becomes_idle()


@pytest.mark.parametrize("error_at", [0, 3])
async def test_each_of_several_choices_goes_on_elsewhere_from_its_own_tokens(error_at: int) -> None:
    async with serve_workers(decode_0=Faults(error_at=error_at), decode_1=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message(sampling=common_pb2.Sampling(max_tokens=8, n=2, seed=0)))
        assert output.tokens == {0: expected(sample_request()), 1: expected(sample_request(), choice=1)}
        resumed = {request.sampling.seed: list(request.resume_token_ids) for request in workers["decode_1"].requests}
        assert resumed[0] == expected(sample_request())[:error_at]
        assert output.receipt is not None
        assert (output.receipt.attempts, output.receipt.output_tokens) == (2, 16)
        await router.becomes_idle()


async def test_the_failure_of_one_choice_ends_all() -> None:
    async with serve_workers(decode_0=Faults(skip_at=3), decode_1=Faults(skip_at=3)) as workers, serve_router(workers) as router:
        error = await refused(router, message(sampling=common_pb2.Sampling(max_tokens=8, n=3, seed=0)))
        assert error.reason is Reason.PROTOCOL
        await router.becomes_idle()


async def test_a_killed_worker_is_replaced_mid_stream() -> None:
    async with serve_workers(decode_0=Faults(hang_at=4), decode_1=Faults()) as workers, serve_router(workers) as router:
        call = asyncio.create_task(router.generate(message()))
        await workers["decode_0"].hangs.wait()
        await workers["decode_0"].stop()
        output = await call
        assert output.tokens == {0: expected(sample_request())}
        assert [lease.replica_id for lease in router.shell.core.fleet.leases] == ["decode_1"]


async def test_a_worker_that_hangs_is_replaced_when_its_watch_falls_silent() -> None:
    faults = Faults(hang_at=4)
    async with serve_workers(decode_0=faults, decode_1=Faults()) as workers, serve_router(workers) as router:
        call = asyncio.create_task(router.generate(message()))
        await workers["decode_0"].hangs.wait()
        faults.is_watch_silent = True
        output = await call
        assert output.tokens == {0: expected(sample_request())}
        await asyncio.wait_for(workers["decode_0"].was_cancelled.wait(), 5)
        assert router.metric("tandem_router_retries_total", reason="worker_lost") == 1


async def test_an_engine_that_breaks_off_is_a_failure_not_an_end() -> None:
    async with serve_workers(decode_0=Faults(break_off_at=2), decode_1=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert output.tokens == {0: expected(sample_request())}
        assert output.finish_reason == common_pb2.FINISH_REASON_LENGTH


async def test_the_retry_budget_ends_with_the_workers_error() -> None:
    faults = {f"decode_{number}": Faults(error_at=number) for number in range(4)}
    async with serve_workers(**faults) as workers, serve_router(workers) as router:
        error = await refused(router, message())
        assert (error.reason, error.code) == (Reason.ENGINE_FAILED, Code.UNAVAILABLE)
        assert [len(worker.requests) for worker in workers.values()] == [1, 1, 1, 0]


async def test_an_error_that_another_worker_would_repeat_is_passed_on() -> None:
    faults = Faults(error_at=2, error=InvalidRequestError("sampling.regex", "is not a regular expression"))
    async with serve_workers(decode_0=faults, decode_1=Faults()) as workers, serve_router(workers) as router:
        error = await refused(router, message())
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "sampling.regex")
        assert workers["decode_1"].requests == []


async def test_a_gap_is_an_error_and_not_passed_on() -> None:
    async with serve_workers(decode_0=Faults(skip_at=2), decode_1=Faults()) as workers, serve_router(workers) as router:
        output = Output()
        with pytest.raises(TandemError) as caught:
            await router.generate(message(), into=output)
        assert (caught.value.reason, output.tokens) == (Reason.PROTOCOL, {0: expected(sample_request())[:2]})


async def test_a_lost_end_after_the_last_token_is_made_good() -> None:
    async with serve_workers(decode_0=Faults(is_end_lost=True)) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert output.tokens == {0: expected(sample_request())}
        assert (output.finish_reason, output.usage is not None) == (common_pb2.FINISH_REASON_LENGTH, True)
        assert output.receipt is not None
        assert (output.receipt.decode_replica_id, output.receipt.prompt_tokens) == ("decode_0", 100)


async def test_a_failure_after_the_finish_reason_is_none_for_the_client() -> None:
    async with serve_workers(decode_0=Faults(is_receipt_lost=True), decode_1=Faults()) as workers, serve_router(workers) as router:
        output = await router.generate(message())
        assert output.tokens == {0: expected(sample_request())}
        assert output.receipt is not None
        assert output.receipt.attempts == 1
        assert workers["decode_1"].requests == []


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
        assert output.tokens == {0: expected(sample_request())}
        assert new.requests[0].incarnation == 2
