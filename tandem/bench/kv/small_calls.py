"""What one call costs: a single block of 64 KiB, and a lookup of 1,000 keys."""

from collections.abc import Sequence

from tandem.bench.kv.options import KvBenchOptions
from tandem.bench.kv.our_sides import OurSides
from tandem.bench.kv.processes import SideError
from tandem.bench.kv.rows import calls_us
from tandem.bench.kv.span import Span
from tandem.bench.kv.turns import Counter, Steps, System

_BLOCK_BYTES = 64 << 10
_ROUNDS = 4  # the first does not count
_LOOKUP_KEYS = 1000
_LOOKUP_CALLS = 50
STEPS = 2 * _ROUNDS


def measure_singles(
    ours: OurSides, peer: System | None, options: KvBenchOptions, counter: Counter, steps: Steps
) -> list[dict[str, object]]:
    """One block a call, put and got and compared at the reader; the systems take turns."""
    with ours.stores((True, False)) as stores:
        systems = [*stores, *([peer] if peer else [])]
        times: dict[str, tuple[list[float], list[float]]] = {system.name: ([], []) for system in systems}
        errors = dict.fromkeys(times, 0)
        for number in range(_ROUNDS):
            steps.begin("single blocks")
            for system in _working(systems):
                try:
                    puts_s, gets_s, bad = _single(system, options, counter)
                except SideError as error:
                    _note(system, error)
                    continue
                errors[system.name] += bad
                if number:
                    times[system.name][0].extend(puts_s)
                    times[system.name][1].extend(gets_s)
            steps.done()
    return [
        {
            **_described(system),
            "block_bytes": _BLOCK_BYTES,
            "calls": len(times[system.name][0]),
            **calls_us("put", times[system.name][0]),
            **calls_us("get", times[system.name][1]),
            "errors": errors[system.name],
        }
        for system in _working(systems)
    ]


def measure_lookups(
    ours: OurSides, peer: System | None, options: KvBenchOptions, counter: Counter, steps: Steps
) -> list[dict[str, object]]:
    """`contains` of 1,000 keys, every other one held, asked by a process that did not put them; answers are compared."""
    with ours.stores((True,)) as stores:
        systems = [*stores, *([peer] if peer else [])]
        times: dict[str, list[float]] = {system.name: [] for system in systems}
        errors = dict.fromkeys(times, 0)
        for number in range(_ROUNDS):
            steps.begin("lookups")
            for system in _working(systems):
                try:
                    calls_s, bad = _lookup(system, counter)
                except SideError as error:
                    _note(system, error)
                    continue
                errors[system.name] += bad
                if number:
                    times[system.name].extend(calls_s)
            steps.done()
    return [
        {
            **_described(system),
            "keys": _LOOKUP_KEYS,
            "held_keys": _LOOKUP_KEYS // 2,
            "calls": len(times[system.name]),
            **calls_us("lookup", times[system.name]),
            "errors": errors[system.name],
        }
        for system in _working(systems)
    ]


def _single(system: System, options: KvBenchOptions, counter: Counter) -> tuple[list[float], list[float], int]:
    blocks = options.single_blocks
    span = Span(first=counter.take(blocks), blocks=blocks, block_bytes=_BLOCK_BYTES, batch_blocks=1, store=system.store).as_json()
    stamp = counter.take()
    system.sides.call("writer", do="fill", stamp=stamp)
    put = system.sides.call("writer", do="put", span=span, calls_s=True)
    got = system.sides.call("reader", do="get", span=span, calls_s=True)
    wrong = system.sides.call("reader", do="verify", span=span, stamp=stamp)["bad"]
    system.sides.call("writer", do="drop", span=span)
    return put["calls_s"], got["calls_s"], put["bad"] + got["bad"] + wrong


def _lookup(system: System, counter: Counter) -> tuple[list[float], int]:
    held = _LOOKUP_KEYS // 2
    first, absent = counter.take(held), counter.take(held)
    # Small blocks: how large they are is nothing to a lookup, and all must fit a quick run's buffer.
    span = Span(first=first, blocks=held, block_bytes=8 << 10, batch_blocks=32, store=system.store).as_json()
    put = system.sides.call("writer", do="put", span=span)
    found = system.sides.call(
        "reader", do="lookup", store=system.store, keys=_LOOKUP_KEYS, held_first=first, absent_first=absent, calls=_LOOKUP_CALLS
    )
    system.sides.call("writer", do="drop", span=span)
    return found["calls_s"], put["bad"] + found["bad"]


def _working(systems: Sequence[System]) -> list[System]:
    return [system for system in systems if system.failure is None]


def _note(system: System, error: SideError) -> None:
    if not system.is_peer:
        raise error
    system.failure = str(error)


def _described(system: System) -> dict[str, object]:
    if system.is_peer:
        return {"kind": "peer", "peer": system.name}
    return {"kind": "ours", "checksum": system.store == "ours-checksum"}
