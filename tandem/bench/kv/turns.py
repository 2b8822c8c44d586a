"""Turns: memcpy and each system once a repetition, so that whatever the machine does meanwhile meets all of them.

Must not format reports.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tandem.bench.kv.memcpy_bound import MemcpyBound
from tandem.bench.kv.processes import SideError, Sides
from tandem.bench.kv.rows import Samples, gbps
from tandem.bench.kv.span import Span


class Counter:
    """Key numbers and stamps, none of them given twice in a run."""

    def __init__(self) -> None:
        self._next = 1

    def take(self, count: int = 1) -> int:
        """The first of `count` numbers that are now the caller's."""
        first = self._next
        self._next += count
        return first


class Steps:
    """How far the run is; `show` gets words, steps done and steps in all."""

    def __init__(self, total: int, show: Callable[[str, int, int], None]) -> None:
        self._total = total
        self._done = 0
        self._show = show

    def begin(self, words: str) -> None:
        """Says what comes now."""
        self._show(words, self._done, self._total)

    def done(self, count: int = 1) -> None:
        """That many steps are behind us; left out counts too."""
        self._done += count


@dataclass(slots=True, kw_only=True)
class System:
    """A store that takes turns; `failure`: why it takes none any more, which only a peer may."""

    name: str
    sides: Sides
    store: str = ""
    is_peer: bool = False
    failure: str | None = None


@dataclass(slots=True, kw_only=True)
class Turns:
    """What came of the repetitions with one block size."""

    memcpy_gbps: list[float] = field(default_factory=list)
    by_system: dict[str, Samples] = field(default_factory=dict)


def take_turns(
    systems: Sequence[System],
    bound: MemcpyBound,
    span: Span,
    *,
    repetitions: int,
    counter: Counter,
    begin: Callable[[], None],
    is_dropped: bool = True,
) -> Turns:
    """One repetition that does not count, then `repetitions`; who begins changes. `span` tells sizes, its keys are made anew.

    `is_dropped`: blocks are taken out after their turn, so that nothing is ever evicted. Raises SideError where a system fails that is no
    peer.
    """
    turns = Turns(by_system={system.name: Samples() for system in systems})
    for repetition in range(repetitions + 1):
        begin()
        is_counted = repetition > 0
        for place in range(len(systems) + 1):
            turn = (place + repetition) % (len(systems) + 1)
            if turn == len(systems):
                rate = bound.copy_gbps(span.block_bytes)
                if is_counted:
                    turns.memcpy_gbps.append(rate)
            elif systems[turn].failure is None:
                samples = turns.by_system[systems[turn].name]
                _take_turn(systems[turn], span, counter, samples, is_counted=is_counted, is_dropped=is_dropped)
    return turns


def _take_turn(system: System, span: Span, counter: Counter, samples: Samples, *, is_counted: bool, is_dropped: bool) -> None:
    fresh = Span(
        first=counter.take(span.blocks),
        blocks=span.blocks,
        block_bytes=span.block_bytes,
        batch_blocks=span.batch_blocks,
        store=system.store,
    )
    try:
        put_gbps, get_gbps, errors = put_and_get(system.sides, fresh, counter.take(), is_dropped=is_dropped)
    except SideError as error:
        if not system.is_peer:
            raise
        system.failure = str(error)
        return
    samples.errors += errors
    if is_counted:
        samples.put_gbps.append(put_gbps)
        samples.get_gbps.append(get_gbps)


def put_and_get(sides: Sides, span: Span, stamp: int, *, is_dropped: bool) -> tuple[float, float, int]:
    """New bytes, put by the writer, got by the reader and compared there: GB/s of put and get, and blocks not as they must be.

    A block that did not come is an error twice: it is also not what it must be.
    """
    words = span.as_json()
    sides.call("writer", do="fill", stamp=stamp)
    put = sides.call("writer", do="put", span=words)
    got = sides.call("reader", do="get", span=words)
    errors = put["bad"] + got["bad"] + sides.call("reader", do="verify", span=words, stamp=stamp)["bad"]
    if is_dropped:
        sides.call("writer", do="drop", span=words)
    return gbps(span.total_bytes, put["end_s"] - put["begin_s"]), gbps(span.total_bytes, got["end_s"] - got["begin_s"]), errors
