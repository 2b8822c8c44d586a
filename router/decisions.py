"""The last decisions, to be asked for: what was planned, which candidates there were, how it ended. Must not decide."""

from collections import OrderedDict
from dataclasses import dataclass

from router.placement import Placement
from tandem.domain import Plan, Receipt, RequestId


@dataclass(slots=True)
class Decision:
    """The last attempt of one request; no receipt: it has not ended well, or not yet."""

    plan: Plan
    placement: Placement
    receipt: Receipt | None = None


class Decisions:
    """Of the last `max_requests` dispatched requests."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._decisions: OrderedDict[RequestId, Decision] = OrderedDict()

    def __len__(self) -> int:
        return len(self._decisions)

    def get(self, request_id: RequestId) -> Decision | None:
        """None where it is not remembered."""
        return self._decisions.get(request_id)

    def placed(self, request_id: RequestId, plan: Plan, placement: Placement) -> None:
        """An attempt begins; an older one of the id is forgotten."""
        self._decisions.pop(request_id, None)
        self._decisions[request_id] = Decision(plan, placement)
        if len(self._decisions) > self._max_requests:
            self._decisions.popitem(last=False)

    def ended(self, request_id: RequestId, receipt: Receipt) -> None:
        """The attempt ended well."""
        decision = self._decisions.get(request_id)
        if decision is not None:
            decision.receipt = receipt
