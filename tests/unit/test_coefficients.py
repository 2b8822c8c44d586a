"""What a router publishes of its step times, and when."""

import asyncio
import logging
from collections.abc import Sequence
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from router.coefficients import CoefficientPublisher, learnt
from router.pool_times import PoolKey
from router.predict import LoadPredictor
from tandem.domain import Role
from tandem.errors import Reason, UnavailableError
from tandem.step_coefficients import PoolCoefficients
from tandem.step_sample import StepSample
from tandem.telemetry import RouterMetrics

PREFILL = PoolKey("m", "cpu", Role.PREFILL)


class Bench:
    """A publisher over a register that can be away or broken, at a time that tests set."""

    def __init__(self) -> None:
        self.predictor = LoadPredictor()
        self.written = list[tuple[PoolCoefficients, ...]]()
        self.failure: Exception | None = None
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        self.publisher = CoefficientPublisher(self.predictor, self, "router-1", RouterMetrics(self.registry), Random(1), lambda: self.now_s)

    async def publish(self, router_id: str, pools: Sequence[PoolCoefficients]) -> None:
        assert router_id == "router-1"
        if self.failure is not None:
            raise self.failure
        self.written.append(tuple(pools))

    async def close(self) -> None:
        raise AssertionError

    def steps(self, count: int = 40, pool: PoolKey = PREFILL, seconds: float = 0.1) -> None:
        sample = StepSample(prefill_tokens=1000, prefill_pairs=500_000, decode_requests=0, kv_tokens=0, duration_s=seconds)
        self.predictor.pools.observe(pool, "r1", [sample] * count, self.now_s)


def test_a_pool_is_published_once_it_is_learnt() -> None:
    bench = Bench()
    bench.steps(10)
    assert learnt(bench.predictor) == ()
    bench.steps(30)
    (one,) = learnt(bench.predictor)
    assert (one.model, one.hardware, one.role, one.samples) == ("m", "cpu", "prefill", 40)
    assert one.cost.step_s(1000, 500_000, 0, 0) == pytest.approx(0.1, rel=0.1)
    assert one.p90_ratio > 0


def test_looking_changes_nothing_that_decisions_read() -> None:
    benches = Bench(), Bench()
    decode = PoolKey("m", "cpu", Role.DECODE)
    for number, bench in enumerate(benches):
        for count in range(200):
            bench.steps(1, seconds=0.1 + 1e-4 * count)
            sample = StepSample(prefill_tokens=0, prefill_pairs=0, decode_requests=1 + count % 8, kv_tokens=100 * count, duration_s=5e-3)
            bench.predictor.pools.observe(decode, "r2", [sample], 0.0)
            if number:
                learnt(bench.predictor)
            if count % 50 == 49:
                bench.predictor.pools.cost(PREFILL)
    alone, watched = (bench.predictor.pools.cost(PREFILL) for bench in benches)
    assert alone == watched


async def test_what_has_changed_is_written_and_the_rest_only_before_it_runs_out() -> None:
    bench = Bench()
    await bench.publisher.look()
    assert bench.written == []
    bench.steps()
    for now_s, writes in ((5.0, 1), (10.0, 1), (15.0, 2), (20.0, 2)):
        bench.now_s = now_s
        await bench.publisher.look()
        assert len(bench.written) == writes
    bench.steps(1)
    await bench.publisher.look()
    assert len(bench.written) == 3
    assert bench.written[-1][0].samples == 41


async def test_a_register_that_is_away_is_one_line_and_written_once_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench()
    bench.steps()
    bench.failure = UnavailableError("away", reason=Reason.NO_REGISTER)
    for _ in range(3):
        await bench.publisher.look()
    assert [record.message for record in caplog.records] == ["coefficients_not_published error=away"]
    bench.failure = None
    await bench.publisher.look()
    assert len(bench.written) == 1
    assert caplog.records[-1].message == "coefficients_published_again pools=1"


async def test_a_bug_does_not_end_the_task() -> None:
    bench = Bench()
    bench.steps()
    bench.failure = ValueError("bug")
    task = asyncio.create_task(bench.publisher.run())
    await asyncio.sleep(0)
    assert bench.registry.get_sample_value("tandem_router_task_failures_total", {"task": "coefficients"}) == 1
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
