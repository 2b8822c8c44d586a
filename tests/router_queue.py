"""Router parts with requests that wait: who goes when, without a core."""

from router.config import RouterConfig
from router.tracked import Tracked
from router.turns import Turn, Turns
from tandem.domain import ReplicaId
from tests.router_parts import HANDING_OFF, FixedShares, RouterParts

P0, P1, D0 = ReplicaId("prefill-0"), ReplicaId("prefill-1"), ReplicaId("decode-0")


class Queue(RouterParts):
    """Parts, and the requests that wait."""

    def __init__(self, *replicas: str, config: RouterConfig = HANDING_OFF, shares: FixedShares | None = None) -> None:
        super().__init__(*replicas, config=config)
        self.queue: Turns = self.turns(shares)

    def wait(self, *waits: Tracked, now_s: float = 0.0) -> float:
        """They wait from now on; answers the seconds of the last one's prefill."""
        work_s = 0.0
        for tracked in waits:
            self.requests[tracked.request.request_id] = tracked
            work_s = self.queue.line_up(tracked, self.planner.try_assign(tracked, now_s), now_s)
            self.lines.check_invariants()
        return work_s

    def next(self, replica_id: ReplicaId = P0, now_s: float = 0.0, *, has_slot: bool = True) -> Turn | None:
        return self.queue.try_next(replica_id, now_s, has_slot=has_slot)

    def go(self, replica_id: ReplicaId = P0, now_s: float = 0.0) -> list[str]:
        """Everybody of the line whose turn it is, with what they add booked as the core does it."""
        gone = []
        while (turn := self.next(replica_id, now_s)) is not None:
            tracked = turn.tracked
            self.queue.leave(tracked)
            self.lines.check_invariants()
            if turn.placement is not None:
                assignment = turn.placement.assignment
                tokens = assignment.uncached_tokens
                self.backlog.start(replica_id, (tracked.request.request_id, 1), work_s=assignment.own_s, tokens=tokens, now_s=now_s)
            gone.append(str(tracked.request.request_id))
        return gone
