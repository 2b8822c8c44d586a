"""`tandem kv bench --quick` on the real store: the report as other programs read it. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.bench.kv.options import KvBenchOptions
from tandem.bench.kv.peers import running_peer

pytestmark = pytest.mark.integration

REPORT_KEYS = {
    *("schema", "conditions", "rows", "peers", "pressure", "contention", "lookup", "single", "errors", "duration_s"),
    *("prefault", "engine_layout", "peer_fetch", "native"),
}
RATES = ("memcpy_gbps", "put_gbps", "get_gbps", "put_to_memcpy", "get_to_memcpy")
CONDITIONS = {"cores", "usable_cores", "load_average_1_min", "busy_fraction", "repetitions", "arena_bytes", "python", "versions"}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tandem", "kv", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def folders() -> set[Path]:
    return set(Path("/dev/shm").glob("tandem-kv-bench-*"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("kv") / "made" / "kv.json"
    before = folders()
    done = run("--quick", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "ours, checksum" in done.stdout
    assert folders() <= before
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_report_has_all_its_parts(report: dict[str, Any]) -> None:
    assert set(report) == REPORT_KEYS
    assert report["schema"] == "tandem.kv_bench/1"
    assert set(report["conditions"]) >= CONDITIONS
    json.dumps(report, allow_nan=False)


def test_every_block_came_as_it_was_put(report: dict[str, Any]) -> None:
    assert report["errors"] == 0


def test_each_row_has_rates_and_ratios_with_their_range(report: dict[str, Any]) -> None:
    assert [(row["block_bytes"], row["checksum"]) for row in report["rows"]] == [(256 << 10, True), (256 << 10, False)]
    for row in (*report["rows"], *report["pressure"]):
        assert (row["kind"], row["errors"]) == ("ours", 0)
        assert all(0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"] for name in RATES)
    assert all(row["repetitions"] == 2 and row["batch_blocks"] == 32 for row in report["rows"])
    assert all("put_to_mooncake" in row and "get_to_mooncake" in row for row in report["rows"])


def test_two_writers_and_two_readers_are_reported_each_and_summed(report: dict[str, Any]) -> None:
    (row,) = report["contention"]
    assert set(row["processes"]) == {"writer", "writer-2", "reader", "reader-2"}
    assert all(rates["gbps"] > 0 for rates in row["processes"].values())
    assert row["summed_gbps"] > 0


def test_single_calls_and_lookups_are_in_microseconds(report: dict[str, Any]) -> None:
    ours = [row for row in report["single"] if row["kind"] == "ours"]
    assert [row["checksum"] for row in ours] == [True, False]
    assert all(0 < row["put_p50_us"] <= row["put_p99_us"] and 0 < row["get_p50_us"] <= row["get_p99_us"] for row in ours)
    lookup = report["lookup"][0]
    assert (lookup["kind"], lookup["keys"], lookup["held_keys"]) == ("ours", 1000, 500)
    assert 0 < lookup["lookup_p50_us"] <= lookup["lookup_p99_us"]


def test_every_peer_is_there_or_says_why_not(report: dict[str, Any]) -> None:
    peers = {row["peer"]: row for row in report["peers"]}
    assert set(peers) == {"mooncake", "redis", "ray"}
    assert all(("error" in row) != ("put_gbps" in row) for row in peers.values())
    assert peers["redis"]["put_gbps"] > 0  # its client and a server are among the tests' requirements
    assert peers["ray"]["error"] == "left out of a quick run"


def test_a_python_without_the_peer_is_told_from_one_that_cannot_run(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 1\n")
    broken.chmod(0o700)
    with running_peer("mooncake", KvBenchOptions(mooncake_python=broken)) as peer:
        assert peer.error is not None
        assert "no such library" in peer.error
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o700)
    with running_peer("mooncake", KvBenchOptions(mooncake_python=bare)) as peer:
        assert peer.error == "not installed"


@pytest.mark.parametrize("arguments", [("--repetitions", "0"), ("--capacity-bytes", "1"), ("--mooncake-python", "/nowhere/python")])
def test_a_wrong_option_is_one_line(arguments: tuple[str, str]) -> None:
    done = run("--quick", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert len(done.stderr.splitlines()) == 1
