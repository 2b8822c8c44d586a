"""What the command line asks of a router: targets set by hand, drains, status; and what it refuses."""

import asyncio
import math
from random import Random
from types import SimpleNamespace
from typing import cast

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.interval import PredictionKind
from router.register_view import RegisterView
from router.server import ControlService
from router.shell import RouterShell
from router.workers import Workers
from tandem.cluster_view import PredictionScore, status_from_pb, targets_to_pb
from tandem.convert import lease_to_pb
from tandem.deadline import Deadline
from tandem.domain import ModelId, ReplicaId, ReplicaTarget, Role
from tandem.errors import InvalidRequestError, NotFoundError, PreconditionError, Reason, UnavailableError
from tandem.membership import ServedModel, Snapshot
from tandem.rpc import ServerCall
from tandem.step_sample import StepSample
from tandem.telemetry import RouterMetrics
from tandem.v1 import common_pb2, control_pb2, worker_pb2
from tests.fake_channel import FakeChannel
from tests.memory_register import MemoryRegister
from tests.register_bench import PREFILL
from tests.samples import make_lease

CALL = cast("ServerCall", SimpleNamespace(metadata={}))  # none of these handlers asks its call for more
ROLE = common_pb2.ROLE_PREFILL


class Bench:
    """A router that serves these models, and a register with them where `has_register`."""

    def __init__(self, *models: str, has_register: bool = True) -> None:
        config = RouterConfig(cluster="c", router_id="r")
        self.shell = RouterShell(config, RouterCore(config, Random(1)), RouterMetrics(CollectorRegistry()), lambda: 0.0)
        self.register = MemoryRegister()
        self.workers = Workers([], self.shell, Random(2), lambda _: cast("grpc.aio.Channel", FakeChannel()))
        self.view = RegisterView(self.register, self.shell, self.workers, lambda: 0.0)
        served = tuple(ServedModel(model=ModelId(model), is_held=True) for model in models)
        self.view.take(Snapshot(generation="g", members=(), models=served, targets=(PREFILL,)))
        self.service = ControlService(self.shell, self.workers, self.view if has_register else None)

    async def set(self, *targets: control_pb2.Target) -> tuple[ReplicaTarget, ...]:
        """What is set by hand after this call."""
        await self.service.set_target(control_pb2.SetTargetRequest(targets=targets), CALL)
        return await self.register.manual_targets()


def target(model: str = "m", role: int = ROLE, **values: float) -> control_pb2.Target:
    return control_pb2.Target(model=model, role=role, **values)  # type: ignore[arg-type]


async def test_targets_are_written_to_the_register() -> None:
    assert await Bench("m", "n").set(target(replicas=2), target("n", expires_in_s=5.0)) == (
        ReplicaTarget(model=ModelId("m"), role=Role.PREFILL, replicas=2),
        ReplicaTarget(model=ModelId("n"), role=Role.PREFILL, replicas=0, expires_in_s=5.0),
    )


async def test_the_only_model_needs_no_name() -> None:
    assert [item.model for item in await Bench("m").set(target("", replicas=1))] == ["m"]


async def test_a_pool_is_given_back() -> None:
    bench = Bench("m")
    await bench.set(target(replicas=2))
    message = targets_to_pb([ReplicaTarget(model=ModelId("m"), role=Role.PREFILL, replicas=-1)])
    await bench.service.set_target(message, CALL)
    assert await bench.register.manual_targets() == ()


async def test_of_several_models_one_must_be_named() -> None:
    with pytest.raises(InvalidRequestError, match="must name one of: m, n"):
        await Bench("m", "n").set(target(""))


@pytest.mark.parametrize(("models", "words"), [(("m", "n"), "served are: m, n"), ((), "served are: none yet")])
async def test_a_model_that_is_not_configured_is_refused(models: tuple[str, ...], words: str) -> None:
    with pytest.raises(NotFoundError, match=words) as caught:
        await Bench(*models).set(target("x"))
    assert caught.value.reason is Reason.UNKNOWN_MODEL


@pytest.mark.parametrize(
    "wrong",
    [
        target(expires_in_s=-1.0),
        target(expires_in_s=math.nan),
        target(expires_in_s=math.inf),
        target(role=common_pb2.ROLE_UNSPECIFIED),
    ],
    ids=["past", "nan", "for ever", "no role"],
)
async def test_a_wrong_target_is_refused_and_none_of_the_others_set(wrong: control_pb2.Target) -> None:
    bench = Bench("m")
    with pytest.raises(InvalidRequestError):
        await bench.set(target(replicas=1), wrong)
    assert await bench.register.manual_targets() == ()


async def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="must not be empty"):
        await Bench("m").set()


async def test_a_router_without_a_register_says_that_nothing_is_scaled() -> None:
    with pytest.raises(PreconditionError) as caught:
        await Bench("m", has_register=False).set(target())
    assert caught.value.reason is Reason.NO_REGISTER


async def test_a_register_that_does_not_answer_is_unavailable() -> None:
    bench = Bench("m")
    bench.register.is_available = False
    with pytest.raises(UnavailableError):
        await bench.set(target())


async def test_the_status_tells_targets_and_what_waits_for_each_model() -> None:
    bench = Bench("m", "n")
    message = await bench.service.get_status(control_pb2.GetStatusRequest(), CALL)
    assert [(queue.model, queue.queued_requests, queue.requests_total) for queue in message.queues] == [("m", 0, 0), ("n", 0, 0)]
    status = status_from_pb(message)
    assert (status.cluster, status.router_id, status.targets) == ("c", "r", (PREFILL,))


