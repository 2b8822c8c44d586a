"""The maths of `tandem kv bench`, its fresh bytes, and its turns with stores that are made up."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tandem.bench.kv.fresh_rows import FreshRows
from tandem.bench.kv.kv_table import kv_bench_lines, kv_bench_table
from tandem.bench.kv.memcpy_bound import MemcpyBound
from tandem.bench.kv.options import KvBenchOptions, quick_or_given
from tandem.bench.kv.processes import SideError
from tandem.bench.kv.rows import Samples, calls_us, error_count, gbps, peer_ratios, percentile, rates_row, ratios, spread
from tandem.bench.kv.span import Span
from tandem.bench.kv.turns import Counter, Steps, System, take_turns
from tandem.errors import ConfigError

MIB = 1 << 20
SPAN = Span(first=0, blocks=4, block_bytes=4096, batch_blocks=3)


def test_a_rate_is_in_thousand_millions_of_bytes_a_second() -> None:
    assert gbps(3_000_000_000, 2.0) == 1.5
    assert gbps(1, 0.0) == 0.0


def test_a_spread_has_median_and_range_and_none_of_nothing() -> None:
    assert spread("x", [3.0, 1.0, 2.0]) == {"x": 2.0, "x_min": 1.0, "x_max": 3.0}
    assert spread("x", []) == {"x": None, "x_min": None, "x_max": None}


def test_a_ratio_is_of_one_repetition() -> None:
    # The machine halved its speed after the first: of medians the ratio would be off, of repetitions it is not.
    assert ratios([10.0, 5.0, 5.0], [20.0, 10.0, 10.0]) == [0.5, 0.5, 0.5]
    assert ratios([1.0, 2.0], [2.0]) == [0.5]
    assert ratios([1.0], [0.0]) == []


def test_percentiles_are_nearest_rank() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert percentile(values, 0.5) == 51.0
    assert percentile(values, 0.99) == 100.0
    assert percentile([], 0.5) is None
    assert calls_us("put", [1e-6, 3e-6, 2e-6]) == {"put_p50_us": pytest.approx(2.0), "put_p99_us": pytest.approx(3.0)}
    assert calls_us("put", []) == {"put_p50_us": None, "put_p99_us": None}


def test_a_row_compares_with_memcpy_and_with_a_peer() -> None:
    ours = Samples(put_gbps=[8.0, 9.0, 10.0], get_gbps=[4.0, 4.0, 4.0], errors=2)
    row = rates_row(ours, [10.0, 10.0, 20.0])
    assert (row["memcpy_gbps"], row["put_gbps"], row["put_to_memcpy"], row["get_to_memcpy"]) == (10.0, 9.0, 0.8, 0.4)
    assert (row["put_gbps_min"], row["put_gbps_max"], row["errors"]) == (8.0, 10.0, 2)
    peer = Samples(put_gbps=[4.0, 3.0, 5.0], get_gbps=[2.0, 2.0, 2.0])
    assert peer_ratios("mooncake", ours, peer)["put_to_mooncake"] == 2.0
    assert set(peer_ratios("mooncake", ours, None).values()) == {None}


def test_errors_are_summed_over_a_report_but_for_peers() -> None:
    report = {"rows": [{"kind": "ours", "errors": 2}, {"kind": "peer", "errors": 5}], "single": ({"errors": 1},), "native": None}
    assert error_count(report) == 3


def test_a_span_is_moved_in_batches() -> None:
    span = Span(first=10, blocks=5, block_bytes=8, batch_blocks=2)
    assert list(span.batches()) == [(range(10, 12), 0), (range(12, 14), 16), (range(14, 15), 32)]
    assert span.total_bytes == 40
    assert Span(**span.as_json()) == span  # type: ignore[arg-type]


def test_fresh_rows_are_known_to_who_never_saw_them() -> None:
    written, read = np.zeros(4096, np.uint8), np.zeros(4096, np.uint8)
    writer, reader = FreshRows(written, seed=1), FreshRows(read, seed=1)
    for stamp in (3, 9):
        writer.fill(stamp)
        assert reader.wrong_blocks(stamp, 4, 1024) == 4  # nothing came, or what came before
        read[:] = written
        assert reader.wrong_blocks(stamp, 4, 1024) == 0
    read[2048] ^= 1
    assert reader.wrong_blocks(9, 4, 1024) == 1


def test_every_word_of_fresh_rows_is_new() -> None:
    buffer = np.zeros(8192, np.uint8)
    rows = FreshRows(buffer, seed=1)
    rows.fill(1)
    before = buffer.view(np.uint64).copy()
    rows.fill(2)
    assert not np.any(before == buffer.view(np.uint64))
    assert len(np.unique(buffer.view(np.uint64))) == 1024


class FakeSides:
    """A store that takes a second for everything; fails or loses blocks when told."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log = log
        self._name = name
        self.fails_at: int | None = None
        self.bad_gets = 0
        self.firsts: list[int] = []

    def call(self, role: str, **command: Any) -> dict[str, Any]:
        if command["do"] == "put":
            self._log.append(self._name)
            self.firsts.append(command["span"]["first"])
            if len(self.firsts) == self.fails_at:
                raise SideError("gone")
        bad = self.bad_gets if command["do"] == "get" else 0
        return {"begin_s": 1.0, "end_s": 2.0, "bad": bad}


