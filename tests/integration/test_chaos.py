"""`tandem chaos` on a real platform: a short run holds, and each seeded bug makes it fail. One platform serves all of them."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tandem.chaos.cluster import ChaosCluster
from tandem.chaos.run import ChaosOptions, Stop, disturb
from tandem.chaos.schedule import Action, Row
from tandem.chaos.streams import SeededBug
from tandem.chaos.verdict import holds, report_of
from tandem.cleanup import processes_of
from tandem.node_folder import ray_folder, shm_folder

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

SHORT = replace(ChaosOptions(prefill=1, decode=1).made_quick(), requests=12, cases=8)
ONE_FAULT = replace(SHORT, pairs=((Row.STORE, Action.KILL),))


def ignore(words: str) -> None:
    """Progress nobody reads."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[ChaosCluster]:
    made = ChaosCluster(prefill=SHORT.prefill, decode=SHORT.decode, routers=SHORT.routers)
    before = os.environ.get("XDG_RUNTIME_DIR")
    try:
        await made.start(ignore)
        yield made
    finally:
        left = await made.stop()
    assert left == []
    assert not processes_of(made.id)
    assert not shm_folder(made.id).exists()
    assert not ray_folder(made.id).exists()
    assert os.environ.get("XDG_RUNTIME_DIR") == before


async def run(cluster: ChaosCluster, options: ChaosOptions) -> dict[str, Any]:
    return report_of(await disturb(cluster, options, ignore, Stop(), ends_s=time.monotonic() + 120.0))


async def test_a_short_run_holds(cluster: ChaosCluster) -> None:
    report = await run(cluster, SHORT)
    assert holds(report), report
    assert report["requests"] >= SHORT.requests
    assert len(report["faults"]) == 3
    assert all(fault["recovered_s"] is not None for fault in report["faults"])


@pytest.mark.parametrize("bug", [SeededBug.DROPPED_CHUNK, SeededBug.REPEATED_TOKEN])
async def test_a_seeded_bug_of_tokens_is_a_mismatch(cluster: ChaosCluster, bug: SeededBug) -> None:
    report = await run(cluster, replace(ONE_FAULT, settle_s=0.0, bug=bug))
    assert not holds(report)
    assert report["token_mismatches"] > 0
    assert report["failed"] == 0


async def test_a_seeded_lease_that_nobody_gives_back_is_a_leak(cluster: ChaosCluster) -> None:
    report = await run(cluster, replace(ONE_FAULT, bug=SeededBug.LEAKED_LEASE))
    assert not holds(report)
    assert report["token_mismatches"] == 0
    assert any("leased_blocks" in leak for leak in report["leaks"])


async def test_a_platform_that_does_not_start_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tandem", "chaos", "--model", str(tmp_path / "nothing")]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    _, words = await process.communicate()
    assert process.returncode == 2
    errors = [line for line in words.decode().splitlines() if line.startswith("tandem: error: ")]
    assert len(errors) == 1
    assert "no such folder" in errors[0]
