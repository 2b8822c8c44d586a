"""The numbers of a request: predicted terms, the receipt they end in, and what the predictor learns from it.

Must not measure: times come in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.interval import PredictionKind
from router.output_length import OutputLengths
from router.placement import Assignment, Placement, named_terms
from router.predict import LoadPredictor
from router.tracked import Tracked
from tandem.domain import PredictedTerm, Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What the router saw of one request, in seconds since its arrival; None: it did not happen."""

    queue_s: float  # arrival to dispatch, and the waits between attempts before the first token
    first_token_s: float | None
    last_token_s: float | None
    end_s: float
    sent_tokens: int  # on this call
    output_tokens: int  # resumed ones included, as the worker counts
    attempts: int
    first_token_attempt: int | None


def predicted_terms(placement: Placement, first: Assignment) -> tuple[PredictedTerm, ...]:
    """By the receipt's names; `first` was made at arrival. `backlog_s` is the part of `prefill_s` that is spent behind other requests.

    Names that end in `_q90_s` are what nine in ten should stay within.
    """
    terms = {
        "queue_s": first.queue.mean_s,
        "backlog_s": placement.backlog_s,
        "prefill_s": placement.prefill_s.mean_s,
        "ttft_s": first.ttft.mean_s,
        "ttft_q90_s": first.ttft.q90_s,
        "tpot_s": placement.tpot.mean_s,
        "tpot_q90_s": placement.tpot.q90_s,
        "e2e_s": placement.e2e.mean_s,
        "e2e_q90_s": placement.e2e.q90_s,
        "output_tokens": placement.output.mean_tokens,
    }
    if placement.handoff_gap is not None:
        terms["handoff_gap_s"] = placement.handoff_gap.mean_s
    return named_terms(terms)


def waiting_terms(assignment: Assignment) -> tuple[PredictedTerm, ...]:
    """The same names, as far as they are known of a request that waits."""
    return named_terms({"queue_s": assignment.queue.mean_s, "ttft_s": assignment.ttft.mean_s, "ttft_q90_s": assignment.ttft.q90_s})


def complete_receipt(
    worker: Receipt, timeline: Timeline, predicted: Sequence[PredictedTerm], *, router_id: str, one_worker_reason: str
) -> Receipt:
    """The last worker's receipt with what only the router knows.

    ttft = queue + dispatch + prefill holds exactly: dispatch is what the other two leave. Where the first token came from an attempt that
    was lost, its worker's prefill time is lost too, and prefill is all that was not queue.
    """
    first_s = timeline.end_s if timeline.first_token_s is None else timeline.first_token_s
    last_s = timeline.end_s if timeline.last_token_s is None else timeline.last_token_s
    after_queue_s = max(0.0, first_s - timeline.queue_s)
    is_whole = timeline.first_token_attempt in (None, timeline.attempts)
    prefill_s = min(worker.prefill_s, after_queue_s) if is_whole else after_queue_s
    receipt = replace(
        worker,
        queue_s=first_s - after_queue_s,
        dispatch_s=after_queue_s - prefill_s,
        prefill_s=prefill_s,
        ttft_s=first_s,
        decode_s=worker.decode_s if timeline.attempts == 1 else last_s - first_s,
        e2e_s=last_s,
        output_tokens=timeline.output_tokens,
        one_worker_reason=worker.one_worker_reason or one_worker_reason,
        attempts=timeline.attempts,
        router_id=router_id,
    )
    tpot_s = (last_s - first_s) / (timeline.sent_tokens - 1) if timeline.sent_tokens > 1 else None
    actual = {
        "queue_s": receipt.queue_s,
        "prefill_s": prefill_s,
        "ttft_s": first_s,
        "tpot_s": tpot_s,
        "e2e_s": last_s,
        "handoff_gap_s": receipt.handoff_gap_s or None,
        "output_tokens": float(timeline.output_tokens),
    }
    return replace(receipt, predicted=tuple(replace(term, actual=actual.get(term.name.replace("_q90", ""))) for term in predicted))


def learn(predictor: LoadPredictor, lengths: OutputLengths, tracked: Tracked, receipt: Receipt, now_s: float) -> None:
    """Teaches the predictor from a request that ran undisturbed, in one attempt. A hand-off's gap is no decode step.

    What was not predicted at arrival says nothing of waits: its worker came later, or its receipt counts from another's arrival.
    """
    placement, first = tracked.placement, tracked.first_assignment
    assert placement is not None
    assert first is not None
    request, model, is_guess = tracked.request, tracked.request.model, placement.assignment.is_guess
    produced = receipt.output_tokens - len(request.resume_token_ids)
    if receipt.ttft_s > 0.0 and tracked.is_predicted:
        predictor.observe(PredictionKind.QUEUE, model, first.queue, receipt.queue_s, now_s, is_guess=first.is_guess)
        predictor.observe(PredictionKind.TTFT, model, first.ttft, receipt.ttft_s, now_s, is_guess=first.is_guess)
        predictor.observe_dispatch(model, receipt.dispatch_s)
    if receipt.prefill_s > 0.0:
        predictor.observe(PredictionKind.PREFILL, model, placement.prefill_s, receipt.prefill_s, now_s, is_guess=is_guess)
    if receipt.handed_off and placement.handoff_gap is not None and receipt.handoff_gap_s > 0.0:
        blocks = len(tracked.block_hashes)
        predictor.observe(PredictionKind.HANDOFF_GAP, model, placement.handoff_gap, receipt.handoff_gap_s, now_s)
        predictor.observe_handoff_gap(model, blocks=blocks, is_same_node=placement.is_same_node, gap_s=receipt.handoff_gap_s)
        _learn_transfer(predictor, placement, receipt, now_s)
    if request.sampling.n > 1:
        return
    steps = produced - 1 - receipt.handed_off
    decoding_s = receipt.e2e_s - receipt.ttft_s - receipt.handoff_gap_s
    if steps > 0 and decoding_s > 0.0:
        predictor.observe(PredictionKind.TPOT, model, placement.tpot, decoding_s / steps, now_s)
    if receipt.e2e_s > 0.0 and tracked.is_predicted:
        predictor.observe(PredictionKind.E2E, model, placement.e2e, receipt.e2e_s, now_s, is_guess=is_guess)
    predictor.observe_output(model, placement.output, produced, now_s)
    lengths.observe(tracked.length_key, produced, expected_tokens=request.expected_output_tokens)


def _learn_transfer(predictor: LoadPredictor, placement: Placement, receipt: Receipt, now_s: float) -> None:
    """What a hand-off waits for is the last chunk's blocks: those of chunks before it came while the prompt was computed."""
    engine = placement.worker.engine
    chunk_bytes = -(-engine.max_num_batched_tokens // engine.block_size_tokens) * engine.kv_block_bytes
    size_bytes = min(receipt.kv_bytes_shipped, chunk_bytes)
    if size_bytes and receipt.transfer_s > 0.0:
        model = placement.worker.model
        predicted = predictor.transfer(model, size_bytes=size_bytes, is_same_node=placement.is_same_node)
        predictor.observe(PredictionKind.TRANSFER, model, predicted, receipt.transfer_s, now_s)
        predictor.observe_transfer(model, size_bytes=size_bytes, is_same_node=placement.is_same_node, transfer_s=receipt.transfer_s)
