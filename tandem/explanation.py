"""Why a request went where it went: the plan, the candidates with their terms, and what it came to. Plain values from `Router.Explain`."""

from dataclasses import dataclass
from enum import StrEnum

from tandem.convert import plan_from_pb, plan_to_pb, receipt_from_pb, receipt_to_pb
from tandem.domain import Plan, PlannedWorker, PredictedTerm, Receipt, RequestState
from tandem.errors import ProtocolError
from tandem.v1 import common_pb2, router_pb2
from tandem.wire import from_message, to_message


class Part(StrEnum):
    """What of a request a worker was considered for."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker that was considered for a part of the request. Terms in seconds and tokens, as named."""

    worker: PlannedWorker
    part: Part
    is_chosen: bool
    terms: tuple[PredictedTerm, ...]

    def term(self, name: str) -> float | None:
        """None where it has none of that name."""
        return next((term.predicted for term in self.terms if term.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Of one request's last attempt, or its wait. Candidates for the prompt first, each part's best first.

    `request_id` is the router's own: what was asked for, and what the router added to it. `reason` and `message` are those of the error
    that it failed or was refused with. No plan: no worker has been given it; `predicted` has then what was expected of its wait.
    """

    request_id: str
    state: RequestState
    reason: str
    message: str
    plan: Plan | None
    candidates: tuple[Candidate, ...]
    receipt: Receipt | None
    predicted: tuple[PredictedTerm, ...]


def explanation_to_pb(explanation: Explanation) -> router_pb2.ExplainResponse:
    """Raises InvalidRequestError naming the field."""
    message = router_pb2.ExplainResponse(
        request_id=explanation.request_id,
        state=explanation.state,
        reason=explanation.reason,
        message=explanation.message,
        predicted=[to_message(common_pb2.PredictedTerm, "predicted", term) for term in explanation.predicted],
    )
    if explanation.plan is not None:
        message.plan.CopyFrom(plan_to_pb(explanation.plan))
    for candidate in explanation.candidates:
        worker = to_message(common_pb2.PlannedWorker, "candidate", candidate.worker)
        terms = [to_message(common_pb2.PredictedTerm, "terms", term) for term in candidate.terms]
        parts = (Part.PREFILL, Part.DECODE) if candidate.part is Part.BOTH else (candidate.part,)
        message.candidates.append(router_pb2.Candidate(terms=terms, is_chosen=candidate.is_chosen, **dict.fromkeys(parts, worker)))
    if explanation.receipt is not None:
        message.receipt.CopyFrom(receipt_to_pb(explanation.receipt))
    return message


def explanation_from_pb(message: router_pb2.ExplainResponse) -> Explanation:
    """Raises ProtocolError where a plan has no decode worker, or the state is none that is known."""
    try:
        state = RequestState(message.state)
    except ValueError:
        raise ProtocolError(f"an explanation has the unknown state {message.state!r}") from None
    return Explanation(
        request_id=message.request_id,
        state=state,
        reason=message.reason,
        message=message.message,
        plan=plan_from_pb(message.plan) if message.HasField("plan") else None,
        candidates=tuple(_candidate(candidate) for candidate in message.candidates),
        receipt=receipt_from_pb(message.receipt) if message.HasField("receipt") else None,
        predicted=tuple(from_message(PredictedTerm, term) for term in message.predicted),
    )


def _candidate(message: router_pb2.Candidate) -> Candidate:
    decodes, prefills = message.HasField("decode"), message.HasField("prefill")
    return Candidate(
        worker=from_message(PlannedWorker, message.decode if decodes else message.prefill),
        part=Part.BOTH if decodes and prefills else Part.DECODE if decodes else Part.PREFILL,
        is_chosen=message.is_chosen,
        terms=tuple(from_message(PredictedTerm, term) for term in message.terms),
    )
