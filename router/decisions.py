"""The last decisions, to be asked for: what was planned, which candidates there were, how it ended. Must not decide."""

import re
from collections import OrderedDict
from dataclasses import dataclass

from router.placement import Placement
from tandem.domain import MAX_REQUEST_ID_CHARS, Plan, Receipt, RequestId

_ADDED = re.compile(r"(-[0-9a-f]{8})?(-[0-9]{1,3})?(#[0-9]{1,2})?")  # HTTP call and prompt (openai_request.py), choice (choices.py)
_CHOICE = re.compile(r"#[0-9]{1,2}$")
_LEAST_KEPT_CHARS = 112  # of a long id; its end gives way to what is added


@dataclass(slots=True)
class Decision:
    """The last attempt of one request; no receipt: it has not ended well, or not yet."""

    plan: Plan
    placement: Placement
    receipt: Receipt | None = None


class Decisions:
    """Of the last `max_requests` dispatched requests."""

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

    def placed(self, request_id: RequestId, plan: Plan, placement: Placement) -> None:
        """An attempt begins; an older one of the id is forgotten."""
        self._decisions.pop(request_id, None)
        self._decisions[request_id] = Decision(plan, placement)
        if len(self._decisions) > self.max_requests:
            self._decisions.popitem(last=False)

    def ended(self, request_id: RequestId, receipt: Receipt) -> None:
        """The attempt ended well."""
        decision = self._decisions.get(request_id)
        if decision is not None:
            decision.receipt = receipt
