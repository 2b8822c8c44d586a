"""With late reports the ledger's view is exact after every event; with lost ones it is exact again once all has settled.

Exact means: others' work by the last report that came, plus every own request that has ended neither here nor in that report.
"""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from router.ledger import BookingKey, Ledger
from tandem.domain import ReplicaId, RequestId, Stamp, StampKind, WorkerLoad

REPLICA = ReplicaId("r")
SETTLE_S = 5.0
KV_TOKENS, PREFILL_TOKENS = 10, 7


@dataclass
class _Worker:
    """A worker that counts right, and the ordered reports it has sent."""

    others: int = 0
    accepted: set[BookingKey] = field(default_factory=set)
    stamps: list[Stamp] = field(default_factory=list)
    sequence: int = 0

    def accept(self, key: BookingKey) -> None:
        self.accepted.add(key)
        self.stamps.append(Stamp(request_id=key[0], attempt=key[1], kind=StampKind.ACCEPTED))

    def finish(self, key: BookingKey) -> None:
        self.accepted.remove(key)
        self.stamps.append(Stamp(request_id=key[0], attempt=key[1], kind=StampKind.FINISHED))

    def report(self) -> tuple[int, int, WorkerLoad, list[Stamp]]:
        self.sequence += 1
        stamps, self.stamps = self.stamps, []
        running = self.others + len(self.accepted)
        load = WorkerLoad(running_requests=running, kv_tokens=running * KV_TOKENS, pending_prefill_tokens=running * PREFILL_TOKENS)
        return self.sequence, self.others, load, stamps


class _Run:
    """One run of events; `is_lossy` lets reports vanish or come again, out of order."""

    def __init__(self, data: st.DataObject, *, is_lossy: bool) -> None:
        self.data = data
        self.is_lossy = is_lossy
        self.ledger = Ledger(SETTLE_S)
        self.ledger.add_replica(REPLICA, 1)
        self.worker = _Worker()
        self.on_the_way: list[tuple[int, int, WorkerLoad, list[Stamp]]] = []
        self.live: set[BookingKey] = set()  # not released here
        self.unsent: set[BookingKey] = set()  # the worker may still accept these
        self.known_finished: set[BookingKey] = set()
        self.others_seen = 0
        self.number = 0

    def step(self) -> None:
        action = self.data.draw(st.sampled_from(("book", "accept", "finish", "release", "others", "report", "deliver", "deliver")))
        getattr(self, f"_{action}")()
        self.ledger.check_invariants()

    def _pick(self, keys: set[BookingKey]) -> BookingKey | None:
        return self.data.draw(st.sampled_from(sorted(keys))) if keys else None

    def _book(self) -> None:
        self.number += 1
        key = (RequestId(f"q{self.number}"), 1)
        self.ledger.book(REPLICA, key, prefill_tokens=PREFILL_TOKENS, kv_tokens=KV_TOKENS)
        self.live.add(key)
        self.unsent.add(key)

    def _accept(self) -> None:
        if (key := self._pick(self.unsent)) is not None:
            self.unsent.remove(key)
            self.worker.accept(key)

    def _finish(self) -> None:
        if (key := self._pick(self.worker.accepted)) is not None:
            self.worker.finish(key)

    def _release(self) -> None:
        if (key := self._pick(self.live)) is not None:
            self.live.remove(key)
            self.ledger.release(REPLICA, key, 0.0)

    def _others(self) -> None:
        self.worker.others = self.data.draw(st.integers(0, 5))

    def _report(self) -> None:
        self.on_the_way.append(self.worker.report())

    def _deliver(self) -> None:
        if not self.on_the_way:
            return
        index = self.data.draw(st.integers(0, len(self.on_the_way) - 1)) if self.is_lossy else 0
        sequence, others, load, stamps = self.on_the_way.pop(index)
        if self.ledger.report(REPLICA, 1, sequence, load, stamps):
            self.others_seen = others
            self.known_finished |= {(stamp.request_id, stamp.attempt) for stamp in stamps if stamp.kind is StampKind.FINISHED}

    def expect_exact(self) -> None:
        view = self.ledger.view(REPLICA)
        requests = self.others_seen + len(self.live - self.known_finished)
        assert (view.running_requests, view.kv_tokens, view.pending_prefill_tokens) == (
            requests,
            requests * KV_TOKENS,
            requests * PREFILL_TOKENS,
        )


@given(st.data(), st.integers(0, 40))
def test_late_reports_leave_the_view_exact_at_every_moment(data: st.DataObject, steps: int) -> None:
    run = _Run(data, is_lossy=False)
    for _ in range(steps):
        run.step()
        run.expect_exact()


@given(st.data(), st.integers(0, 40))
def test_lost_and_reordered_reports_leave_nothing_behind(data: st.DataObject, steps: int) -> None:
    run = _Run(data, is_lossy=True)
    for _ in range(steps):
        run.step()
    for key in sorted(run.live):
        run.ledger.release(REPLICA, key, 0.0)
    for key in sorted(run.worker.accepted):
        run.worker.finish(key)
    run.ledger.expire(SETTLE_S)
    assert run.ledger.settling() == 0
    sequence, others, load, stamps = run.worker.report()
    assert run.ledger.report(REPLICA, 1, sequence, load, stamps)
    assert run.ledger.view(REPLICA).running_requests == others
