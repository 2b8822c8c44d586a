"""One cluster by `tandem up`: each process killed and some stopped in turn under light load, scaled by hand, two models, one from zero."""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tandem
from tandem.domain import ModelId, ReplicaTarget, Role
from tests.integration.platform_run import Run, ready, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

CLUSTER = """
routers = 2
autoscalers = 2
port = 0
http_port = 0
[scaler]
idle_s = 4.0
[[models]]
name = "busy"
decode = 2
max_decode = 3
kv_cache_bytes = 67108864
[[models]]
name = "seldom"
prefill = 0
min_decode = 0
kv_cache_bytes = 67108864
"""
PROMPT = [(7 * number) % 2000 + 3 for number in range(200)]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    folder = Path(tempfile.mkdtemp(prefix="td", dir="/tmp"))
    (folder / "cluster.toml").write_text(CLUSTER)
    made = Run(folder, "--config", str(folder / "cluster.toml"))
    try:
        yield made.wait_ready()
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)


class Load:
    """Requests one after the other, each as long as a hand-off takes; what failed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.answers: set[tuple[int, ...]] = set()
        self.done = 0
        self.errors: list[tandem.TandemError] = []

    def _ask(self) -> None:
        with self._run.client() as client:
            while not self._stop.wait(0.2):
                try:
                    completion = client.generate(PROMPT, model="busy", max_tokens=16, temperature=0)
                except tandem.TandemError as error:
                    self.errors.append(error)
                else:
                    self.done += 1
                    self.answers.add(tuple(completion.token_ids))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def serving(run: Run) -> list[str]:
    """Replicas of the busy model that serve; none while no router answers."""
    try:
        with run.client(5.0) as client:
            return [name for name in ready(client.status(timeout_s=2.0)) if name.startswith("busy")]
    except tandem.TandemError:
        return []


def settled(run: Run) -> bool:
    """As many of each kind as a quiet cluster has."""
    counts = run.counts()
    wanted = {
        "redis": 1,
        "router": 2,
        "autoscaler": 2,
        "node_agent": 1,
        "zygote": 1,
        "store": 1,
        "replica": 3,
        "engine_core": 3,
        "actor": 3,
        "ray_head": 1,
        "gcs": 1,
        "raylet": 1,
    }
    return len(serving(run)) == 3 and all(counts[kind] == number for kind, number in wanted.items())


OUTLIVED = ("actor", "node_agent", "zygote", "store", "redis", "router", "autoscaler", "ray_head", "gcs", "raylet")
KINDS = ("replica", "engine_core", *OUTLIVED)


@pytest.mark.parametrize("kind", KINDS)
def test_the_death_of_one_process_mends_itself(run: Run, kind: str) -> None:
    wait_for(lambda: settled(run))
    before = incarnations(run)
    end_one(run, kind, signal.SIGKILL)
    assert (incarnations(run) == before) == (kind in OUTLIVED)


@pytest.mark.parametrize("kind", ["replica", "actor", "node_agent", "store", "zygote", "router", "autoscaler", "gcs"])
def test_a_process_that_hangs_is_replaced(run: Run, kind: str) -> None:
    """An engine core's hang is noticed where requests run in it: tests/integration/test_deaths.py."""
    wait_for(lambda: settled(run))
    before = incarnations(run)
    end_one(run, kind, signal.SIGSTOP)
    assert (incarnations(run) == before) == (kind in OUTLIVED)


def end_one(run: Run, kind: str, number: signal.Signals) -> None:
    """Signals one process of the kind, and waits until it is gone and the cluster whole again. A router takes the streams in it along."""
    victim = run.processes(kind)[0].pid
    with Load(run) as load:
        wait_for(lambda: load.done > 2)
        os.kill(victim, number)
        wait_for(lambda: victim not in [process.pid for process in run.processes()])
        wait_for(lambda: settled(run), 120.0)
        done = load.done
        wait_for(lambda: load.done > done + 2)
    assert len(load.answers) == 1
    assert not load.errors or kind == "router", load.errors


def incarnations(run: Run) -> set[int]:
    """The incarnations of the busy model's replicas."""
    with run.client() as client:
        leases = {replica.lease.replica_id: replica.lease.incarnation for replica in client.status().replicas}
    return {incarnation for name, incarnation in leases.items() if name.startswith("busy")}


def test_a_pool_is_scaled_by_hand_and_given_back(run: Run) -> None:
    wait_for(lambda: settled(run))
    with run.client() as client, Load(run) as load:
        assert run.cli("scale", "decode=3", "--model", "busy").returncode == 0
        wait_for(lambda: len(serving(run)) == 4)
        assert any(target.replicas == 3 for target in client.status().targets)
        assert run.cli("scale", "decode=2", "--model", "busy", "--for-s", "60").returncode == 0
        wait_for(lambda: settled(run))
        assert run.cli("scale", "decode=auto", "--model", "busy").returncode == 0
    assert not load.errors
    assert len(load.answers) == 1


def test_a_drained_replica_is_replaced(run: Run) -> None:
    wait_for(lambda: settled(run))
    victim = serving(run)[0]
    before = {process.pid for process in run.processes("replica")}
    with Load(run) as load:
        assert run.cli("drain", victim).returncode == 0
        wait_for(lambda: bool({process.pid for process in run.processes("replica")} - before))
        wait_for(lambda: settled(run))
    assert not load.errors


def test_an_idle_model_goes_to_zero_and_comes_back_for_a_request(run: Run) -> None:
    with run.client() as client:
        wait_for(lambda: not any(replica.lease.model == "seldom" and replica.is_reachable for replica in client.status().replicas))
        assert "seldom" in {card.id for card in client.models()}
        started_s = time.monotonic()
        completion = client.generate([5, 6, 7], model="seldom", max_tokens=2, temperature=0)
        assert len(completion.token_ids) == 2
        assert time.monotonic() - started_s < 30.0
        with pytest.raises(tandem.InvalidRequestError, match="busy, seldom"):
            client.generate([5, 6, 7], max_tokens=1)
        with pytest.raises(tandem.NotFoundError, match="busy, seldom"):
            client.generate([5, 6, 7], model="other", max_tokens=1)
        with pytest.raises(tandem.NotFoundError, match="not served"):
            client.scale([ReplicaTarget(model=ModelId("other"), role=Role.DECODE, replicas=1)])


def test_a_frozen_redis_costs_nothing(run: Run) -> None:
    wait_for(lambda: settled(run))
    (redis,) = run.processes("redis")
    with Load(run) as load:
        os.kill(redis.pid, signal.SIGSTOP)
        try:
            time.sleep(8.0)  # every lease has run out
            done = load.done
            wait_for(lambda: load.done > done + 2)
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        wait_for(lambda: settled(run))
    assert not load.errors
