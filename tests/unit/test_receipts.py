"""Receipts add up, and every predicted quantity gets its measured twin."""

from dataclasses import replace
from typing import Any

import pytest

from router.interval import Interval, PredictionKind
from router.output_length import OutputEstimate, OutputLengths
from router.placement import Assignment, Placement
from router.predict import LoadPredictor
from router.receipts import Timeline, complete_receipt, learn, predicted_terms
from tandem.domain import Receipt, RequestId, Role, Sampling
from tests.router_parts import make_tracked
from tests.samples import ENGINE, make_lease

OUTPUT = OutputEstimate(12.0, 10.0, 20.0)
FIRST = Assignment(
    worker=make_lease("p0", Role.PREFILL),
    prefill=(make_lease("p0", Role.PREFILL),),
    one_worker_reason="",
    policy="predicted_ttft",
    cached_tokens=0,
    uncached_tokens=100,
    own_s=0.5,
    work_s=0.5,
    ahead_s=0.5,
    is_guess=False,
    queue=Interval(0.5, 0.8),
    ttft=Interval(1.25, 1.75),
    considered=(),
)
PLACEMENT = Placement(
    assignment=FIRST,
    prefill=FIRST.prefill,
    decode=make_lease(),
    is_same_node=True,
    batch_requests=1,
    kv_tokens=100,
    backlog_s=0.25,
    prefill_s=Interval(0.75, 1.0),
    tpot=Interval(0.01, 0.02),
    handoff_gap=Interval(0.05, 0.06),
    e2e=Interval(1.5, 2.0),
    output=OUTPUT,
)
WORKER = Receipt(request_id=RequestId("r1"), prefill_s=0.5, decode_s=1.75, handoff_gap_s=0.1, cached_tokens=32, handed_off=True)
TIMELINE = Timeline(
    queue_s=0.25, first_token_s=1.0, last_token_s=3.0, end_s=3.5, sent_tokens=11, output_tokens=11, attempts=1, first_token_attempt=1
)


def _complete(worker: Receipt = WORKER, timeline: Timeline = TIMELINE, one_worker_reason: str = "") -> Receipt:
    return complete_receipt(worker, timeline, predicted_terms(PLACEMENT, FIRST), router_id="router-0", one_worker_reason=one_worker_reason)


def test_ttft_is_queue_plus_dispatch_plus_prefill() -> None:
    receipt = _complete()
    assert (receipt.queue_s, receipt.dispatch_s, receipt.prefill_s) == (0.25, 0.25, 0.5)
    assert receipt.ttft_s == receipt.queue_s + receipt.dispatch_s + receipt.prefill_s == 1.0
    assert (receipt.e2e_s, receipt.decode_s, receipt.attempts, receipt.router_id) == (3.0, 1.75, 1, "router-0")


def test_predictions_stand_beside_what_was_measured() -> None:
    terms = {term.name: (term.predicted, term.actual) for term in _complete().predicted}
    assert terms == {
        "queue_s": (0.5, 0.25),
        "backlog_s": (0.25, None),
        "prefill_s": (0.75, 0.5),
        "ttft_s": (1.25, 1.0),
        "ttft_q90_s": (1.75, 1.0),
        "tpot_s": (0.01, 0.2),
        "tpot_q90_s": (0.02, 0.2),
        "e2e_s": (1.5, 3.0),
        "e2e_q90_s": (2.0, 3.0),
        "output_tokens": (12.0, 11.0),
        "handoff_gap_s": (0.05, 0.1),
    }


def test_without_a_hand_off_no_gap_is_predicted() -> None:
    terms = predicted_terms(replace(PLACEMENT, prefill=(), handoff_gap=None), FIRST)
    assert "handoff_gap_s" not in {term.name for term in terms}


def test_one_token_has_no_tpot() -> None:
    receipt = _complete(timeline=replace(TIMELINE, sent_tokens=1))
    assert {term.name: term.actual for term in receipt.predicted}["tpot_s"] is None


def test_a_first_token_of_a_lost_attempt_counts_its_wait_as_prefill() -> None:
    receipt = _complete(timeline=replace(TIMELINE, attempts=2))
    assert (receipt.dispatch_s, receipt.prefill_s, receipt.decode_s, receipt.attempts) == (0.0, 0.75, 2.0, 2)


