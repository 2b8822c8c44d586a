"""The KV store of a whole platform: shared by all replicas, warm after a restart, in trouble without harm, and told to people."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.demo import DirectCaller
from tandem.domain import ReplicaId
from tests.integration.platform_run import SMALL, Run, ready, wait_for
from tests.integration.test_up import user  # noqa: F401 - a fixture

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PREFIX = [(7 * number) % 2000 + 3 for number in range(1000)]


def own_tail(number: int) -> list[int]:
    return [*PREFIX, *[(11 * index + 13 * number) % 2000 + 3 for index in range(40)]]


async def cached_tokens_of_each(run: Run) -> dict[ReplicaId, int]:
    """The same prefix sent to every replica itself, one after another; how many prompt tokens it had not to compute."""
    found: dict[ReplicaId, int] = {}
    with run.client() as client:
        leases = [replica.lease for replica in client.status().replicas]
    for number, lease in enumerate(leases):
        caller = DirectCaller(lease)
        try:
            answer = await caller.run(own_tail(number), 4)
        finally:
            await caller.close()
        assert answer.receipt is not None
        found[lease.replica_id] = answer.receipt.cached_tokens
    return found


def kv_stats(run: Run, folder: Path) -> dict[str, dict[str, object]]:
    """The tiers of the only node, by name."""
    done = run.cli("kv", "stats", "--json", str(folder / "stats.json"))
    assert done.returncode == 0, done.stderr
    (node,) = json.loads((folder / "stats.json").read_text())["nodes"]
    return {tier["tier"]: tier for tier in node["tiers"]}


@pytest.fixture
def run(user: Path) -> Iterator[Run]:  # noqa: F811
    made = Run(user, "--port=0", "--http-port=0", "--prefill=1", "--decode=2", *SMALL, f"--kv-disk={user / 'disk'}")
    try:
        yield made.wait_ready()
    finally:
        made.end()


def test_one_store_for_all_replicas(run: Run, user: Path) -> None:  # noqa: F811
    first, *others = asyncio.run(cached_tokens_of_each(run)).values()
    assert first == 0
    assert len(others) == 2
    assert all(cached >= 960 for cached in others)  # its leading full blocks

    with run.client() as client:
        before = client.generate(PREFIX, max_tokens=8, temperature=0)

        # Its service stopped: tokens flow on, and its node's agent has another one over the same arena in its place.
        held = kv_stats(run, user)["arena"]["blocks"]
        (service,) = run.processes("store")
        os.kill(service.pid, signal.SIGSTOP)
        assert client.generate(PREFIX, max_tokens=8, temperature=0).token_ids == before.token_ids
        wait_for(lambda: [process.pid for process in run.processes("store")] not in ([], [service.pid]))
        wait_for(lambda: "does not answer" not in run.cli("status").stdout)
        assert kv_stats(run, user)["arena"]["blocks"] == held

        # Killed: the same.
        (service,) = run.processes("store")
        os.kill(service.pid, signal.SIGKILL)
        assert client.generate(PREFIX, max_tokens=8, temperature=0).token_ids == before.token_ids
        wait_for(lambda: [process.pid for process in run.processes("store")] not in ([], [service.pid]))
        wait_for(lambda: "does not answer" not in run.cli("status").stdout)
        assert kv_stats(run, user)["arena"]["blocks"] == held
        assert len(ready(client.status())) == 3

        # Its disk gone: a line in the status, nothing else.
        os.chmod(user / "disk", 0o500)
        assert client.generate(own_tail(8), max_tokens=8, temperature=0).token_ids
    os.chmod(user / "disk", 0o700)

    # A clean end leaves what was there on disk, and the next cluster begins with it.
    assert run.stop() == 0
    again = Run(user, "--port=0", "--http-port=0", *SMALL, f"--kv-disk={user / 'disk'}", "--kv-redis-bytes=33554432").wait_ready()
    try:
        with again.client() as client:
            answer = client.generate(PREFIX, max_tokens=8, temperature=0)
        assert answer.token_ids == before.token_ids
        assert answer.receipt is not None
        assert answer.receipt.cached_tokens >= 960
        tiers = kv_stats(again, user)
        assert set(tiers) == {"arena", "disk", "redis"}
        assert int(str(tiers["disk"]["promoted_total"])) >= 30
        table = again.cli("kv", "stats").stdout
        assert "arena" in table
        assert "disk" in table
        assert again.stop() == 0
        assert not again.processes()
    finally:
        again.end()
