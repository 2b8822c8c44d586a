"""Receipts add up, and every predicted quantity gets its measured twin."""

from dataclasses import replace

import pytest

from router.placement import Placement
from router.predict import Predictor
from router.receipts import Timeline, complete_receipt, learn, predicted_terms
from tandem.domain import ModelId, Receipt, RequestId, Role, Sampling
from tests.samples import make_lease, make_request

PLACEMENT = Placement(
    prefill=(make_lease("p0", Role.PREFILL),),
    decode=make_lease(),
    one_worker_reason="",
    cached_tokens=0,
    uncached_tokens=100,
    ahead_tokens=0,
    batch_requests=1,
    kv_tokens=100,
    backlog_s=0.25,
    prefill_s=0.75,
    tpot_s=0.01,
)
WORKER = Receipt(request_id=RequestId("r1"), prefill_s=0.5, decode_s=1.75, handoff_gap_s=0.1, cached_tokens=32, handed_off=True)
TIMELINE = Timeline(
    queue_s=0.25, first_token_s=1.0, last_token_s=3.0, end_s=3.5, sent_tokens=11, output_tokens=11, attempts=1, first_token_attempt=1
)


def _complete(worker: Receipt = WORKER, timeline: Timeline = TIMELINE, one_worker_reason: str = "") -> Receipt:
    return complete_receipt(worker, timeline, predicted_terms(PLACEMENT, 0.5), router_id="router-0", one_worker_reason=one_worker_reason)


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
        "tpot_s": (0.01, 0.2),
    }


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


class _Recorder(Predictor):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, float]] = []

    def observe_prefill(self, model: ModelId, *, uncached_tokens: int, context_tokens: int, ahead_tokens: int, measured_s: float) -> None:
        self.seen.append((f"prefill {uncached_tokens}/{context_tokens}+{ahead_tokens}", measured_s))

    def observe_decode(self, model: ModelId, *, batch_requests: int, kv_tokens: int, measured_s: float) -> None:
        self.seen.append((f"decode {batch_requests} {kv_tokens}", measured_s))


def test_both_step_times_are_learnt_and_the_gap_is_no_step() -> None:
    predictor = _Recorder()
    learn(predictor, make_request(), PLACEMENT, _complete())
    (prefill, prefill_s), (decode, step_s) = predictor.seen
    assert (prefill, prefill_s) == ("prefill 68/100+0", 0.5)
    assert decode == "decode 1 100"
    assert step_s == pytest.approx(1.9 / 9)


@pytest.mark.parametrize(
    ("changes", "sampling"),
    [({"output_tokens": 2}, Sampling()), ({"e2e_s": 1.0}, Sampling()), ({}, Sampling(n=2))],
    ids=["one step that was the gap", "no time", "several choices"],
)
def test_nothing_is_learnt_of_decode_where_there_was_no_clean_step(changes: dict[str, float], sampling: Sampling) -> None:
    predictor = _Recorder()
    learn(predictor, make_request(sampling=sampling), PLACEMENT, replace(_complete(), prefill_s=0.0, **changes))  # type: ignore[arg-type]
    assert predictor.seen == []
