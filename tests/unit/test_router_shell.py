"""The shell holds requests for models that are still to be started, and counts them as demand meanwhile."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.fleet import MAX_KNOWN_MODELS
from router.shell import Demand, RouterShell
from tandem.deadline import Deadline
from tandem.domain import Lease, ModelId, ReplicaId
from tandem.errors import DeadlineError, InvalidRequestError, NotFoundError, OverloadedError, Reason, UnavailableError
from tandem.telemetry import RouterMetrics
from tests.samples import make_lease, make_request

M, N = ModelId("m"), ModelId("n")
NEVER = Deadline(None)


class Spent(Deadline):
    """Has a moment left when it is first asked, and nothing after."""

    def __init__(self) -> None:
        super().__init__(None)
        self._left_s = [0.0]

    def remaining_s(self, stage: str) -> float | None:
        if not self._left_s:
            raise DeadlineError(stage)
        return self._left_s.pop()


class Shell(RouterShell):
    """At time 0 until a test sets another; `wake_ups` counts calls of `on_demand`."""

    def __init__(self, *, no_replica_wait_s: float = 5.0, cold_start_wait_s: float = 60.0, max_requests: int = 100) -> None:
        config = RouterConfig(
            no_replica_wait_s=no_replica_wait_s,
            cold_start_wait_s=cold_start_wait_s,
            max_queued_requests=max_requests,
            max_running_requests=max_requests,
        )
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        super().__init__(config, RouterCore(config, Random(1)), RouterMetrics(self.registry), lambda: self.now_s)
        self.wake_ups = 0
        self.on_demand = self._woken

    def _woken(self) -> None:
        self.wake_ups += 1

    def queued(self, model: ModelId = M) -> int:
        demand = self.demand().get(model)
        return 0 if demand is None else demand.queued_requests


async def begun(waiting: Coroutine[None, None, Lease]) -> asyncio.Task[Lease]:
    """The call in a task of its own, as far as it gets by itself."""
    task = asyncio.create_task(waiting)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def test_a_model_with_a_replica_needs_no_wait() -> None:
    shell = Shell()
    shell.replica_seen(make_lease())
    assert (await shell.lease_for("m", NEVER)).model == "m"
    assert shell.wake_ups == 0


async def test_a_request_for_a_held_model_is_demand_until_its_replica_comes() -> None:
    shell = Shell()
    shell.models_held([M])
    task = await begun(shell.lease_for("m", NEVER))
    assert not task.done()
    assert (shell.queued(), shell.wake_ups, shell.queued_requests) == (1, 1, 1)
    shell.replica_seen(make_lease("other", model=N))
    await begun(shell.lease_for("n", NEVER))
    assert not task.done()
    shell.replica_seen(make_lease())
    assert (await task).model == "m"
    assert (shell.queued(), shell.wake_ups, shell.queued_requests) == (0, 1, 0)


async def test_the_gauge_of_waiting_requests_counts_those_that_are_held() -> None:
    shell = Shell()
    shell.models_held([M])
    task = await begun(shell.lease_for("m", NEVER))
    shell._refresh_gauges()
    assert shell.registry.get_sample_value("tandem_router_queued_requests") == 1.0
    task.cancel()


async def test_a_nameless_request_waits_for_the_only_held_model() -> None:
    shell = Shell()
    shell.models_held([M])
    task = await begun(shell.lease_for("", NEVER))
    shell.replica_seen(make_lease())
    assert (await task).model == "m"


async def test_a_held_model_that_does_not_come_is_unavailable_and_its_demand_given_back() -> None:
    shell = Shell(cold_start_wait_s=0.0)
    shell.models_held([M])
    with pytest.raises(UnavailableError) as caught:
        await shell.lease_for("m", NEVER)
    assert caught.value.reason is Reason.NO_REPLICA
    assert (shell.queued(), shell.wake_ups) == (0, 1)


async def test_the_demand_of_a_caller_that_goes_away_is_given_back() -> None:
    shell = Shell()
    shell.models_held([M])
    task = await begun(shell.lease_for("m", NEVER))
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert shell.queued() == 0


async def test_a_request_waits_no_longer_than_its_deadline() -> None:
    shell = Shell()
    shell.models_held([M])
    with pytest.raises(DeadlineError) as caught:
        await shell.lease_for("m", Spent())
    assert "first worker" in caught.value.message
    assert shell.queued() == 0


async def test_a_model_that_is_held_no_more_is_told_at_once() -> None:
    shell = Shell()
    shell.models_held([M])
    task = await begun(shell.lease_for("m", NEVER))
    shell.models_held([N])
    with pytest.raises(NotFoundError, match="served are: n"):
        await task
    assert shell.queued() == 0


async def test_who_waits_for_a_model_is_told_at_once_that_it_cannot_start() -> None:
    shell = Shell()
    shell.models_held([M])
    task = await begun(shell.lease_for("m", NEVER))
    shell.models_held([M], {M: "weights are missing"})
    with pytest.raises(UnavailableError, match="weights are missing"):
        await task
    with pytest.raises(UnavailableError, match="weights are missing"):
        await shell.lease_for("m", NEVER)


async def test_a_refused_request_is_demand_for_a_while_so_that_the_start_is_tried_again() -> None:
    shell = Shell()
    shell.models_held([M], {M: "weights are missing"})
    assert shell.queued() == 0
    with pytest.raises(UnavailableError):
        await shell.lease_for("m", NEVER)
    assert (shell.queued(), shell.wake_ups) == (1, 1)
    shell.now_s = 5.0
    assert shell.queued() == 0


async def test_a_refused_request_for_a_model_that_nobody_starts_is_no_demand() -> None:
    shell = Shell()
    shell.models_held([], {M: "scaled to zero"})
    with pytest.raises(UnavailableError):
        await shell.lease_for("m", NEVER)
    assert (shell.queued(), shell.wake_ups) == (0, 0)


async def test_an_unknown_model_is_refused_at_once() -> None:
    shell = Shell()
    shell.models_held([M])
    with pytest.raises(NotFoundError):
        await shell.lease_for("x", NEVER)
    shell.models_held([M, N])
    with pytest.raises(InvalidRequestError, match="must name one of: m, n"):
        await shell.lease_for("", NEVER)
    assert shell.wake_ups == 0


async def test_where_nothing_is_known_yet_the_first_word_is_waited_for() -> None:
    shell = Shell(no_replica_wait_s=0.0)
    with pytest.raises(UnavailableError, match="no worker has reported"):
        await shell.lease_for("m", NEVER)
    shell = Shell()
    task = await begun(shell.lease_for("m", NEVER))
    shell.replica_seen(make_lease())
    assert (await task).model == "m"
    assert shell.wake_ups == 0


async def test_a_model_that_turns_out_to_be_held_has_the_whole_time_of_a_cold_start() -> None:
    shell = Shell(cold_start_wait_s=0.0)
    task = await begun(shell.lease_for("m", NEVER))
    assert not task.done()
    shell.models_held([M])
    with pytest.raises(UnavailableError, match="has started yet"):
        await task
    assert shell.wake_ups == 1


async def test_a_request_that_has_to_wait_for_a_replica_is_demand_in_the_queue_too() -> None:
    shell = Shell()
    shell.models_held([M])
    shell.replica_seen(make_lease())
    shell.replica_lost(ReplicaId("decode-0"), 1)
    ticket = shell.submit(make_request(), [], NEVER)
    assert shell.wake_ups == 1
    demand = shell.demand()[M]
    assert (demand.queued_requests, demand.requests_total) == (1, 1)
    assert demand.queued_work_s > 0.0
    shell.close(ticket)
    assert shell.demand() == {M: Demand(queued_requests=0, queued_work_s=0.0, requests_total=1)}


async def test_a_request_that_is_served_wakes_nobody() -> None:
    shell = Shell()
    shell.replica_seen(make_lease())
    shell.close(shell.submit(make_request(), [], NEVER))
    assert shell.wake_ups == 0


async def test_an_id_is_in_use_until_its_call_has_heard_that_it_has_ended() -> None:
    shell = Shell()
    shell.replica_seen(make_lease())
    shell.replica_lost(ReplicaId("decode-0"), 1)
    ticket = shell.submit(make_request(), [], NEVER)
    shell.now_s = 6.0
    shell._carry_out(shell.core.tick(shell.now_s))
    with pytest.raises(InvalidRequestError, match="is being served"):
        shell.submit(make_request(), [], NEVER)
    with pytest.raises(UnavailableError, match="no replica"):
        await ticket.next_dispatch()
    shell.close(ticket)
    shell.close(shell.submit(make_request(), [], NEVER))


async def test_a_model_that_was_forgotten_meanwhile_is_waited_for_as_long_as_any() -> None:
    shell = Shell()
    shell.replica_seen(make_lease())
    shell.replica_lost(ReplicaId("decode-0"), 1)
    ticket = shell.submit(make_request(), [], NEVER)
    for number in range(MAX_KNOWN_MODELS + 1):
        shell.replica_seen(make_lease(model=ModelId(f"other-{number}")))
    for now_s in (4.9, 5.1):
        assert shell.core.queued_requests == 1
        shell.now_s = now_s
        shell._carry_out(shell.core.tick(now_s))
    with pytest.raises(UnavailableError, match="no replica"):
        await ticket.next_dispatch()
    shell.close(ticket)


def test_calls_held_for_one_model_refuse_nobody_who_wants_another() -> None:
    shell = Shell(max_requests=1)
    shell.models_held([M, N])
    with shell.call("m"), shell.call("m"):
        with pytest.raises(OverloadedError, match="2 calls for model 'm' are being served, the limit is 2") as caught, shell.call("m"):
            pass
        assert caught.value.retry_after_s == 60.0
        with (
            shell.call("n"),
            shell.call("x"),
            shell.call("y"),
            pytest.raises(OverloadedError, match="2 calls for unknown models"),
            shell.call("z"),
        ):
            pass
    with shell.call("m"):
        pass
    assert not shell._calls
