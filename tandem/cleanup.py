"""Ends every process of a cluster on this machine and removes its files: the last step of `tandem up`, and all of `tandem down`.

Finds processes by a variable in their environment, so that none is missed, whoever started it. Needs no living part of the cluster.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.cluster_config import ClusterConfig, cluster_config_from_json
from tandem.endpoint import remove_endpoint_file
from tandem.errors import ConfigError, TandemError
from tandem.launch import remove_folder
from tandem.node_folder import ENDED, cluster_folder, ray_folder, shm_folder
from tandem.node_folder import MEMBER_OF as MEMBER_OF
from tandem.parenthood import REPLICA_NAME
from tandem.ray_environment import set_ray_environment
from tandem.redis_register import RedisRegister

_ROUTER_GRACE_S = 3.0  # running streams have 2 s
_GRACE_S = 5.0
_STOP_ALL_S = 60.0
_POLL_S = 0.02
CONFIG_FILE = "cluster.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterProcess:
    """One process of a cluster, and what it is."""

    pid: int
    kind: str


# A word of the command line tells what a process is; the first that is found counts.
_KINDS = (
    ("VLLM::EngineCore", "engine_core"),
    ("-m tandem.zygote", "zygote"),
    ("-m kv_transfer", "store"),
    ("-m tandem.guard", "guard"),
    ("-m tandem.ray_head", "ray_head"),
    ("gcs/gcs_server", "gcs"),
    ("raylet/raylet", "raylet"),
    ("-m autoscaler", "autoscaler"),
    ("-m router", "router"),
    ("-m prefill_workers", "replica"),
    ("-m decode_workers", "replica"),
    ("ray::NodeAgent", "node_agent"),
    ("ray::PrefillActor", "actor"),
    ("ray::DecodeActor", "actor"),
    ("redis-server", "redis"),
    ("valkey-server", "redis"),
    ("ray", "ray"),
)


_OF_RAY = ("gcs", "raylet", "ray", "node_agent", "actor")


def processes_of(cluster: str) -> list[ClusterProcess]:
    """The cluster's living processes on this machine, by pid; zombies and this process left out. Reads /proc, about 1 ms a hundred."""
    mark = f"{MEMBER_OF}={cluster}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(ClusterProcess(pid=int(entry.name), kind=_kind(command, entry)))
    return sorted(found, key=lambda process: process.pid)


def _kind(command: str, entry: Path) -> str:
    """What the process is; a replica that was forked still has the zygote's command line, and a name of its own."""
    kind = next((kind for word, kind in _KINDS if word in command), "other")
    return "replica" if kind == "zygote" and (entry / "comm").read_text().strip() == REPLICA_NAME else kind


def clean_cluster(cluster: str) -> None:
    """Returns when no process of it lives and no file is left. Takes a few seconds where streams still run."""
    _end([process for process in processes_of(cluster) if process.kind == "autoscaler"], _POLL_S)  # it would replace what ends
    config = _config_of(cluster)
    if config is not None and config.ray_address:
        with contextlib.suppress(OSError):  # another one may be clearing up
            (cluster_folder(cluster) / ENDED).touch()  # should Ray not answer, an agent of its goes on
        _stop_foreign_actors(config)
    _end([process for process in processes_of(cluster) if process.kind == "router"], _ROUTER_GRACE_S)
    # An engine core ends with its replica, which lets its streams end first.
    _end([process for process in processes_of(cluster) if process.kind not in ("engine_core", "guard")], _GRACE_S)
    while left := [process for process in processes_of(cluster) if process.kind != "guard"]:
        _signal(left, signal.SIGKILL)
        time.sleep(_POLL_S)
    if config is not None and config.redis_url:
        _forget(config)
    remove_endpoint_file(cluster)
    remove_folder(cluster_folder(cluster))
    remove_folder(shm_folder(cluster))
    remove_folder(ray_folder(cluster))


def end_ray(cluster: str) -> None:
    """Kills what is left of a Ray head of the cluster's own, its actors too, and waits until it is gone.

    An actor of a dead head may hang, and then goes on owning its replica.
    """
    while left := [process for process in processes_of(cluster) if process.kind in _OF_RAY]:
        _signal(left, signal.SIGKILL)
        time.sleep(_POLL_S)


def _config_of(cluster: str) -> ClusterConfig | None:
    with contextlib.suppress(OSError, ConfigError):
        return cluster_config_from_json((cluster_folder(cluster) / CONFIG_FILE).read_text())
    return None


def _stop_foreign_actors(config: ClusterConfig) -> None:
    """Where Ray is not the cluster's own, its actors must be asked to go; what cannot be reached is left to their owner."""
    told = f"--config-json={replace(config, redis_url='').to_json()}"
    command = [sys.executable, "-m", "autoscaler", "--stop-all", f"--ray-address={config.ray_address}", told]
    environment = dict(os.environ)
    set_ray_environment(environment, config.host)  # this process may have begun without it
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=_STOP_ALL_S, check=False, capture_output=True, env=environment)


def _forget(config: ClusterConfig) -> None:
    """Leaves nothing of the cluster in a Redis that is not its own; what does not answer is left."""

    async def forget() -> None:
        register = RedisRegister(config.redis_url, config.cluster)
        try:
            await register.erase()
        finally:
            await register.close()

    with contextlib.suppress(TandemError):
        asyncio.run(forget())


def _end(processes: Iterable[ClusterProcess], grace_s: float) -> None:
    """SIGTERM, to replicas SIGINT, for they are not to drain; then a wait until they are gone or the grace is over."""
    waited = list(processes)
    _signal([process for process in waited if process.kind == "replica"], signal.SIGINT)
    _signal([process for process in waited if process.kind != "replica"], signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    while time.monotonic() < deadline_s and any(_lives(process.pid) for process in waited):
        time.sleep(_POLL_S)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _signal(processes: Iterable[ClusterProcess], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
