"""One run of `tandem kv bench` from its options to its report. Must not print."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tandem.bench.kv import hooks
from tandem.bench.kv.conditions import measure_conditions
from tandem.bench.kv.crowds import measure_contention, measure_pressure, steps_of
from tandem.bench.kv.memcpy_bound import MemcpyBound
from tandem.bench.kv.options import BATCH_BLOCKS, KvBenchOptions
from tandem.bench.kv.our_sides import OurSides, running_our_sides, store_name
from tandem.bench.kv.peers import Peer, running_peer
from tandem.bench.kv.processes import SideError
from tandem.bench.kv.rows import error_count, peer_ratios, rates_row
from tandem.bench.kv.small_calls import STEPS, measure_lookups, measure_singles
from tandem.bench.kv.span import Span
from tandem.bench.kv.turns import Counter, Steps, System, Turns, take_turns
from tandem.errors import ConfigError, InternalError, Reason

SCHEMA = "tandem.kv_bench/1"
_SHARED_MEMORY = Path("/dev/shm")
_LATER_PEERS = ("redis", "ray")
_LEFT_OUT_WHEN_QUICK = ("ray",)

Report = dict[str, object]


def run_kv_bench(options: KvBenchOptions, progress: Callable[[str, int, int], None]) -> Report:
    """Measures everything and returns the report; `progress` gets words, steps done and steps in all.

    Raises ConfigError for wrong options or no room in shared memory, InternalError where a process of ours fails.
    """
    options.validate()
    _check_room(2 * options.capacity_bytes)  # two arenas at a time
    begin_s = time.monotonic()
    report: Report = {"schema": SCHEMA, "conditions": measure_conditions(options)}
    rounds = len(options.block_sizes) * (options.repetitions + 1)
    steps = Steps(rounds * (1 + len(_LATER_PEERS)) + STEPS + steps_of(options), progress)
    try:
        with tempfile.TemporaryDirectory(prefix="tandem-kv-bench-", dir=_SHARED_MEMORY) as folder:
            report |= _Run(options, steps).measure(Path(folder))
            for hook in (hooks.prefault, hooks.engine_layout, hooks.peer_fetch, hooks.native):
                steps.begin(hook.__name__.replace("_", " "))
                report[hook.__name__] = hook(options, Path(folder))
    except SideError as error:
        raise InternalError(f"the KV benchmark's own process failed: {error}") from error
    return {**report, "errors": error_count(report), "duration_s": time.monotonic() - begin_s}


def _check_room(needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(_SHARED_MEMORY).free
    if free_bytes < needed_bytes:
        message = (
            f"{_SHARED_MEMORY} has {free_bytes >> 20} MiB free and {needed_bytes >> 20} MiB are needed; give a smaller --capacity-bytes"
        )
        raise ConfigError(message, reason=Reason.NO_ROOM)


class _Run:
    """What the parts of one run share."""

    def __init__(self, options: KvBenchOptions, steps: Steps) -> None:
        self._options = options
        self._steps = steps
        self._counter = Counter()
        self._bound = MemcpyBound(options.memcpy_bytes)

    def measure(self, folder: Path) -> Report:
        options, counter, steps = self._options, self._counter, self._steps
        with running_our_sides(options, folder) as ours:
            with running_peer("mooncake", options) as mooncake:
                rows, peers = self._rows(ours, mooncake)
                single = measure_singles(ours, mooncake.system, options, counter, steps)
                lookup = measure_lookups(ours, mooncake.system, options, counter, steps)
            pressure = measure_pressure(ours, self._bound, options, counter, steps)
            contention = measure_contention(ours, options, counter, steps)
        for name in _LATER_PEERS:
            peers += self._later_peer(name)
        return {"rows": rows, "peers": peers, "pressure": pressure, "contention": contention, "lookup": lookup, "single": single}

    def _rows(self, ours: OurSides, mooncake: Peer) -> tuple[list[Report], list[Report]]:
        rows: list[Report] = []
        peers: list[Report] = []
        for block_bytes in self._options.block_sizes:
            words = f"memcpy, ours, mooncake, {block_bytes >> 10} KiB"
            with ours.stores((True, False)) as stores:
                turns = self._turns([*stores, *([mooncake.system] if mooncake.system else [])], block_bytes, words)
            peer_samples = turns.by_system.get("mooncake")
            for checksum in (True, False):
                samples = turns.by_system[store_name(checksum)]
                rows.append(
                    {
                        **{"kind": "ours", "layout": "contiguous", "block_bytes": block_bytes, "checksum": checksum},
                        **{"batch_blocks": BATCH_BLOCKS, "repetitions": len(samples.put_gbps)},
                        **rates_row(samples, turns.memcpy_gbps),
                        **peer_ratios("mooncake", samples, peer_samples),
                    }
                )
            peers += self._peer_rows(mooncake, turns, block_bytes)
        return rows, peers or [_absent(mooncake)]

    def _later_peer(self, name: str) -> list[Report]:
        steps_in_all = len(self._options.block_sizes) * (self._options.repetitions + 1)
        if self._options.is_quick and name in _LEFT_OUT_WHEN_QUICK:
            self._steps.done(steps_in_all)
            return [_absent(Peer(name=name, error="left out of a quick run"))]
        self._steps.begin(f"starting {name}")
        with running_peer(name, self._options) as peer:
            if peer.system is None:
                self._steps.done(steps_in_all)
                return [_absent(peer)]
            rows: list[Report] = []
            for block_bytes in self._options.block_sizes:
                turns = self._turns([peer.system], block_bytes, f"memcpy, {name}, {block_bytes >> 10} KiB", self._options.peer_bytes)
                rows += self._peer_rows(peer, turns, block_bytes)
        return rows or [_absent(peer)]

    def _turns(self, systems: list[System], block_bytes: int, words: str, total_bytes: int | None = None) -> Turns:
        blocks = (total_bytes or self._options.buffer_bytes) // block_bytes
        span = Span(first=0, blocks=blocks, block_bytes=block_bytes, batch_blocks=BATCH_BLOCKS)

        def begin() -> None:
            self._steps.begin(words)
            self._steps.done()

        return take_turns(systems, self._bound, span, repetitions=self._options.repetitions, counter=self._counter, begin=begin)

    def _peer_rows(self, peer: Peer, turns: Turns, block_bytes: int) -> list[Report]:
        """None where it did nothing with blocks of that size."""
        samples = turns.by_system.get(peer.name)
        if samples is None or not samples.put_gbps:
            return []
        about = {"kind": "peer", "peer": peer.name, **peer.facts, "block_bytes": block_bytes, "batch_blocks": BATCH_BLOCKS}
        failure = peer.system.failure if peer.system else None
        return [
            {
                **about,
                "repetitions": len(samples.put_gbps),
                **rates_row(samples, turns.memcpy_gbps),
                **({"error": failure} if failure else {}),
            }
        ]


def _absent(peer: Peer) -> Report:
    failure = peer.system.failure if peer.system else None
    return {"kind": "peer", "peer": peer.name, "error": peer.error or failure or "measured nothing"}
