"""Step-time coefficients in a real Redis: what routers publish is read, and runs out with them."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from router.coefficients import CoefficientPublisher, learnt
from router.pool_times import PoolKey
from router.predict import LoadPredictor
from tandem import convert, rpc
from tandem.domain import ModelId, Role
from tandem.errors import UnavailableError
from tandem.redis_coefficients import RedisCoefficients
from tandem.step_coefficients import Coefficients, PoolCoefficients
from tandem.step_cost import StepCost
from tandem.step_sample import StepSample
from tandem.telemetry import RouterMetrics
from tandem.v1 import worker_pb2
from tests.integration.fake_worker import FakeWorker
from tests.layers import ROOT
from tests.redis_process import Open, RedisProcess
from tests.samples import make_lease

pytestmark = pytest.mark.integration
pytest_plugins = ("tests.integration.redis_fixtures",)

KEY = "tandem:c1:coefficients"
COST = StepCost(base_s=1e-3, token_s=6.123456789e-5, pair_s=0.0, request_s=2e-4, kv_token_s=1e-8)
PREFILL = PoolCoefficients(model=ModelId("org/m:v1"), hardware="cpu x 2", role=Role.PREFILL, cost=COST, p90_ratio=1.2, samples=100)
DECODE = replace(PREFILL, role=Role.DECODE, samples=7)
NONE = Coefficients(pools=(), dropped=0)


@asynccontextmanager
async def opened(server: RedisProcess, cluster: str = "c1", **settings: float) -> AsyncIterator[RedisCoefficients]:
    coefficients = RedisCoefficients(server.url, cluster, **settings)
    yield coefficients
    await coefficients.close()


async def test_what_routers_publish_is_read_pool_by_pool_and_cluster_by_cluster(server: RedisProcess) -> None:
    async with opened(server) as one, opened(server, "c2") as other:
        assert await one.read_coefficients() == NONE
        await one.publish("router-a", [PREFILL, DECODE])
        better = replace(DECODE, samples=8, p90_ratio=1.5)
        await one.publish("router-b", [better])
        assert await one.read_coefficients() == Coefficients(pools=(better, PREFILL), dropped=0)
        await one.publish("router-b", [])
        assert (await one.read_coefficients()).pools == (DECODE, PREFILL)
        assert await other.read_coefficients() == NONE


async def test_what_a_router_has_not_renewed_runs_out_by_itself(server: RedisProcess, inside: Redis) -> None:
    async with opened(server, expiry_s=0.2) as brief, opened(server) as lasting:
        await lasting.publish("router-a", [PREFILL])
        await brief.publish("router-b", [DECODE])
        await asyncio.sleep(0.4)
        assert (await lasting.read_coefficients()).pools == (PREFILL,)
        assert await inside.hkeys(KEY) == ["router-a"]
        assert 0 < await inside.pttl(KEY) <= 30_000


async def test_what_no_router_of_ours_wrote_is_counted_and_hides_nothing(server: RedisProcess, inside: Redis) -> None:
    async with opened(server) as coefficients:
        await coefficients.publish("router-a", [PREFILL, replace(DECODE, p90_ratio=float("nan"))])
        await inside.hset(KEY, "router-b", "garbage")
        await inside.hset(KEY, "router-c", '99999999999999 {"version":2,"pools":[]}')
        assert await coefficients.read_coefficients() == Coefficients(pools=(PREFILL,), dropped=3)


async def test_nothing_is_left_of_a_cluster_that_was_erased(server: RedisProcess, open_register: Open, inside: Redis) -> None:
    async with opened(server) as coefficients:
        await coefficients.publish("router-a", [PREFILL])
        await open_register().erase()
        assert await inside.keys("tandem:c1:*") == []


async def test_a_router_publishes_what_it_learnt_and_goes_on_through_a_loss_of_the_register(server: RedisProcess) -> None:
    predictor = LoadPredictor()
    sample = StepSample(prefill_tokens=1000, prefill_pairs=500_000, decode_requests=0, kv_tokens=0, duration_s=0.1)
    predictor.pools.observe(PoolKey("m", "cpu", Role.PREFILL), "r1", [sample] * 40, 0.0)
    async with opened(server, timeout_s=0.5) as coefficients:
        publisher = CoefficientPublisher(predictor, coefficients, "router-a", RouterMetrics(CollectorRegistry()), Random(1))
        await publisher.look()
        read = await coefficients.read_coefficients()
        assert read == Coefficients(pools=learnt(predictor), dropped=0)
        server.kill()
        predictor.pools.observe(PoolKey("m", "cpu", Role.PREFILL), "r1", [sample], 1.0)
        await publisher.look()
        with pytest.raises(UnavailableError):
            await coefficients.read_coefficients()
        await server.start()
        await publisher.look()
        assert (await coefficients.read_coefficients()).pools[0].samples == 41


class SteppingWorker(FakeWorker):
    """Tells of a step of a tenth of a second again and again."""

    async def watch(self, request: worker_pb2.WatchRequest, call: rpc.ServerCall) -> None:
        lease, step = self.state.lease, worker_pb2.StepSample(prefill_tokens=1000, prefill_pairs=500_000, duration_s=0.1)
        for sequence in range(1 << 20):
            message = worker_pb2.WatchResponse(
                incarnation=lease.incarnation,
                sequence=sequence,
                lease=convert.lease_to_pb(lease),
                load=worker_pb2.WorkerLoad(),
                steps=[step] * 10,
            )
            await call.write(message)
            await asyncio.sleep(0.1)


async def test_the_router_process_publishes_what_its_workers_tell(server: RedisProcess) -> None:
    worker = SteppingWorker(make_lease("prefill-0", Role.PREFILL))
    await worker.start()
    assert worker.server is not None
    flags = ("--port=0", "--http-port=0", f"--redis-url={server.url}", "--cluster=c1", f"--worker={worker.server.address}")
    router = await asyncio.create_subprocess_exec(sys.executable, "-m", "router", *flags, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL)
    try:
        async with opened(server) as coefficients, asyncio.timeout(40):
            while not (read := await coefficients.read_coefficients()).pools:  # noqa: ASYNC110  # another process writes them
                await asyncio.sleep(0.1)
    finally:
        router.terminate()
        assert await asyncio.wait_for(router.wait(), 30) == 0
        await worker.stop()
    ((one,), dropped) = read.pools, read.dropped
    assert (one.model, one.role, dropped) == ("m", Role.PREFILL, 0)
    assert one.samples >= 32
    assert one.cost.step_s(1000, 500_000, 0, 0) == pytest.approx(0.1, rel=0.1)