def test_clocks_of_two_processes_never_make_a_part_negative() -> None:
    receipt = _complete(replace(WORKER, prefill_s=5.0))
    assert (receipt.dispatch_s, receipt.prefill_s) == (0.0, 0.75)
    receipt = _complete(timeline=replace(TIMELINE, queue_s=2.0))
    assert (receipt.queue_s, receipt.dispatch_s, receipt.prefill_s) == (1.0, 0.0, 0.0)


def test_a_request_without_tokens_ends_when_it_ended() -> None:
    receipt = _complete(timeline=replace(TIMELINE, first_token_s=None, last_token_s=None, first_token_attempt=None, sent_tokens=0))
    assert (receipt.ttft_s, receipt.e2e_s) == (3.5, 3.5)


def test_the_workers_reason_goes_before_the_plans() -> None:
    assert _complete(one_worker_reason="short_prompt").one_worker_reason == "short_prompt"
    worker = replace(WORKER, one_worker_reason="prefill_lost")
    assert _complete(worker, one_worker_reason="short_prompt").one_worker_reason == "prefill_lost"


def _learn(receipt: Receipt, *, placement: Placement = PLACEMENT, **changes: Any) -> tuple[LoadPredictor, OutputLengths]:
    predictor, lengths = LoadPredictor(), OutputLengths()
    tracked = make_tracked(**changes)
    tracked.placement, tracked.first_assignment, tracked.is_predicted = placement, FIRST, True
    learn(predictor, lengths, tracked, receipt, 0.0)
    return predictor, lengths


def _kinds(predictor: LoadPredictor) -> set[PredictionKind]:
    return {score.kind for score in predictor.scores.scores()}


def test_every_kind_is_scored_and_the_gap_is_no_step() -> None:
    predictor, _ = _learn(_complete())
    assert _kinds(predictor) == set(PredictionKind) - {PredictionKind.TRANSFER, PredictionKind.STEP}
    errors = {score.kind: score.mean_relative_error for score in predictor.scores.scores()}
    step_s = (3.0 - 1.0 - 0.1) / (11 - 1 - 1)
    assert errors[PredictionKind.TPOT] == pytest.approx((0.01 - step_s) / step_s)
    assert errors[PredictionKind.QUEUE] == pytest.approx((0.5 - 0.25) / 0.25)
    assert errors[PredictionKind.TTFT] == pytest.approx((1.25 - 1.0) / 1.0)
    assert errors[PredictionKind.PREFILL] == pytest.approx((0.75 - 0.5) / 0.5)
    assert errors[PredictionKind.HANDOFF_GAP] == pytest.approx((0.05 - 0.1) / 0.1)
    assert errors[PredictionKind.OUTPUT_TOKENS] == pytest.approx((12 - 11) / 11)


def test_the_gap_and_the_dispatch_are_learnt() -> None:
    predictor, _ = _learn(_complete())
    untaught = LoadPredictor()
    assert predictor.handoff_gap_s("m", blocks=6, is_same_node=True) > untaught.handoff_gap_s("m", blocks=6, is_same_node=True)
    assert predictor.handoff_gap_s("m", blocks=6, is_same_node=False) == untaught.handoff_gap_s("m", blocks=6, is_same_node=False)
    tracked = make_tracked()
    tracked.placement, tracked.first_assignment, tracked.is_predicted = PLACEMENT, FIRST, True
    for _ in range(10):
        learn(predictor, OutputLengths(), tracked, _complete(), 0.0)
    nothing = Interval(0.0, 0.0)
    assert predictor.ttft("m", queue=nothing, prefill=nothing).mean_s == pytest.approx(0.25)


@pytest.mark.parametrize("shipped_blocks", [64, 640])
def test_the_transfer_of_what_comes_after_the_first_token_is_learnt(shipped_blocks: int) -> None:
    block_bytes = ENGINE.kv_block_bytes  # a chunk has 64 of them
    receipt = replace(_complete(), transfer_s=0.064, kv_bytes_shipped=shipped_blocks * block_bytes)
    predictor, _ = _learn(receipt, placement=replace(PLACEMENT, is_same_node=False))
    assert predictor.transfer_s("m", size_bytes=64 * block_bytes, is_same_node=False) == pytest.approx(0.064, rel=1e-3)
    untaught = LoadPredictor()
    same_node_s = predictor.transfer_s("m", size_bytes=block_bytes, is_same_node=True)
    assert same_node_s == untaught.transfer_s("m", size_bytes=block_bytes, is_same_node=True)


