"""The numbers of a request: predicted terms, the receipt they end in, and what the predictor learns from it.

Must not measure: times come in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.placement import Placement
from router.predict import Predictor
from tandem.domain import PredictedTerm, Receipt, Request


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


def predicted_terms(placement: Placement, predicted_queue_s: float) -> tuple[PredictedTerm, ...]:
    """Seconds by the receipt's names; backlog_s is the part of prefill_s that is spent behind other requests."""
    terms = {
        "queue_s": predicted_queue_s,
        "backlog_s": placement.backlog_s,
        "prefill_s": placement.prefill_s,
        "ttft_s": predicted_queue_s + placement.prefill_s,
        "tpot_s": placement.tpot_s,
    }
    return tuple(PredictedTerm(name=name, predicted=seconds) for name, seconds in terms.items())


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
    actual = {"queue_s": receipt.queue_s, "prefill_s": prefill_s, "ttft_s": first_s, "tpot_s": tpot_s}
    return replace(receipt, predicted=tuple(replace(term, actual=actual.get(term.name)) for term in predicted))


def learn(predictor: Predictor, request: Request, placement: Placement, receipt: Receipt) -> None:
    """Teaches the predictor from a request that ran undisturbed. A hand-off's gap is no decode step."""
    uncached_tokens = max(1, request.total_tokens - receipt.cached_tokens)
    if receipt.prefill_s > 0.0:
        predictor.observe_prefill(
            request.model,
            uncached_tokens=uncached_tokens,
            context_tokens=request.total_tokens,
            ahead_tokens=placement.ahead_tokens,
            measured_s=receipt.prefill_s,
        )
    steps = receipt.output_tokens - len(request.resume_token_ids) - 1 - receipt.handed_off
    decoding_s = receipt.e2e_s - receipt.ttft_s - receipt.handoff_gap_s
    if steps > 0 and decoding_s > 0.0 and request.sampling.n == 1:
        predictor.observe_decode(
            request.model,
            batch_requests=placement.batch_requests,
            kv_tokens=placement.kv_tokens,
            measured_s=decoding_s / steps,
        )
