"""What can be known before `tandem up` starts a process: settings, models, memory, /dev/shm, CPUs, ports, whether Ray is there.

Must not start or change anything.
"""

import contextlib
import os
import shutil
import socket
from pathlib import Path

import psutil

from autoscaler.config import ScalerConfig
from autoscaler.pool import check_models
from kv_transfer.shm_room import check_room
from router.config import RouterConfig
from tandem.cluster_config import VLLM, ClusterConfig, read_section
from tandem.config import MIB
from tandem.engine.environment import require_vllm
from tandem.engine.model_files import resolve_model
from tandem.errors import ConfigError, Reason
from tandem.launch import check_port
from tandem.model_memory import replica_memory_bytes
from tandem.node_folder import SHM, shm_folder
from tandem.ray_head import OBJECT_STORE_BYTES

_GIVEN = ("router_id", "cluster")  # of a router's settings: `tandem up` gives each router its own
_FREE_MEMORY_BYTES = 512 * MIB  # for Ray and everything beside the replicas
_CONNECT_S = 5.0
_CGROUPS = (  # of this process: limit and use; version 2, then 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def check(config: ClusterConfig) -> None:
    """Raises ConfigError with what to change. Takes up to 5 s where a Ray cluster is named that does not answer."""
    config.validate()
    check_models(config)
    _check_sections(config)
    if any(model.engine == VLLM for model in config.models):
        require_vllm()
    if config.ray_address and (not config.redis_url or config.redis_url.startswith("unix")):
        raise ConfigError("RAY_ADDRESS needs a REDIS_URL that other nodes can reach: redis://HOST:PORT")
    for model in config.models:
        resolve_model(model.model)
    for flag, first in (("--port", config.port), ("--http-port", config.http_port)):
        for number in range(config.routers if first else 0):
            check_port(config.host, first + number, flag)
    if config.ray_address:
        _check_ray(config.ray_address)
    else:
        _check_cpus(config)
        _check_memory(config)
        check_room(Path(config.store_dir) if config.store_dir else shm_folder("none"))


def _check_sections(config: ClusterConfig) -> None:
    """Keys and values of [scaler] and [router]; a router's value may be a flag's too."""
    where = "" if config.path is None else f"{config.path}: "
    scaler = read_section(ScalerConfig, config.scaler, f"{where}scaler.")
    router = read_section(RouterConfig, config.router, f"{where}router.", hidden=_GIVEN)
    for section, name, source in ((scaler, "scaler", where), (router, "router", where and f"{config.path} or a flag: ")):
        try:
            section.validate()
        except ConfigError as error:
            raise ConfigError(f"{source}{name}.{error.message}") from error


def _check_ray(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"RAY_ADDRESS {address!r} is not HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"RAY_ADDRESS {address!r}: no Ray cluster answers there ({error})") from error


def _check_cpus(config: ClusterConfig) -> None:
    """Ray would let a replica wait for ever."""
    needed = sum(model.declared_cpus * (model.prefill + model.decode) for model in config.models)
    there = os.cpu_count() or 1
    if needed > there:
        raise ConfigError(
            f"the replicas declare {needed:g} CPUs and this machine has {there}: ask for fewer replicas, or for fewer cpus_per_replica",
            reason=Reason.NO_ROOM,
        )


def _check_memory(config: ClusterConfig) -> None:
    needed_bytes = sum(
        (model.memory_bytes_per_replica or replica_memory_bytes(model)) * (model.prefill + model.decode) for model in config.models
    )
    free_bytes = free_memory_bytes() - _FREE_MEMORY_BYTES
    if needed_bytes > free_bytes:
        count = sum(model.prefill + model.decode for model in config.models)
        raise ConfigError(
            f"{count} replicas need {needed_bytes // MIB} MiB of memory and {max(0, free_bytes) // MIB} MiB are free: "
            "ask for fewer, or for less --kv-cache-bytes",
            reason=Reason.NO_ROOM,
        )
    shm_bytes = shutil.disk_usage(SHM).free
    if shm_bytes < OBJECT_STORE_BYTES:
        raise ConfigError(
            f"/dev/shm has {shm_bytes // MIB} MiB free, and Ray alone needs {OBJECT_STORE_BYTES // MIB} MiB", reason=Reason.NO_ROOM
        )


def free_memory_bytes() -> int:
    """Memory that this process may still take: the machine's, or its container's where that is less."""
    free = int(psutil.virtual_memory().available)
    for limit, use in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(use).read_text()))
    return free
