"""The last requests, to be asked for: what was planned, which candidates there were, how it ended. Must not decide."""

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from router.placement import Assignment, Placement
from router.tracked import Tracked
from tandem.domain import MAX_REQUEST_ID_CHARS, Plan, Receipt, RequestId, RequestState
from tandem.errors import TandemError

_ADDED = re.compile(r"(-[0-9a-f]{8})?(-[0-9]{1,3})?(#[0-9]{1,2})?")  # HTTP call and prompt (openai_request.py), choice (choices.py)
_CHOICE = re.compile(r"#[0-9]{1,2}$")
_LEAST_KEPT_CHARS = 112  # of a long id; its end gives way to what is added


class Failure(NamedTuple):
    """What an error said. Not the error itself: its traceback would keep the request's prompt."""

    reason: str
    message: str


@dataclass(slots=True)
class Decision:
    """What is known of one request: of its last attempt, or of its wait for the first one."""

    tracked: Tracked | None  # until it ends
    plan: Plan | None = None
    placement: Placement | None = None
    receipt: Receipt | None = None
    failure: Failure | None = None
    was_waiting_for: Assignment | None = None

    @property
    def state(self) -> RequestState:
        """Where it stands."""
        if self.tracked is not None:
            return RequestState.WAITING if self.tracked.placement is None else RequestState.RUNNING
        if self.receipt is not None:
            return RequestState.FINISHED
        if self.failure is None:
            return RequestState.CANCELLED
        return RequestState.REFUSED if self.plan is None else RequestState.FAILED

    @property
    def assignment(self) -> Assignment | None:
        """In whose line it waits, or waited last; None: in nobody's."""
        if self.state is RequestState.WAITING and self.tracked is not None:
            return self.tracked.assignment
        return self.was_waiting_for or (None if self.placement is None else self.placement.assignment)


class Decisions:
    """Of the last `max_requests` requests, counted from when each was last given to a worker, or came."""

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests
        self._decisions: OrderedDict[RequestId, Decision] = OrderedDict()

    def __len__(self) -> int:
        return len(self._decisions)

    def get(self, request_id: RequestId) -> Decision | None:
        """None where it is not remembered."""
        return self._decisions.get(request_id)

    def find(self, seen_id: str) -> tuple[RequestId, Decision] | None:
        """The request by the id that its caller saw, and its own id, to which the router may have added something; O(requests).

        Of several the newest, of its choices the first; None where none is remembered.
        """
        exact = self._decisions.get(RequestId(seen_id))
        if exact is not None:
            return RequestId(seen_id), exact
        seen_chars = min(len(seen_id), MAX_REQUEST_ID_CHARS)
        stems = [seen_id[:kept] for kept in range(min(seen_chars, _LEAST_KEPT_CHARS), seen_chars + 1)]
        for request_id, decision in reversed(self._decisions.items()):
            if any(request_id.startswith(stem) and _ADDED.fullmatch(request_id, len(stem)) for stem in stems):
                first_id = RequestId(_CHOICE.sub("#0", request_id))
                first = self._decisions.get(first_id)
                return (request_id, decision) if first is None else (first_id, first)
        return None

    def began(self, tracked: Tracked) -> None:
        """A request waits; an older one of its id is forgotten."""
        self._remember(tracked.request.request_id, Decision(tracked))

    def refused(self, request_id: RequestId, error: TandemError, assignment: Assignment | None) -> None:
        """A request was not even let wait; `assignment`: where it would have. Nothing where one of its id is being served."""
        known = self._decisions.get(request_id)
        if known is None or known.tracked is None:
            self._remember(request_id, Decision(None, failure=Failure(error.reason, error.message), was_waiting_for=assignment))

    def placed(self, tracked: Tracked, plan: Plan, placement: Placement) -> None:
        """An attempt begins."""
        self._remember(tracked.request.request_id, Decision(tracked, plan, placement))

    def ended(self, tracked: Tracked, outcome: Receipt | TandemError | None) -> None:
        """It ended well, with an error, or because its caller went away (None)."""
        decision = self._decisions.get(tracked.request.request_id)
        if decision is None or decision.tracked is not tracked:
            return
        decision.tracked, decision.was_waiting_for = None, tracked.assignment
        if isinstance(outcome, TandemError):
            decision.failure = Failure(outcome.reason, outcome.message)
        else:
            decision.receipt = outcome

    def _remember(self, request_id: RequestId, decision: Decision) -> None:
        self._decisions.pop(request_id, None)
        self._decisions[request_id] = decision
        if len(self._decisions) > self.max_requests:
            self._decisions.popitem(last=False)