class FakeBound(MemcpyBound):
    def __init__(self, log: list[str]) -> None:
        super().__init__(4096)
        self._log = log

    def copy_gbps(self, block_bytes: int) -> float:
        self._log.append("memcpy")
        return super().copy_gbps(block_bytes)


def turns(log: list[str], *systems: System, repetitions: int = 2, begin: Callable[[], None] = lambda: None) -> Any:
    return take_turns(systems, FakeBound(log), SPAN, repetitions=repetitions, counter=Counter(), begin=begin)


def test_systems_take_turns_and_another_one_begins_each_time() -> None:
    log: list[str] = []
    ours, peer = FakeSides(log, "ours"), FakeSides(log, "peer")
    found = turns(log, System(name="ours", sides=ours), System(name="peer", sides=peer, is_peer=True))
    assert log == ["ours", "peer", "memcpy", "peer", "memcpy", "ours", "memcpy", "ours", "peer"]
    assert len(found.memcpy_gbps) == len(found.by_system["ours"].put_gbps) == 2  # the first did not count
    assert found.by_system["ours"].put_gbps == [SPAN.total_bytes / 1e9] * 2


def test_keys_are_new_each_time() -> None:
    sides = FakeSides([], "ours")
    turns([], System(name="ours", sides=sides), repetitions=3)
    taken = [number for first in sides.firsts for number in range(first, first + SPAN.blocks)]
    assert len(set(taken)) == 4 * SPAN.blocks


def test_lost_blocks_are_counted_in_every_repetition() -> None:
    sides = FakeSides([], "ours")
    sides.bad_gets = 1
    assert turns([], System(name="ours", sides=sides)).by_system["ours"].errors == 3


def test_a_peer_that_fails_takes_no_more_turns() -> None:
    sides = FakeSides([], "peer")
    sides.fails_at = 3
    system = System(name="peer", sides=sides, is_peer=True)
    found = turns([], system, repetitions=5)
    assert (system.failure, len(found.by_system["peer"].put_gbps), len(sides.firsts)) == ("gone", 1, 3)


def test_our_own_failure_ends_the_run() -> None:
    sides = FakeSides([], "ours")
    sides.fails_at = 2
    with pytest.raises(SideError):
        turns([], System(name="ours", sides=sides))


def test_steps_are_shown_with_what_is_done() -> None:
    shown: list[tuple[str, int, int]] = []
    steps = Steps(5, lambda *step: shown.append(step))
    steps.begin("one")
    steps.done(2)
    steps.begin("two")
    assert shown == [("one", 0, 5), ("two", 2, 5)]


def test_a_quick_run_is_small_but_for_what_is_given() -> None:
    quick = quick_or_given(KvBenchOptions(), is_quick=True, capacity_bytes=None, repetitions=3)
    assert (quick.capacity_bytes, quick.repetitions, quick.block_sizes) == (64 * MIB, 3, (256 << 10,))
    usual = quick_or_given(KvBenchOptions(), is_quick=False, capacity_bytes=None, repetitions=None)
    assert usual == KvBenchOptions()
    assert (usual.buffer_bytes, usual.memcpy_bytes) == (256 * MIB, 256 * MIB)


def test_a_repetition_is_a_quarter_of_the_arena_at_most_and_whole_blocks() -> None:
    options = KvBenchOptions(capacity_bytes=100 * MIB)
    assert options.buffer_bytes == 24 * MIB
    assert all(options.buffer_bytes % block_bytes == 0 for block_bytes in options.block_sizes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"capacity_bytes": 1}, "--capacity-bytes"), ({"repetitions": 0}, "--repetitions")],
)
def test_a_wrong_option_is_named(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KvBenchOptions(**settings).validate()  # type: ignore[arg-type]


def test_the_table_and_the_lines_show_what_is_there() -> None:
    row = {"kind": "ours", "checksum": False, "block_bytes": MIB, "put_gbps": 1.0, "put_gbps_min": 0.5, "put_gbps_max": 2.0}
    row |= {"get_gbps": None, "get_gbps_min": None, "get_gbps_max": None}
    peers = [{"kind": "peer", "peer": "redis", "block_bytes": MIB}, {"kind": "peer", "peer": "ray", "error": "not installed"}]
    report: dict[str, Any] = {"rows": [row], "peers": peers, "pressure": [row], "contention": [], "single": [], "lookup": []}
    ratios = {"put_to_memcpy": 0.8, "get_to_memcpy": 0.9, "commit_p50_us": 20.0, "commit_p99_us": 90.0}
    layout = {**row, **ratios, "source": "vllm", "row_bytes": 16 << 10}
    fetched = {"block_bytes": 1 << 20, "fetch_gbps": 1.0, "fetch_gbps_min": 0.5, "fetch_gbps_max": 1.5, "fetch_to_raw_tcp": 0.9}
    report |= {"engine_layout": [layout, {"source": "vllm", "error": "no engine"}], "peer_fetch": [fetched]}
    report |= {"prefault": {"back_gbps": 1.8, "map_gbps": 17.0}, "native": True}
    report |= {"errors": 3, "duration_s": 1.0, "conditions": {"cores": 2, "busy_fraction": 0.1, "repetitions": 2, "is_quick": False}}
    assert kv_bench_table(report).row_count == 2
    lines = list(kv_bench_lines(report))
    assert "full store, blocks of 1 MiB: put 1.00 GB/s (0.50 to 2.00), get - GB/s (- to -)" in lines
    assert "ray: not installed" in lines
    assert any(line.startswith("errors: 3") for line in lines)
