"""`tandem up`: zygote, replicas and a router on this machine, supervised until Ctrl-C, then nothing of it left.

Knows what runs and restarts what dies; decides nothing about load. Starts the programs that a cluster starts too.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from kv_transfer.shm_room import check_room
from tandem.config import MIB, EngineConfig, ReplicaConfig
from tandem.domain import Role
from tandem.endpoint import endpoint_folder, remove_endpoint_file, write_endpoint_file
from tandem.engine.environment import require_vllm
from tandem.engine.model_files import BUNDLED_MODEL, resolve_model, served_name
from tandem.errors import ConfigError
from tandem.launch import ReplicaProcess, ZygoteProcess, check_port, has_cuda, remove_folder, spawn_replica, start_router, stop_process

_RESTARTS = 3
_RESTART_WINDOW_S = 60.0
_STATUS_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What `tandem up` starts."""

    model: str = BUNDLED_MODEL
    prefill: int = 1
    decode: int = 1
    host: str = "127.0.0.1"
    port: int = 8470
    dtype: str = "auto"
    kv_cache_bytes: int = 128 * MIB
    store_dir: str = ""  # empty: a folder of this cluster's own in /dev/shm
    store_capacity_bytes: int = 1024 * MIB
    max_num_batched_tokens: int = 2048
    faults: str = ""
    is_router_on: bool = True

    def validate(self) -> None:
        """Raises ConfigError naming the option."""
        if self.prefill < 0 or self.decode < 0 or self.prefill + self.decode < 1:
            raise ConfigError(f"--prefill {self.prefill} --decode {self.decode}: at least one replica is needed, and none may be negative")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port must be from 0 to 65535, got {self.port}")
        if self.kv_cache_bytes < 16 * MIB:
            raise ConfigError(f"--kv-cache-bytes must be at least {16 * MIB}, got {self.kv_cache_bytes}")


Progress = Callable[[str], None]