async def test_the_status_counts_requests_that_are_held_for_a_models_first_replica() -> None:
    bench = Bench("m")
    held = asyncio.create_task(bench.shell.lease_for("m", Deadline(None)))
    for _ in range(5):
        await asyncio.sleep(0)
    message = await bench.service.get_status(control_pb2.GetStatusRequest(), CALL)
    assert (message.queued_requests, message.queues[0].queued_requests) == (1, 1)
    bench.shell.replica_seen(make_lease())
    await held
    assert (await bench.service.get_status(control_pb2.GetStatusRequest(), CALL)).queued_requests == 0


async def test_the_status_tells_what_predictions_were_worth_and_whether_they_are_trusted() -> None:
    bench = Bench("m", "n")
    scores = bench.shell.core.predictor.scores
    for _ in range(60):
        scores.observe(PredictionKind.PREFILL, "n", predicted=1.0, q90=1.5, actual=4.0, now_s=0.0)
    scores.observe(PredictionKind.TPOT, "m", predicted=0.02, q90=0.03, actual=0.025, now_s=0.0)
    first, second = status_from_pb(await bench.service.get_status(control_pb2.GetStatusRequest(), CALL)).predictions
    assert (first.model, first.is_trusted, second.model, second.is_trusted) == ("m", True, "n", False)
    assert second.scores == (
        PredictionScore(
            kind="prefill",
            outcomes_total=60,
            window_outcomes=60,
            predicted_p50=1.0,
            actual_p50=4.0,
            mean_error_fraction=0.75,
            q90_coverage_fraction=0.0,
        ),
    )
    assert [(score.kind, score.predicted_p50, score.actual_p50, score.q90_coverage_fraction) for score in first.scores] == [
        ("tpot", 0.02, 0.025, 1.0)
    ]


async def test_a_model_scaled_to_zero_by_hand_can_be_given_replicas_again() -> None:
    bench = Bench()
    bench.view.take(Snapshot(generation="g", members=(), models=(ServedModel(model=ModelId("m"), is_held=False),)))
    assert [item.replicas for item in await bench.set(target(replicas=1))] == [1]


async def test_the_status_of_a_router_without_a_register_has_no_targets() -> None:
    message = await Bench("m", has_register=False).service.get_status(control_pb2.GetStatusRequest(), CALL)
    assert list(message.targets) == []


async def test_a_replica_that_is_not_known_cannot_be_drained() -> None:
    bench = Bench("m")
    for words in ("known are: none", "known are: decode-0"):
        with pytest.raises(NotFoundError, match=words) as caught:
            await bench.service.drain_replica(control_pb2.DrainReplicaRequest(replica_id="x"), CALL)
        assert caught.value.reason is Reason.UNKNOWN_REPLICA
        bench.shell.replica_seen(make_lease())


async def test_a_replica_that_has_just_been_lost_cannot_be_drained() -> None:
    bench = Bench("m")
    bench.shell.replica_seen(make_lease())
    with pytest.raises(UnavailableError) as caught:
        await bench.service.drain_replica(control_pb2.DrainReplicaRequest(replica_id="decode-0"), CALL)
    assert caught.value.reason is Reason.WORKER_LOST


async def test_a_replica_is_told_to_drain_in_the_time_that_was_given() -> None:
    heard: list[worker_pb2.DrainRequest] = []

    async def drain(payload: bytes) -> worker_pb2.DrainResponse:
        heard.append(worker_pb2.DrainRequest.FromString(payload))
        return worker_pb2.DrainResponse()

    bench = Bench("m")
    lease = make_lease(address="w:1")
    channel = FakeChannel({"tandem.v1.Worker/Drain": drain})
    workers = Workers(["w:1"], bench.shell, Random(2), lambda _: cast("grpc.aio.Channel", channel))
    workers._take(workers._links["w:1"], worker_pb2.WatchResponse(incarnation=1, lease=lease_to_pb(lease)))
    service = ControlService(bench.shell, workers, bench.view)
    await service.drain_replica(control_pb2.DrainReplicaRequest(replica_id="decode-0", deadline_remaining_s=7.0), CALL)
    assert [request.deadline_remaining_s for request in heard] == [7.0]


def steps_of(bench: Bench, step_s: dict[str, float], from_s: int, to_s: int) -> None:
    """Each replica's steps take so long, four a second."""
    for number in range(4 * from_s, 4 * to_s):
        for name, duration_s in step_s.items():
            step = StepSample(prefill_tokens=64, prefill_pairs=2048, decode_requests=0, kv_tokens=0, duration_s=duration_s)
            bench.shell.core.steps(ReplicaId(name), 1, [step], number / 4)


async def stragglers(bench: Bench) -> list[str]:
    """Those that the status names; what is due is logged before."""
    bench.shell._refresh_gauges()
    status = status_from_pb(await bench.service.get_status(control_pb2.GetStatusRequest(), CALL))
    return [one.lease.replica_id for one in status.replicas if one.is_straggler]


async def test_a_straggler_is_named_in_the_log_and_in_the_status_until_it_is_none_any_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="router.shell")
    bench = Bench("m")
    fast = dict.fromkeys(("prefill-0", "prefill-1", "prefill-2"), 0.01)
    for name in fast:
        bench.shell.replica_seen(make_lease(name, Role.PREFILL))
    steps_of(bench, fast, 0, 20)
    assert await stragglers(bench) == []
    steps_of(bench, {**fast, "prefill-1": 0.016}, 20, 60)
    for _ in range(2):
        assert await stragglers(bench) == ["prefill-1"]
    steps_of(bench, fast, 60, 100)
    for _ in range(2):
        assert await stragglers(bench) == []
    named, cleared = (record.getMessage() for record in caplog.records)
    assert named.startswith("straggler_named replica_id=prefill-1 slowdown=1.")
    assert cleared == "straggler_cleared replica_id=prefill-1"