def test_a_transfer_is_scored_by_what_was_known_before_it() -> None:
    receipt = replace(_complete(), transfer_s=0.064, kv_bytes_shipped=64 * ENGINE.kv_block_bytes)
    predictor, _ = _learn(receipt)
    (score,) = (score for score in predictor.scores.scores() if score.kind is PredictionKind.TRANSFER)
    before_s = LoadPredictor().transfer_s("m", size_bytes=64 * ENGINE.kv_block_bytes, is_same_node=True)
    assert score.mean_relative_error == pytest.approx((before_s - 0.064) / 0.064)


def test_waits_that_were_not_predicted_at_arrival_are_not_scored() -> None:
    predictor, tracked = LoadPredictor(), make_tracked()
    tracked.placement, tracked.first_assignment = PLACEMENT, FIRST
    learn(predictor, OutputLengths(), tracked, _complete(), 0.0)
    waits = {PredictionKind.QUEUE, PredictionKind.TTFT, PredictionKind.E2E}
    assert _kinds(predictor) == set(PredictionKind) - {PredictionKind.TRANSFER, PredictionKind.STEP} - waits


def test_a_hand_off_that_shipped_nothing_teaches_no_transfer() -> None:
    predictor, _ = _learn(replace(_complete(), transfer_s=0.5))
    assert predictor.transfer_s("m", size_bytes=1, is_same_node=True) == LoadPredictor().transfer_s("m", size_bytes=1, is_same_node=True)


def test_output_lengths_are_learnt_without_the_resumed_tokens() -> None:
    _, lengths = _learn(_complete(), sampling=Sampling(), resume_token_ids=(1,) * 4)
    assert lengths.estimate(make_tracked().length_key, produced_tokens=0, max_tokens=None, expected_tokens=None).mean_tokens < 128
    predictor, _ = _learn(_complete(), resume_token_ids=(1,) * 4)
    (score,) = (score for score in predictor.scores.scores() if score.kind is PredictionKind.OUTPUT_TOKENS)
    assert score.mean_relative_error == pytest.approx((12 - 7) / 7)


@pytest.mark.parametrize(
    ("changes", "unscored"),
    [
        ({"output_tokens": 2}, {PredictionKind.TPOT}),
        ({"e2e_s": 1.0}, {PredictionKind.TPOT}),
        ({"e2e_s": 0.0}, {PredictionKind.TPOT, PredictionKind.E2E}),
        ({"ttft_s": 0.0}, {PredictionKind.TTFT, PredictionKind.QUEUE}),
        ({"prefill_s": 0.0}, {PredictionKind.PREFILL}),
        ({"handoff_gap_s": 0.0}, {PredictionKind.HANDOFF_GAP}),
        ({"handed_off": False}, {PredictionKind.HANDOFF_GAP}),
    ],
    ids=["one step that was the gap", "no time", "no end", "no first token", "no prefill", "no gap", "no hand-off"],
)
def test_what_was_not_measured_is_not_scored(changes: dict[str, Any], unscored: set[PredictionKind]) -> None:
    predictor, _ = _learn(replace(_complete(), **changes))
    assert _kinds(predictor) == set(PredictionKind) - {PredictionKind.TRANSFER, PredictionKind.STEP} - unscored


def test_a_gap_that_was_not_predicted_is_not_scored() -> None:
    predictor, _ = _learn(_complete(), placement=replace(PLACEMENT, handoff_gap=None))
    assert PredictionKind.HANDOFF_GAP not in _kinds(predictor)


def test_several_choices_teach_nothing_of_decode() -> None:
    predictor, lengths = _learn(_complete(), sampling=Sampling(n=2))
    assert _kinds(predictor).isdisjoint({PredictionKind.TPOT, PredictionKind.E2E, PredictionKind.OUTPUT_TOKENS})
    key = make_tracked().length_key
    untaught = OutputLengths().estimate(key, produced_tokens=0, max_tokens=None, expected_tokens=None)
    assert lengths.estimate(key, produced_tokens=0, max_tokens=None, expected_tokens=None) == untaught
