"""The peers in the run: starting each, and why one is not there. A peer never fails the bench."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from sys import executable
from typing import Any

from tandem.bench.kv.options import KvBenchOptions
from tandem.bench.kv.processes import SideError, SideProcess, foreign_command, module_command, running_sides
from tandem.bench.kv.ray_peer import RaySides
from tandem.bench.kv.redis_peer import running_redis_server
from tandem.bench.kv.turns import System

_DAEMONS = "from tandem.bench.kv.mooncake_daemons import main; main()"
_JOIN = "from tandem.bench.kv.private_network import join_network_of; join_network_of({pid}); "
_SIDE = "from tandem.bench.kv.mooncake_peer import main; main()"
_QUIET_NUMPY = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_MIN_RAY_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A peer that runs, with what is said of it in the report; or why it does not."""

    name: str
    system: System | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@contextmanager
def _running_mooncake(options: KvBenchOptions) -> Iterator[tuple[System, dict[str, Any]]]:
    interpreter = str(options.mooncake_python or executable)
    daemons = SideProcess(foreign_command(interpreter, _DAEMONS))
    try:
        said = daemons.start({"segment_bytes": options.capacity_bytes})
        config = {"buffer_bytes": options.buffer_bytes, "seed": options.seed, "address": said["address"]}
        code = (_JOIN.format(pid=said["pid"]) if said["is_private"] else "") + _SIDE
        with running_sides(foreign_command(interpreter, code), config, environment=_QUIET_NUMPY) as (sides, facts):
            network = "private" if said["is_private"] else "the machine's own"
            facts = {"mode": "daemon + shared memory", "version": facts["version"], "network": network}
            yield System(name="mooncake", sides=sides, is_peer=True), facts
    finally:
        daemons.close()


@contextmanager
def _running_redis(options: KvBenchOptions) -> Iterator[tuple[System, dict[str, Any]]]:
    with tempfile.TemporaryDirectory(prefix="tandem-kv-") as folder, running_redis_server(Path(folder)) as socket_path:
        config = {"buffer_bytes": options.peer_bytes, "seed": options.seed, "socket_path": str(socket_path)}
        with running_sides(module_command("tandem.bench.kv.redis_peer"), config) as (sides, facts):
            facts = {"mode": "unix socket, pipeline", "client_version": facts["version"], "client_parser": facts["parser"]}
            yield System(name="redis", sides=sides, is_peer=True), facts


@contextmanager
def _running_ray(options: KvBenchOptions) -> Iterator[tuple[System, dict[str, Any]]]:
    with tempfile.TemporaryDirectory(prefix="tandem-kv-", ignore_cleanup_errors=True) as folder:
        process = SideProcess(module_command("tandem.bench.kv.ray_peer"))
        try:
            config = {"buffer_bytes": options.peer_bytes, "seed": options.seed, "folder": folder}
            said = process.start({**config, "object_store_bytes": max(_MIN_RAY_BYTES, 4 * options.peer_bytes)})
            facts = {"mode": "ray.put; ray.get with a copy out", "version": said["version"]}
            yield System(name="ray", sides=RaySides(process), is_peer=True), facts
        finally:
            process.close()


_RUNNERS: dict[str, Callable[[KvBenchOptions], AbstractContextManager[tuple[System, dict[str, Any]]]]] = {
    "mooncake": _running_mooncake,
    "redis": _running_redis,
    "ray": _running_ray,
}


@contextmanager
def running_peer(name: str, options: KvBenchOptions) -> Iterator[Peer]:
    """The peer, running until the end; or the peer with its error."""
    with ExitStack() as stack:
        try:
            system, facts = stack.enter_context(_RUNNERS[name](options))
        except SideError as error:
            peer = Peer(name=name, error="not installed" if error.is_missing else str(error))
        else:
            peer = Peer(name=name, system=system, facts=facts)
        yield peer