class Platform:
    """All processes of one cluster on this machine. `start`, use it, `stop`; `stop` cleans up after a failed start too."""

    def __init__(self, options: UpOptions, progress: Progress = lambda _: None) -> None:
        options.validate()
        self.options = options
        self.cluster = f"{os.getuid()}-{secrets.token_hex(3)}"
        self.router_address = ""
        self.replicas: dict[str, ReplicaProcess] = {}
        self._progress = progress
        self.zygote: ZygoteProcess | None = None
        self._router: asyncio.subprocess.Process | None = None
        self._supervisors: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self.store_dir = Path(options.store_dir or f"/dev/shm/tandem-{self.cluster}")
        self.runtime_dir = endpoint_folder() / self.cluster

    async def start(self) -> None:
        """Starts everything at once and waits until all of it serves. Raises ConfigError."""
        require_vllm()
        model = resolve_model(self.options.model)
        check_room(self.store_dir)
        if self.options.is_router_on:
            check_port(self.options.host, self.options.port)
        self.runtime_dir.mkdir(mode=0o700, parents=True)
        self.store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not has_cuda():
            self._progress("importing vLLM once (about 6 s on an idle core)")
            self.zygote = ZygoteProcess(self.runtime_dir, self.runtime_dir / "zygote.log")
            await self.zygote.start()
        self._progress(f"starting {self.options.prefill} prefill and {self.options.decode} decode replicas of {model.name}")
        counts = {Role.PREFILL: self.options.prefill, Role.DECODE: self.options.decode}
        async with asyncio.TaskGroup() as group:
            for role, name in ((role, f"{role}-{number}") for role, count in counts.items() for number in range(count)):
                group.create_task(self.add_replica(role, name), name=f"start-{name}")
        if self.options.is_router_on:
            self._progress("starting the router")
            workers = [f"--worker={replica.address}" for replica in self.replicas.values()]
            arguments = [f"--cluster={self.cluster}", f"--host={self.options.host}", f"--port={self.options.port}", *workers]
            self._router, self.router_address = await start_router(arguments, self.runtime_dir / "router.log")
            write_endpoint_file(self.cluster, {"grpc": self.router_address, "cluster": self.cluster, "pid": os.getpid()})

    async def add_replica(self, role: Role, name: str, **engine_changes: object) -> ReplicaProcess:
        """Starts one more replica and supervises it; `engine_changes` are fields of EngineConfig."""
        engine = EngineConfig(
            model=str(resolve_model(self.options.model)),
            dtype=self.options.dtype,
            kv_cache_bytes=self.options.kv_cache_bytes,
            max_num_batched_tokens=self.options.max_num_batched_tokens,
            seed=secrets.randbelow(2**31),
            store_dir=str(self.store_dir),
            store_capacity_bytes=self.options.store_capacity_bytes,
            faults=self.options.faults,
        )
        config = ReplicaConfig(
            replica_id=name,
            role=role,
            incarnation=1,
            served_model=served_name(self.options.model),
            engine=replace(engine, **engine_changes),  # type: ignore[arg-type]
            runtime_dir=str(self.runtime_dir),
            log_path=str(self.runtime_dir / f"{name}.log"),
        )
        started = await self._start_replica(config)
        task = asyncio.create_task(self._supervise(started), name=f"supervise-{name}")
        self._supervisors.add(task)
        task.add_done_callback(self._supervisors.discard)
        return started

    async def remove_replica(self, name: str) -> None:
        """Stops a replica for good."""
        removed = self.replicas.pop(name)
        await removed.stop()

    async def _start_replica(self, config: ReplicaConfig) -> ReplicaProcess:
        started = await (spawn_replica(config) if self.zygote is None else self.zygote.fork_replica(config))
        self.replicas[config.replica_id] = started
        await started.wait_ready()
        return started

    async def _supervise(self, current: ReplicaProcess) -> None:
        """Starts the replica again on its port when it dies, a few times a minute at most."""
        starts_s: list[float] = []
        while True:
            await current.exited
            name = current.config.replica_id
            if self._is_stopping or self.replicas.get(name) is not current:
                return
            await current.stop()
            now_s = time.monotonic()
            starts_s = [start_s for start_s in starts_s if now_s - start_s < _RESTART_WINDOW_S] + [now_s]
            if len(starts_s) > _RESTARTS:
                self._progress(f"{name} died {len(starts_s)} times within a minute and stays down; its log is {current.config.log_path}")
                return
            self._progress(f"{name} died; starting it again")
            port = int(current.address.rpartition(":")[2])
            config = replace(current.config, port=port, incarnation=current.config.incarnation + 1)
            try:
                current = await self._start_replica(config)
            except (ConfigError, OSError) as error:
                self._progress(f"{name} does not start again: {error}")
                return

    async def stop(self) -> None:
        """Ends every process, then removes sockets, blocks and the endpoint file."""
        self._is_stopping = True
        if self._router is not None:
            await stop_process(self._router)
        await asyncio.gather(*(replica.stop() for replica in self.replicas.values()))
        supervisors = list(self._supervisors)
        for task in supervisors:
            task.cancel()
        await asyncio.gather(*supervisors, return_exceptions=True)
        if self.zygote is not None:
            await self.zygote.stop()
        remove_endpoint_file(self.cluster)
        remove_folder(self.runtime_dir)
        if not self.options.store_dir:
            remove_folder(self.store_dir)


def run_up(options: UpOptions) -> None:
    """Starts the platform, prints its endpoints, serves until Ctrl-C or SIGTERM. Raises ConfigError."""
    asyncio.run(_run_up(options, Console()))


async def _run_up(options: UpOptions, console: Console) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    started_s = time.monotonic()
    stage = ""

    def progress(line: str) -> None:
        nonlocal stage
        stage = line
        if not console.is_terminal or stop_status.is_set():
            console.print(f"{time.monotonic() - started_s:6.1f} s  {line}", highlight=False)

    stop_status = asyncio.Event()
    platform = Platform(options, progress)
    try:
        starting = asyncio.create_task(platform.start(), name="start")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        with console.status("") if console.is_terminal else contextlib.nullcontext() as status:
            while not starting.done() and not stopping.done():
                if status is not None:
                    status.update(f"{time.monotonic() - started_s:.0f} s  {stage}")
                await asyncio.wait({starting, stopping}, timeout=_STATUS_S, return_when=asyncio.FIRST_COMPLETED)
        stop_status.set()
        if starting.done():
            starting.result()
            _print_ready(console, platform, time.monotonic() - started_s)
            await stopping
        else:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        console.print("stopping", highlight=False)
    except* ConfigError as group:
        raise group.exceptions[0] from None
    finally:
        await platform.stop()


def _print_ready(console: Console, platform: Platform, took_s: float) -> None:
    console.print(f"ready in {took_s:.1f} s: {len(platform.replicas)} replicas, cluster {platform.cluster}", highlight=False)
    console.print(f"  gRPC      {platform.router_address}", highlight=False)
    console.print(f"  logs      {platform.runtime_dir}", highlight=False)
    console.print('  try       tandem generate "The for statement"', highlight=False)
    console.print("Ctrl-C stops all of it", highlight=False)
