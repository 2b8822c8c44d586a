"""Room on a decode worker that is kept for a request which has waited for some: until it goes, whoever is first in its line."""

from typing import Any

import pytest

from router.tracked import Tracked
from tandem.domain import ReplicaId, Slo, WorkerLoad
from tests.router_parts import FixedShares, make_tracked
from tests.router_queue import D0, P0, P1, Queue


class TestReserving:
    """A prompt of 4,000 tokens finds no room on decode workers of 6,000 tokens that hold 3,000 each."""

    def full(self) -> tuple[Queue, Tracked]:
        parts = Queue("prefill-0", "prefill-1", "decode-0", "decode-1")
        for name, kv_tokens in (("decode-0", 3100), ("decode-1", 3000)):
            parts.engine(name, kv_blocks=188)
            parts.report(name, running_requests=2, kv_tokens=kv_tokens)
        large = make_tracked("large", 4000, expected_output_tokens=16)
        parts.wait(large)
        return parts, large

    def small(self, parts: Queue) -> Tracked:
        return make_tracked("small", 100, expected_output_tokens=16, arrival=2)

    def test_smaller_ones_pass_it_for_a_while_and_then_leave_it_the_emptiest_worker(self) -> None:
        parts, _ = self.full()
        small = self.small(parts)
        parts.wait(small)
        assert small.assignment is not None
        line = small.assignment.worker.replica_id
        for now_s, decode in ((0.0, "decode-1"), (4.9, "decode-1"), (5.0, "decode-0")):
            assert parts.next(P0, now_s) is None
            turn = parts.next(line, now_s)
            assert turn is not None
            assert turn.placement is not None
            assert turn.placement.decode.replica_id == decode

    def test_it_goes_there_once_it_fits_and_the_worker_is_everybodys_again(self) -> None:
        parts, large = self.full()
        for now_s in (0.0, 5.0):
            assert parts.next(P0, now_s) is None
        assert parts.ledger.report(ReplicaId("decode-1"), 1, 2, WorkerLoad(running_requests=1, kv_tokens=100))
        assert parts.go(P0, 6.0) == ["large"]
        assert parts.queue.lines_due((), 6.0) == []
        assert large.assignment is None
        parts.wait(self.small(parts), now_s=6.0)
        turn = parts.next(P1, 6.0) or parts.next(P0, 7.0)
        assert turn is not None
        assert turn.placement is not None
        assert turn.placement.decode.replica_id == "decode-1"

    def test_the_worker_that_serves_it_alone_is_kept_for_it(self) -> None:
        parts = Queue("decode-0")
        parts.report("decode-0", running_requests=64)
        parts.wait(make_tracked("large", 40, arrival=1), make_tracked("small", 10, arrival=2, priority=1))
        for now_s in (0.0, 5.0):
            assert parts.next(D0, now_s) is None
        assert parts.ledger.report(D0, 1, 2, WorkerLoad(running_requests=1))
        assert parts.go(D0, 6.0) == ["large", "small"]

    @pytest.mark.parametrize(
        ("of_large", "of_small"),
        [
            ({}, {"priority": -1}),
            ({"tenant": "b"}, {"tenant": "a"}),
            ({"slo": Slo(ttft_s=1.0), "ttft_s": 1.0}, {}),
        ],
        ids=["a class above", "a tenant that has had less", "in time where it is late"],
    )
    def test_who_is_first_in_its_line_does_not_keep_it_from_there(self, of_large: dict[str, Any], of_small: dict[str, Any]) -> None:
        parts = Queue("prefill-0", "decode-0", shares=FixedShares("a", "b", others_first="b"))
        parts.engine("decode-0", kv_blocks=188)
        parts.report("decode-0", running_requests=2, kv_tokens=3100)
        parts.wait(make_tracked("large", 4000, expected_output_tokens=16, **of_large))
        for now_s in (0.0, 5.0):
            assert parts.next(P0, now_s) is None
        parts.wait(make_tracked("small", 100, expected_output_tokens=16, arrival=2, arrived_s=5.5, **of_small), now_s=5.5)
        assert parts.next(P0, 6.0) is None  # the worker is kept for the large one, which has no room there yet
        assert parts.ledger.report(D0, 1, 2, WorkerLoad(running_requests=1, kv_tokens=100))
        turn = parts.next(P0, 7.0)
        assert turn is not None
        assert turn.tracked.request.request_id == "large"

    def test_what_waited_for_room_and_went_may_wait_as_long_again(self) -> None:
        parts, large = self.full()
        for now_s in (0.0, 5.0):
            assert parts.next(P0, now_s) is None
        parts.queue.leave(large)
        parts.wait(large, now_s=20.0)
        parts.next(P0, 20.0)
        small = self.small(parts)
        parts.wait(small, now_s=20.0)
        assert small.assignment is not None
        turn = parts.next(small.assignment.worker.replica_id, 21.0)
        assert turn is not None
        assert turn.placement is not None
        assert turn.placement.decode.replica_id == "decode-1"

    def test_nothing_is_kept_where_no_decode_worker_is_left(self) -> None:
        parts, _ = self.full()
        parts.next(P0, 0.0)
        for name in ("decode-0", "decode-1"):
            parts.fleet.lose(ReplicaId(name), 1, 0.0)
        parts.report("prefill-0", running_requests=64)
        assert parts.next(P0, 5.0) is None  # its prefill worker would do both, and is full
        assert parts.ledger.report(P0, 1, 2, WorkerLoad())
        assert parts.next(P0, 6.0) is not None
