"""Placement takes the least predicted seconds, and says why where one worker does both."""

from dataclasses import replace

import pytest

from router.ledger import ReplicaLoad
from router.placement import NO_DECODE_WORKER, NO_PREFILL_WORKER, SHORT_PROMPT, Candidate, Job, Placement, place
from router.predict import Predictor
from tandem.domain import ModelId, Role
from tests.samples import ENGINE, make_lease

JOB = Job(model=ModelId("m"), total_tokens=200, expected_output_tokens=16, one_worker_reason=None, handoff_min_tokens=64)
IDLE = ReplicaLoad()


def _prefill(name: str, load: ReplicaLoad = IDLE, cached_tokens: int = 0) -> Candidate:
    return Candidate(lease=make_lease(name, Role.PREFILL), load=load, cached_tokens=cached_tokens)


def _decode(name: str, load: ReplicaLoad = IDLE, kv_blocks: int = 1000, cached_tokens: int = 0) -> Candidate:
    return Candidate(lease=make_lease(name, engine=replace(ENGINE, kv_blocks=kv_blocks)), load=load, cached_tokens=cached_tokens)


def _place(prefill: list[Candidate], decode: list[Candidate], job: Job = JOB) -> Placement | None:
    return place(job, prefill, decode, Predictor(), 3)


def _names(placement: Placement | None) -> tuple[list[str], str]:
    assert placement is not None
    return [lease.replica_id for lease in placement.prefill], placement.decode.replica_id


def test_ties_go_to_the_lower_id() -> None:
    placement = _place([_prefill("p1"), _prefill("p0")], [_decode("d1"), _decode("d0")])
    assert _names(placement) == (["p0", "p1"], "d0")


def test_prefill_workers_are_ranked_by_their_backlog_and_cut_to_three() -> None:
    loads = {"p0": 900, "p1": 300, "p2": 600, "p3": 0}
    prefill = [_prefill(name, ReplicaLoad(pending_prefill_tokens=tokens)) for name, tokens in loads.items()]
    assert _names(_place(prefill, [_decode("d0")])) == (["p3", "p1", "p2"], "d0")


def test_cached_blocks_outweigh_a_shorter_backlog() -> None:
    busy_with_prefix = _prefill("p1", ReplicaLoad(pending_prefill_tokens=100), cached_tokens=192)
    placement = _place([_prefill("p0"), busy_with_prefix], [_decode("d0")])
    assert placement is not None
    assert _names(placement)[0] == ["p1", "p0"]
    assert (placement.uncached_tokens, placement.cached_tokens, placement.ahead_tokens) == (8, 192, 100)


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    placement = _place([_prefill("p0", cached_tokens=224)], [_decode("d0")])
    assert placement is not None
    assert placement.uncached_tokens == 1


def test_the_decode_worker_with_the_least_seconds_per_token_is_taken() -> None:
    busy = _decode("d0", ReplicaLoad(running_requests=8, kv_tokens=4000))
    assert _names(_place([_prefill("p0")], [busy, _decode("d1")]))[1] == "d1"


def test_a_decode_worker_without_kv_room_is_the_last_choice() -> None:
    full = _decode("d0", kv_blocks=6)  # 192 tokens
    busy = _decode("d1", ReplicaLoad(running_requests=8, kv_tokens=4000))
    assert _names(_place([_prefill("p0")], [full, busy]))[1] == "d1"
    assert _names(_place([_prefill("p0")], [full]))[1] == "d0"


def test_a_short_prompt_goes_to_one_worker() -> None:
    placement = _place([_prefill("p0")], [_decode("d0")], replace(JOB, total_tokens=63))
    assert placement is not None
    assert _names(placement) == ([], "d0")
    assert placement.one_worker_reason == SHORT_PROMPT
    handed_off = _place([_prefill("p0")], [_decode("d0")], replace(JOB, total_tokens=64))
    assert handed_off is not None
    assert handed_off.one_worker_reason == ""


def test_what_cannot_be_handed_off_exactly_goes_to_one_worker() -> None:
    placement = _place([_prefill("p0")], [_decode("d0")], replace(JOB, one_worker_reason="seed"))
    assert placement is not None
    assert (_names(placement), placement.one_worker_reason) == (([], "d0"), "seed")


def test_without_prefill_workers_a_decode_worker_does_both() -> None:
    placement = _place([], [_decode("d0")])
    assert placement is not None
    assert (_names(placement), placement.one_worker_reason) == (([], "d0"), NO_PREFILL_WORKER)


def test_without_decode_workers_a_prefill_worker_does_both() -> None:
    placement = _place([_prefill("p1"), _prefill("p0", ReplicaLoad(pending_prefill_tokens=500))], [], replace(JOB, one_worker_reason="n"))
    assert placement is not None
    assert (_names(placement), placement.one_worker_reason) == (([], "p1"), NO_DECODE_WORKER)


def test_without_workers_there_is_no_placement() -> None:
    assert _place([], []) is None


def test_one_worker_is_chosen_by_prefill_and_decode_together() -> None:
    cached = _decode("d1", ReplicaLoad(running_requests=2, kv_tokens=400), cached_tokens=192)
    assert _names(_place([], [_decode("d0"), cached], replace(JOB, expected_output_tokens=1)))[1] == "d1"
    assert _names(_place([], [_decode("d0"), cached], replace(JOB, expected_output_tokens=500)))[1] == "d0"


def test_predictions_say_what_they_were_made_from() -> None:
    prefill = _prefill("p0", ReplicaLoad(pending_prefill_tokens=400))
    placement = _place([prefill], [_decode("d0", ReplicaLoad(running_requests=3, kv_tokens=500))])
    assert placement is not None
    predictor = Predictor()
    assert (placement.batch_requests, placement.kv_tokens) == (4, 700)
    assert placement.backlog_s == predictor.backlog_s(ModelId("m"), 400)
    own_s = predictor.prefill_s(ModelId("m"), uncached_tokens=200, context_tokens=200)
    assert placement.prefill_s == pytest.approx(placement.backlog_s + own_s)
    assert placement.tpot_s == predictor.tpot_s(ModelId("m"), batch_requests=4, kv_tokens=700)
