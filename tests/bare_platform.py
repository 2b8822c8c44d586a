"""Replicas and one router on this machine without Ray and Redis, for tests of what they do among themselves.

The replica program is the same as in a cluster. Routers know the replicas by address; nothing is scaled.
"""

import asyncio
import contextlib
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from kv_transfer.shm_room import check_room
from tandem.config import MIB, EngineConfig, ReplicaConfig
from tandem.domain import Role
from tandem.endpoint import endpoint_folder, remove_endpoint_file, write_endpoint_file
from tandem.engine.environment import has_cuda, require_vllm
from tandem.engine.model_files import BUNDLED_MODEL, resolve_model, served_name
from tandem.errors import ConfigError
from tandem.launch import ReplicaProcess, last_words, remove_folder, spawn_replica, start_program, stop_process
from tandem.supervisor import MAX_RESTARTS, ReplicaSupervisor
from tandem.tether import hold
from tandem.zygote_client import ZygoteClient, zygote_command, zygote_environment

_TETHER_GRACE_S = 1.0
_ZYGOTE_START_S = 120.0  # where its files come from the disk


@dataclass(frozen=True, slots=True, kw_only=True)
class BareOptions:
    """What a bare platform starts."""

    model: str = BUNDLED_MODEL
    prefill: int = 1
    decode: int = 1
    kv_cache_bytes: int = 128 * MIB
    store_dir: str = ""  # empty: a folder of its own in /dev/shm
    store_capacity_bytes: int = 1024 * MIB
    faults: str = ""
    routers: int = 1
    max_restarts: int = MAX_RESTARTS
    zygote_socket: Path | None = None  # of somebody else's zygote; None: one of its own


class BarePlatform:
    """All processes of it. `start`, use it, `stop`; `stop` cleans up after a failed start too."""

    def __init__(self, options: BareOptions) -> None:
        self.options = options
        self.cluster = f"{os.getuid()}-{secrets.token_hex(3)}"
        self.router_address = ""
        self.router_addresses: list[str] = []
        self.http_address = ""
        self.supervisors: dict[str, ReplicaSupervisor] = {}
        self.zygote: asyncio.subprocess.Process | None = None
        self.routers: list[asyncio.subprocess.Process] = []
        self._tether: int | None = None
        self.store_dir = Path(options.store_dir or f"/dev/shm/tandem-{self.cluster}")
        self.runtime_dir = endpoint_folder() / self.cluster
        self.zygote_socket = options.zygote_socket or self.runtime_dir / "zygote.sock"

    @property
    def replicas(self) -> dict[str, ReplicaProcess]:
        """The processes that run now, by replica id."""
        return {name: supervisor.process for name, supervisor in self.supervisors.items() if supervisor.process is not None}

    async def start(self) -> None:
        """Starts everything and waits until all of it serves. Raises ConfigError."""
        require_vllm()
        check_room(self.store_dir)
        self.runtime_dir.mkdir(mode=0o700, parents=True)
        self.store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not has_cuda() and self.options.zygote_socket is None:
            await self.start_zygote()
        counts = {Role.PREFILL: self.options.prefill, Role.DECODE: self.options.decode}
        async with asyncio.TaskGroup() as group:
            for role, name in ((role, f"{role}-{number}") for role, count in counts.items() for number in range(count)):
                group.create_task(self.add_replica(role, name), name=f"start-{name}")
        for number in range(self.options.routers):
            await self.start_router(f"router-{number}")

    async def add_replica(self, role: Role, name: str, *, served_model: str = "", **engine_changes: object) -> ReplicaProcess:
        """Starts one more replica and supervises it; `engine_changes` are fields of EngineConfig."""
        engine = EngineConfig(
            model=str(resolve_model(self.options.model)),
            kv_cache_bytes=self.options.kv_cache_bytes,
            seed=secrets.randbelow(2**31),
            store_dir=str(self.store_dir),
            store_capacity_bytes=self.options.store_capacity_bytes,
            faults=self.options.faults,
        )
        config = ReplicaConfig(
            replica_id=name,
            role=role,
            incarnation=1,
            served_model=served_model or served_name(self.options.model),
            engine=replace(engine, **engine_changes),  # type: ignore[arg-type]
            runtime_dir=str(self.runtime_dir),
            log_path=str(self.runtime_dir / f"{name}.log"),
        )
        start = spawn_replica if has_cuda() else ZygoteClient(self.zygote_socket, wait_s=1.0).start_replica
        supervisor = self.supervisors[name] = ReplicaSupervisor(config, start, max_restarts=self.options.max_restarts)
        supervisor.begin()
        return await supervisor.wait_running()

    async def remove_replica(self, name: str) -> None:
        """Stops a replica for good."""
        await self.supervisors.pop(name).stop()

    async def stop(self) -> None:
        """Ends every process, then removes sockets, blocks and the endpoint file."""
        for router in self.routers:
            await stop_process(router)
        await asyncio.gather(*(supervisor.stop() for supervisor in self.supervisors.values()))
        if self.zygote is not None:
            await stop_process(self.zygote)
        if self._tether is not None:
            os.close(self._tether)
        remove_endpoint_file(self.cluster)
        remove_folder(self.runtime_dir)
        if not self.options.store_dir:
            remove_folder(self.store_dir)

    async def start_zygote(self) -> None:
        """Starts one, or another one in a dead one's place, as a node's agent does."""
        tether = self.runtime_dir / "agent.lock"
        if self._tether is None:
            self._tether = hold(tether)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((self.runtime_dir / "zygote.log").open("ab"))
            self.zygote = await asyncio.create_subprocess_exec(
                *zygote_command(self.zygote_socket, tether, grace_s=_TETHER_GRACE_S),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=zygote_environment(),
                start_new_session=True,
            )
        if not await ZygoteClient(self.zygote_socket, wait_s=_ZYGOTE_START_S).wait_ready():
            raise ConfigError(f"the zygote did not start: {last_words(self.runtime_dir / 'zygote.log')}")

    async def start_router(self, name: str) -> None:
        """Starts one more router over the replicas that there are."""
        workers = [f"--worker={replica.address}" for replica in self.replicas.values()]
        arguments = [
            "router",
            f"--cluster={self.cluster}",
            f"--router-id={name}",
            "--port=0",
            "--http-port=0",
            "--one-worker-max-tokens=0",
            *workers,
        ]
        router, facts = await start_program(arguments, self.runtime_dir / f"{name}.log", ready="router ready")
        self.routers.append(router)
        self.router_addresses.append(facts["address"])
        if not self.router_address:
            self.router_address, self.http_address = facts["address"], facts["http"]
            write_endpoint_file(self.cluster, {"grpc": self.router_address, "cluster": self.cluster, "pid": os.getpid()})
