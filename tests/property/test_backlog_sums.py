"""Work ahead of a worker after any sequence of prompts: never negative, never more than was sent, never growing by itself."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.backlog import Backlog
from router.ledger import BookingKey
from tandem.domain import ReplicaId, RequestId

P0 = ReplicaId("p0")


class BacklogEvents(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog()
        self.backlog.add_replica(P0)
        self.now_s = 0.0
        self.sent: dict[BookingKey, tuple[float, int]] = {}
        self.number = 0

    @rule(work_s=st.floats(0.0, 1000.0), tokens=st.integers(1, 5000))
    def start(self, work_s: float, tokens: int) -> None:
        before_s = self.backlog.ahead_s(P0, self.now_s)
        self.number += 1
        key = (RequestId(f"r{self.number}"), 1)
        self.sent[key] = (work_s, tokens)
        self.backlog.start(P0, key, work_s=work_s, tokens=tokens, now_s=self.now_s)
        assert math.isclose(self.backlog.ahead_s(P0, self.now_s), before_s + work_s, abs_tol=1e-6)

    @rule(index=st.integers(0, 5), is_again=st.booleans())
    def end(self, index: int, is_again: bool) -> None:
        if index >= len(self.sent):
            return
        key = list(self.sent)[index]
        del self.sent[key]
        before_s = self.backlog.ahead_s(P0, self.now_s)
        for _ in range(1 + is_again):
            self.backlog.end(P0, key, self.now_s)
        assert self.backlog.ahead_s(P0, self.now_s) <= before_s + 1e-6

    @rule(seconds=st.floats(0.0, 100.0))
    def wait(self, seconds: float) -> None:
        before_s = self.backlog.ahead_s(P0, self.now_s)
        self.now_s += seconds
        after_s = self.backlog.ahead_s(P0, self.now_s)
        assert before_s - seconds - 1e-6 <= after_s <= before_s

    @rule()
    def restart(self) -> None:
        self.backlog.add_replica(P0)
        self.sent = {}

    @invariant()
    def the_sums_are_the_sums(self) -> None:
        self.backlog.check_invariants()
        sent_s = sum(work_s for work_s, _ in self.sent.values())
        assert self.backlog.tokens(P0) == sum(tokens for _, tokens in self.sent.values())
        assert 0.0 <= self.backlog.ahead_s(P0, self.now_s) <= sent_s + 1e-6
        assert bool(self.sent) or self.backlog.ahead_s(P0, self.now_s) == 0.0


BacklogEvents.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestBacklogEvents = BacklogEvents.TestCase
