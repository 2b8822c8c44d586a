"""The fleet knows replicas by lease and does not forget a model with its last replica."""

import pytest

from router.fleet import MAX_KNOWN_MODELS, Fleet
from tandem.domain import ModelId, ReplicaId, ReplicaState, Role
from tandem.errors import InvalidRequestError, NotFoundError, Reason, UnavailableError
from tests.samples import make_lease

M = ModelId("m")


def test_ready_replicas_are_listed_by_role_model_and_id() -> None:
    fleet = Fleet()
    for lease in (
        make_lease("d1"),
        make_lease("d0"),
        make_lease("p0", Role.PREFILL),
        make_lease("d2", state=ReplicaState.DRAINING),
        make_lease("d3", model=ModelId("other")),
    ):
        fleet.see(lease, 0.0)
    assert [lease.replica_id for lease in fleet.ready(M, Role.DECODE)] == ["d0", "d1"]
    assert [lease.replica_id for lease in fleet.ready(M, Role.PREFILL)] == ["p0"]
    assert [lease.replica_id for lease in fleet.leases] == ["d0", "d1", "d2", "d3", "p0"]
    assert fleet.models == ("m", "other")


def test_an_older_incarnation_is_stale() -> None:
    fleet = Fleet()
    assert not fleet.is_stale(make_lease(incarnation=1))
    fleet.see(make_lease(incarnation=2), 0.0)
    assert fleet.is_stale(make_lease(incarnation=1))
    assert not fleet.is_stale(make_lease(incarnation=2))


def test_a_loss_must_mean_the_incarnation_that_is_known() -> None:
    fleet = Fleet()
    fleet.see(make_lease(incarnation=2), 0.0)
    assert fleet.lose(ReplicaId("decode-0"), 1, 1.0) is None
    assert fleet.lose(ReplicaId("decode-0"), 2, 1.0) == make_lease(incarnation=2)
    assert fleet.lose(ReplicaId("decode-0"), 2, 1.0) is None
    assert fleet.get(ReplicaId("decode-0")) is None


def test_a_model_without_a_ready_replica_is_unserved_since_its_loss() -> None:
    fleet = Fleet()
    fleet.see(make_lease(), 1.0)
    assert fleet.unserved_s(M, 3.0) is None
    fleet.see(make_lease(state=ReplicaState.DRAINING), 4.0)
    fleet.lose(ReplicaId("decode-0"), 1, 5.0)
    assert fleet.unserved_s(M, 6.0) == 2.0
    assert fleet.lease_for("m").replica_id == "decode-0"
    fleet.see(make_lease(), 7.0)
    assert fleet.unserved_s(M, 8.0) is None


def test_no_model_at_all_is_unavailable_not_unknown() -> None:
    with pytest.raises(UnavailableError) as caught:
        Fleet().lease_for("m")
    assert caught.value.reason is Reason.NO_REPLICA


def test_an_unknown_model_is_refused_with_the_names_of_the_known() -> None:
    fleet = Fleet()
    fleet.see(make_lease(), 0.0)
    assert fleet.lease_for("").model == "m"
    with pytest.raises(NotFoundError, match="served are: m"):
        fleet.lease_for("x")


def test_no_name_is_only_enough_where_there_is_one_model() -> None:
    fleet = Fleet()
    fleet.see(make_lease(), 0.0)
    fleet.see(make_lease("d1", model=ModelId("n")), 0.0)
    with pytest.raises(InvalidRequestError, match="must name one of: m, n"):
        fleet.lease_for("")


def test_models_without_replicas_are_forgotten_beyond_the_bound() -> None:
    fleet = Fleet()
    for number in range(MAX_KNOWN_MODELS):
        fleet.see(make_lease(f"d{number}", model=ModelId(f"m{number}")), 0.0)
    fleet.see(make_lease("more", model=ModelId("more")), 0.0)
    assert len(fleet.models) == MAX_KNOWN_MODELS + 1  # all have replicas: there is nothing to forget
    fleet.lose(ReplicaId("d7"), 1, 1.0)
    fleet.see(make_lease("more2", model=ModelId("more2")), 2.0)
    assert "m7" not in fleet.models
    assert len(fleet.models) == MAX_KNOWN_MODELS + 1


def test_a_held_model_is_awaited_until_a_replica_of_it_is_seen() -> None:
    fleet = Fleet()
    assert fleet.awaited("m") is None
    fleet.hold([M])
    assert fleet.is_held(M)
    assert fleet.models == ("m",)
    assert (fleet.awaited("m"), fleet.awaited(""), fleet.awaited("x")) == ("m", "m", None)
    assert fleet.last_lease(M) is None
    fleet.see(make_lease(), 0.0)
    assert (fleet.awaited("m"), fleet.awaited("")) == (None, None)
    assert fleet.last_lease(M) == make_lease()


def test_each_word_of_the_register_replaces_the_last() -> None:
    fleet = Fleet()
    fleet.hold([M])
    fleet.hold([ModelId("n")])
    assert fleet.models == ("n",)
    assert not fleet.is_held(M)


def test_a_nameless_request_awaits_nothing_where_it_could_mean_several_models() -> None:
    fleet = Fleet()
    fleet.hold([M, ModelId("n")])
    assert fleet.awaited("") is None
    assert fleet.awaited("n") == "n"
    fleet.hold([ModelId("n")])
    fleet.see(make_lease(), 0.0)
    assert fleet.awaited("") is None
    with pytest.raises(InvalidRequestError, match="must name one of: m, n"):
        fleet.lease_for("")


@pytest.mark.parametrize("name", ["", "m"])
def test_a_held_model_without_a_replica_yet_is_unavailable_not_unknown(name: str) -> None:
    fleet = Fleet()
    fleet.hold([M])
    with pytest.raises(UnavailableError, match="no replica of model 'm' has started yet") as caught:
        fleet.lease_for(name)
    assert caught.value.reason is Reason.NO_REPLICA


def test_an_unknown_model_is_refused_with_the_names_of_the_held() -> None:
    fleet = Fleet()
    fleet.hold([M])
    with pytest.raises(NotFoundError, match="served are: m"):
        fleet.lease_for("x")


def test_a_model_that_cannot_start_is_refused_with_the_reason_while_no_replica_is_ready() -> None:
    fleet = Fleet()
    fleet.hold([M], {M: "weights are missing"})
    assert fleet.awaited("m") is None
    with pytest.raises(UnavailableError, match="weights are missing") as caught:
        fleet.lease_for("")
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.NO_REPLICA, 5.0)
    fleet.see(make_lease(), 0.0)
    assert fleet.refusal(M) is None
    assert fleet.lease_for("m") == make_lease()
    fleet.lose(ReplicaId("decode-0"), 1, 1.0)
    with pytest.raises(UnavailableError, match="weights are missing"):
        fleet.lease_for("m")
    fleet.hold([M])
    assert fleet.refusal(M) is None


def test_a_model_that_is_configured_and_not_started_on_demand_is_known() -> None:
    fleet = Fleet()
    fleet.hold([], {M: "scaled to zero"})
    assert fleet.models == ("m",)
    assert not fleet.is_held(M)
    with pytest.raises(UnavailableError, match="scaled to zero"):
        fleet.lease_for("m")
