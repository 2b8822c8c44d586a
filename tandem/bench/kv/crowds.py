"""The store when it is full, and when two writers and two readers use it at once."""

import time

from tandem.bench.kv.memcpy_bound import MemcpyBound
from tandem.bench.kv.options import BATCH_BLOCKS, KvBenchOptions
from tandem.bench.kv.our_sides import BOTH_PAIRS, OurSides
from tandem.bench.kv.processes import ProcessSides
from tandem.bench.kv.rows import gbps, rates_row, spread
from tandem.bench.kv.span import Span
from tandem.bench.kv.turns import Counter, Steps, System, put_and_get, take_turns

_FILLED = 1.25  # of the capacity, so that eviction has begun
_READY_S = 0.05  # from the commands to the moment when all begin


def steps_of(options: KvBenchOptions) -> int:
    """Steps that both measurements take."""
    return 2 * len(options.pressed_block_sizes) * (options.repetitions + 1)


def measure_pressure(
    ours: OurSides, bound: MemcpyBound, options: KvBenchOptions, counter: Counter, steps: Steps
) -> list[dict[str, object]]:
    """Puts into a store that is full, so that each evicts something; what was just put must be there."""
    rows: list[dict[str, object]] = []
    for block_bytes in options.pressed_block_sizes:
        words = f"a full store, {block_bytes >> 10} KiB"
        with ours.stores((True,)) as (system,):
            steps.begin(words)
            blocks = options.buffer_bytes // block_bytes
            span = Span(first=0, blocks=blocks, block_bytes=block_bytes, batch_blocks=BATCH_BLOCKS, store=system.store)
            unstored = 0
            for _ in range(int(_FILLED * options.capacity_bytes / span.total_bytes) + 1):
                filler = Span(first=counter.take(blocks), blocks=blocks, block_bytes=block_bytes, batch_blocks=32, store=system.store)
                unstored += system.sides.call("writer", do="put", span=filler.as_json())["bad"]

            def begin() -> None:
                steps.begin(words)  # noqa: B023 - called in this turn of the loop only
                steps.done()

            turns = take_turns([system], bound, span, repetitions=options.repetitions, counter=counter, begin=begin, is_dropped=False)
        figures = rates_row(turns.by_system[system.name], turns.memcpy_gbps)
        rows.append({"kind": "ours", "block_bytes": block_bytes, "checksum": True, **figures, "unstored_while_filling_blocks": unstored})
    return rows


def measure_contention(ours: OurSides, options: KvBenchOptions, counter: Counter, steps: Steps) -> list[dict[str, object]]:
    """Two writers of new blocks and two readers of held ones begin at one moment; all blocks are compared afterwards.

    `summed_gbps`: the bytes of all four over the time from the first begin to the last end.
    """
    rows: list[dict[str, object]] = []
    for block_bytes in options.pressed_block_sizes:
        moved: dict[str, list[float]] = {role: [] for role in BOTH_PAIRS}
        summed: list[float] = []
        errors = 0
        with ours.stores((True,), BOTH_PAIRS) as (system,):
            for repetition in range(options.repetitions + 1):
                steps.begin(f"two writers, two readers, {block_bytes >> 10} KiB")
                rates, total_gbps, bad = _crowd(ours.sides, system, block_bytes, options, counter)
                errors += bad
                if repetition:
                    summed.append(total_gbps)
                    for role, rate in rates.items():
                        moved[role].append(rate)
                steps.done()
        processes = {role: spread("gbps", rates) for role, rates in moved.items()}
        rows.append(
            {
                "kind": "ours",
                "block_bytes": block_bytes,
                "checksum": True,
                "processes": processes,
                **spread("summed_gbps", summed),
                "errors": errors,
            }
        )
    return rows


def _crowd(
    sides: ProcessSides, system: System, block_bytes: int, options: KvBenchOptions, counter: Counter
) -> tuple[dict[str, float], float, int]:
    blocks = max(1, options.buffer_bytes // 2 // block_bytes)

    def new_span() -> Span:
        return Span(first=counter.take(blocks), blocks=blocks, block_bytes=block_bytes, batch_blocks=BATCH_BLOCKS, store=system.store)

    held, stamp = new_span(), counter.take()
    _, _, errors = put_and_get(sides, held, stamp, is_dropped=False)
    sides.call("writer-2", do="fill", stamp=stamp)
    work = {"writer": new_span(), "writer-2": new_span(), "reader": held, "reader-2": held}
    at_s = time.monotonic() + _READY_S
    for role, span in work.items():
        verb = "put" if role.startswith("writer") else "get"
        sides.processes[role].send({"do": verb, "span": span.as_json(), "at_s": at_s})
    answers = {role: sides.processes[role].answer() for role in work}
    errors += sum(answer["bad"] for answer in answers.values())
    for role in ("reader", "reader-2"):
        errors += sides.call(role, do="verify", span=held.as_json(), stamp=stamp)["bad"]
    for role in ("writer", "writer-2"):
        words = work[role].as_json()
        errors += sides.call("reader", do="get", span=words)["bad"] + sides.call("reader", do="verify", span=words, stamp=stamp)["bad"]
        sides.call("writer", do="drop", span=words)
    sides.call("writer", do="drop", span=held.as_json())
    rates = {role: gbps(held.total_bytes, answer["end_s"] - answer["begin_s"]) for role, answer in answers.items()}
    window_s = max(answer["end_s"] for answer in answers.values()) - min(answer["begin_s"] for answer in answers.values())
    return rates, gbps(len(work) * held.total_bytes, window_s), errors
