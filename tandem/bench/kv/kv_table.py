"""A run's report for people: a table of rates and ratios, then the rest in lines. Must not compute figures."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

_COLUMNS = ("memcpy", "put", "get", "put/memcpy", "get/memcpy", "put/mooncake", "get/mooncake")
_KEYS = ("memcpy_gbps", "put_gbps", "get_gbps", "put_to_memcpy", "get_to_memcpy", "put_to_mooncake", "get_to_mooncake")


def kv_bench_table(report: Mapping[str, Any]) -> Table:
    """Rates in GB/s (1e9 bytes): medians."""
    table = Table("store", "block", title="KV block store: GB/s and ratios, medians")
    for heading in _COLUMNS:
        table.add_column(heading, justify="right")
    for row in (*report["rows"], *(row for row in report["peers"] if "block_bytes" in row)):
        table.add_row(_name(row), _size(row["block_bytes"]), *(_cell(row.get(key)) for key in _KEYS))
    return table


def kv_bench_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What is in no row of the table, then what went wrong."""
    for row in report["single"]:
        size = _size(row["block_bytes"])
        yield f"one block of {size}, {_name(row)}: put {_microseconds(row, 'put')}, get {_microseconds(row, 'get')}"
    for row in report["lookup"]:
        yield f"lookup of {row['keys']} keys, {_name(row)}: {_microseconds(row, 'lookup')}"
    for row in report["pressure"]:
        yield f"full store, blocks of {_size(row['block_bytes'])}: put {_range(row, 'put_gbps')}, get {_range(row, 'get_gbps')}"
    for row in report["contention"]:
        each = ", ".join(f"{role} {_cell(rates['gbps'])}" for role, rates in row["processes"].items())
        yield f"two writers and two readers, blocks of {_size(row['block_bytes'])}: {_range(row, 'summed_gbps')} in all ({each})"
    for row in report["engine_layout"]:
        if "error" in row:
            yield f"engine layout, {row['source']}: {row['error']}"
            continue
        name = f"engine layout ({row['source']}), blocks of {_size(row['block_bytes'])} in rows of {_size(row['row_bytes'])}"
        rates = f"save {_cell(row['put_to_memcpy'])} of memcpy, load {_cell(row['get_to_memcpy'])}"
        yield f"{name}: {rates}, commit {_microseconds(row, 'commit')}"
    for row in report["peer_fetch"]:
        rates = f"{_range(row, 'fetch_gbps')}, {_cell(row['fetch_to_raw_tcp'])} of raw TCP"
        yield f"from another node, blocks of {_size(row['block_bytes'])}: {rates}"
    prefault = report["prefault"]
    yield f"memory for an arena: {_cell(prefault['back_gbps'])} GB/s; mapping what is there: {_cell(prefault['map_gbps'])} GB/s"
    yield f"native part: {'in use' if report['native'] else 'not compiled, numpy does the work'}"
    for row in report["peers"]:
        if "error" in row:
            yield f"{row['peer']}: {row['error']}"
    conditions = report["conditions"]
    yield (
        f"{conditions['cores']} cores, {conditions['busy_fraction']:.0%} busy before, {conditions['repetitions']} repetitions,"
        f" {report['duration_s']:.0f} s"
    )
    if conditions["is_quick"]:
        yield "a quick run: its buffers fit into caches, so its figures say nothing about the store"
    if report["errors"]:
        yield f"errors: {report['errors']} blocks or answers of ours were not as they must be"


def _name(row: Mapping[str, Any]) -> str:
    return str(row["peer"]) if row["kind"] == "peer" else "ours, checksum" if row["checksum"] else "ours"


def _size(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _range(row: Mapping[str, Any], name: str) -> str:
    return f"{_cell(row[name])} GB/s ({_cell(row[f'{name}_min'])} to {_cell(row[f'{name}_max'])})"


def _microseconds(row: Mapping[str, Any], name: str) -> str:
    return f"{_cell(row[f'{name}_p50_us'])} us ({_cell(row[f'{name}_p99_us'])} at p99)"
