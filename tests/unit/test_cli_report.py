"""What the command line reads as targets and says of rates."""

from dataclasses import replace

import pytest

from tandem.cli_report import parse_target, pools_caption, rates_caption
from tandem.cluster_view import ClusterStatus, ModelQueue, ReplicaStatus
from tandem.domain import ModelId, ReplicaState, ReplicaTarget, Role, WorkerLoad
from tandem.errors import ConfigError
from tests.samples import make_lease

M = ModelId("m")


def view(name: str, tokens: int, incarnation: int = 1) -> ReplicaStatus:
    load = WorkerLoad(generated_tokens_total=tokens)
    return ReplicaStatus(lease=make_lease(name, incarnation=incarnation), load=load, is_reachable=True, predicted_work_s=0.0)


def status(*views: ReplicaStatus, targets: tuple[ReplicaTarget, ...] = ()) -> ClusterStatus:
    return ClusterStatus(cluster="c", router_id="r", queued_requests=0, running_requests=0, replicas=views, targets=targets)


@pytest.mark.parametrize(
    ("text", "role", "replicas"), [("prefill=2", Role.PREFILL, 2), ("decode=0", Role.DECODE, 0), ("decode=auto", Role.DECODE, -1)]
)
def test_a_target_is_a_role_and_a_count(text: str, role: Role, replicas: int) -> None:
    assert parse_target(text, model="m", expires_in_s=5.0) == ReplicaTarget(model=M, role=role, replicas=replicas, expires_in_s=5.0)


@pytest.mark.parametrize(
    "text", ["", "prefill", "prefill=", "=2", "prefil=2", "prefill=-1", "prefill=1.5", "prefill=two", "prefill==2", "PREFILL=2"]
)
def test_what_is_no_target_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="is not ROLE=N: prefill=2"):
        parse_target(text, model="", expires_in_s=0.0)


def test_the_rate_is_what_all_replicas_generated_in_between() -> None:
    assert rates_caption(status(view("a", 10), view("b", 0)), status(view("a", 30), view("b", 5)), 2.0) == "12.5 tokens/s"


def test_a_replica_that_came_or_started_again_in_between_counts_from_the_next_look() -> None:
    before, now = status(view("a", 100)), status(view("a", 7, incarnation=2), view("b", 50))
    assert rates_caption(before, now, 1.0) == "0.0 tokens/s"


def test_two_looks_at_once_make_no_rate() -> None:
    assert rates_caption(status(view("a", 1)), status(view("a", 2)), 0.0) == "0.0 tokens/s"


def test_pools_are_told_with_what_is_wanted_and_what_waits() -> None:
    targets = (ReplicaTarget(model=M, role=Role.PREFILL, replicas=1), ReplicaTarget(model=M, role=Role.DECODE, replicas=3))
    found = replace(status(targets=targets), queues=(ModelQueue(model=M, queued_requests=2), ModelQueue(model=ModelId("n"))))
    assert pools_caption(found) == "m: prefill 0 of 1, decode 0 of 3, 2 queued"
    lease = replace(make_lease("a"), role=Role.DECODE, model=M, state=ReplicaState.READY)
    served = replace(found, replicas=(replace(view("a", 0), lease=lease),), queues=())
    assert pools_caption(served) == "m: prefill 0 of 1, decode 1 of 3"


def test_without_targets_nothing_is_told_of_pools() -> None:
    assert pools_caption(status(view("a", 1))) == ""
