"""`tandem up`: starts a cluster's control processes on this machine, keeps them alive until Ctrl-C, leaves nothing behind.

Redis, the Ray head, routers and autoscalers are its children; replicas and node agents are the autoscaler's, through Ray. Decides nothing.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from rich.console import Console

from autoscaler.config import ScalerConfig
from autoscaler.pool import check_models
from kv_transfer.shm_room import check_room
from router.config import RouterConfig
from tandem.cleanup import CONFIG_FILE, MEMBER_OF
from tandem.cluster_config import ClusterConfig, read_section
from tandem.config import MIB
from tandem.endpoint import write_endpoint_file
from tandem.engine.environment import require_vllm
from tandem.engine.model_files import resolve_model
from tandem.errors import ConfigError, Reason, TandemError
from tandem.launch import check_port, start_program, stop_process
from tandem.membership import MemberKind, Snapshot
from tandem.model_memory import replica_memory_bytes
from tandem.node_folder import cluster_folder, ray_folder, shm_folder
from tandem.parenthood import die_with_parent
from tandem.ray_head import OBJECT_STORE_BYTES, set_ray_environment
from tandem.redis_register import RedisRegister
from tandem.redis_server import check_redis, find_redis_server, redis_arguments, wait_for_redis

_READY_S = 300.0
_REDIS_START_S = 10.0
_STATUS_S = 0.25
_PAUSE_S = 0.1
_MAX_PAUSE_S = 10.0
_LONG_LIFE_S = 30.0
_FREE_MEMORY_BYTES = 512 * MIB  # for Ray and everything beside the replicas

Progress = Callable[[str], None]
Process = asyncio.subprocess.Process


@dataclass(slots=True)
class Child:
    """One kept process. `restarts` counts how often it had to be started again."""

    name: str
    start: Callable[[], Awaitable[Process]]
    process: Process
    restarts: int = 0


class Platform:
    """One cluster. `start`, use it, `stop`; `stop` cleans up after a failed start too."""

    def __init__(self, config: ClusterConfig, progress: Progress = lambda _: None) -> None:
        self.config = config if config.cluster else replace(config, cluster=f"{os.getuid()}-{secrets.token_hex(3)}")
        self.cluster = self.config.cluster
        self.folder = cluster_folder(self.cluster)
        self.children: dict[str, Child] = {}
        self.router_addresses: list[str] = [""] * self.config.routers
        self.http_addresses: list[str] = [""] * self.config.routers
        self.register: RedisRegister | None = None
        self.ready_replicas = 0  # at the end of the start
        self._progress = progress
        self._keepers: list[asyncio.Task[None]] = []
        self._guard: Process | None = None
        self._redis_url = self.config.redis_url
        self._ray_address = self.config.ray_address

    async def start(self) -> None:
        """Starts all of it and waits until every replica asked for serves. Raises ConfigError."""
        check(self.config)
        await self._claim()
        set_ray_environment(os.environ, self.config.host)
        self._progress("starting Redis and Ray" if not self._ray_address else f"using Ray at {self._ray_address}")
        async with _unwrapped(), asyncio.TaskGroup() as group:
            group.create_task(self._start_redis_and_routers(), name="redis and routers")
            if not self._ray_address:
                group.create_task(self._keep("ray", self._start_ray), name="ray")
        self.register = RedisRegister(self._redis_url, self.cluster)
        self._progress("starting the autoscaler")
        for number in range(self.config.autoscalers):
            await self._keep(f"autoscaler-{number}", lambda number=number: self._start_autoscaler(number))  # type: ignore[misc]
        await self._wait_ready()
        self._write_endpoint_file()

    async def stop(self) -> None:
        """Ends every process and removes every file: by the guard, as after a crash."""
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self.register is not None:
            await self.register.close()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            await self._guard.wait()
        for child in self.children.values():
            await stop_process(child.process)

    @property
    def _configured_replicas(self) -> int:
        return sum(model.prefill + model.decode for model in self.config.models)

    async def _claim(self) -> None:
        """Takes the cluster id for this process and has the guard watch it. Raises ConfigError where it is in use."""
        try:
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700)
        except FileExistsError as error:
            raise ConfigError(
                f"cluster {self.cluster!r} runs already or was not stopped cleanly: stop it with `tandem down --cluster {self.cluster}`"
            ) from error
        except OSError as error:
            raise ConfigError(f"cannot make {self.folder}: {error.strerror}") from error
        os.environ[MEMBER_OF] = self.cluster
        for folder in (shm_folder(self.cluster), ray_folder(self.cluster)):
            folder.mkdir(mode=0o700, exist_ok=True)
        (self.folder / CONFIG_FILE).write_text(self.config.to_json())
        self._write_endpoint_file(is_ready=False)
        self._guard = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tandem.guard", f"--cluster={self.cluster}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

    async def _keep(self, name: str, start: Callable[[], Awaitable[Process]]) -> None:
        """Starts a child and starts it again whenever it ends."""
        child = self.children[name] = Child(name, start, await start())
        self._keepers.append(asyncio.create_task(self._keep_alive(child), name=f"keep {name}"))

    async def _keep_alive(self, child: Child) -> None:
        pause_s = _PAUSE_S
        while True:
            started_s = time.monotonic()
            await child.process.wait()
            self._progress(f"{child.name} died; starting it again")
            child.restarts += 1
            while True:
                pause_s = _PAUSE_S if time.monotonic() - started_s > _LONG_LIFE_S else min(2 * pause_s, _MAX_PAUSE_S)
                await asyncio.sleep(pause_s)
                try:
                    child.process = await child.start()
                    break
                except ConfigError as error:
                    self._progress(f"{child.name} does not start: {error.message}")
            if child.name == "ray":  # autoscalers know the Ray that died, or try to reach it
                for other in self.children.values():
                    if other.name.startswith("autoscaler"):
                        other.process.terminate()

    async def _start_redis_and_routers(self) -> None:
        if self._redis_url:
            await check_redis(self._redis_url)
        else:
            self._redis_url = f"unix://{self.folder / 'redis.sock'}"
            await self._keep("redis", self._start_redis)
        for number in range(self.config.routers):
            await self._keep(f"router-{number}", lambda number=number: self._start_router(number))  # type: ignore[misc]

    async def _start_redis(self) -> Process:
        folder = self.folder / "redis"
        folder.mkdir(mode=0o700, exist_ok=True)
        with (self.folder / "redis.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(str(find_redis_server()), *redis_arguments(self.folder / "redis.sock", folder)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            await wait_for_redis(self._redis_url, _REDIS_START_S)
        except TandemError as error:
            await stop_process(process)
            raise ConfigError(f"Redis did not start; its log is {self.folder / 'redis.log'}", reason=Reason.START_FAILED) from error
        return process

    async def _start_ray(self) -> Process:
        arguments = ["tandem.ray_head", f"--temp-dir={ray_folder(self.cluster)}", f"--host={self.config.host}"]
        process, facts = await start_program(arguments, self.folder / "ray.log", ready="ray ready")
        self._ray_address = facts["address"]
        return process

    async def _start_router(self, number: int) -> Process:
        """On its configured ports, and after a death on those it had."""
        address, http = self.router_addresses[number], self.http_addresses[number]
        port = address.rpartition(":")[2] if address else self.config.port and self.config.port + number
        http_port = http.rpartition(":")[2] if http else self.config.http_port and self.config.http_port + number
        settings = [f"--{key.replace('_', '-')}={value}" for key, value in self.config.router.items()]
        arguments = [
            *("router", f"--cluster={self.cluster}", f"--router-id=router-{number}", f"--host={self.config.host}"),
            *(f"--port={port}", f"--http-port={http_port}", f"--redis-url={self._redis_url}", *settings),
        ]
        process, facts = await start_program(arguments, self.folder / f"router-{number}.log", ready="router ready")
        self.router_addresses[number], self.http_addresses[number] = facts["address"], facts["http"]
        return process

    async def _start_autoscaler(self, number: int) -> Process:
        arguments = [
            *("autoscaler", f"--id=autoscaler-{number}", f"--config-json={self.config.to_json()}"),
            *(f"--redis-url={self._redis_url}", f"--ray-address={self._ray_address}"),
        ]
        process, _ = await start_program(arguments, self.folder / f"autoscaler-{number}.log", ready="autoscaler ready")
        return process

    async def _wait_ready(self) -> None:
        """Until every replica that is configured has its lease; says what is waited for. Raises ConfigError."""
        assert self.register is not None
        try:
            async with asyncio.timeout(_READY_S), aclosing(self.register.snapshots(1.0)) as snapshots:
                async for snapshot in snapshots:
                    ready = count_replicas(snapshot)
                    wanted = sum(target.replicas for target in snapshot.targets) or self._configured_replicas
                    self._progress(f"waiting for replicas: {ready} of {wanted} serve")
                    if ready >= wanted:
                        self.ready_replicas = ready
                        return
                    self._check_children()
                    _check_starts(snapshot)
        except TimeoutError as error:
            raise ConfigError(
                f"the replicas did not start in {_READY_S:.0f} s; logs are in {self.folder}", reason=Reason.START_FAILED
            ) from error

    def _check_children(self) -> None:
        """Raises ConfigError where a child dies again and again during the start."""
        for child in self.children.values():
            if child.restarts > 2:
                log = self.folder / f"{child.name}.log"
                raise ConfigError(f"{child.name} does not stay up; its log is {log}", reason=Reason.START_FAILED)

    def _write_endpoint_file(self, *, is_ready: bool = True) -> None:
        endpoints: dict[str, object] = {"cluster": self.cluster, "pid": os.getpid()}
        if is_ready:
            endpoints |= {
                "grpc": ",".join(self.router_addresses),
                "http": [f"http://{address}" for address in self.http_addresses],
                "redis_url": self._redis_url,
            }
        write_endpoint_file(self.cluster, endpoints)


def _check_starts(snapshot: Snapshot) -> None:
    """Raises ConfigError with the replicas' own words where a model's do not start."""
    failed = next((model for model in snapshot.models if model.error), None)
    if failed is not None:
        raise ConfigError(failed.error, reason=Reason.START_FAILED)


def count_replicas(snapshot: Snapshot) -> int:
    """Replicas with a lease."""
    return sum(member.kind is MemberKind.REPLICA for member in snapshot.members)


def check(config: ClusterConfig) -> None:
    """Everything that can be known before a process starts. Raises ConfigError."""
    config.validate()
    check_models(config)
    read_section(ScalerConfig, config.scaler, "scaler.").validate()
    read_section(RouterConfig, config.router, "router.").validate()
    require_vllm()
    if config.ray_address and (not config.redis_url or config.redis_url.startswith("unix")):
        raise ConfigError("RAY_ADDRESS needs a REDIS_URL that other nodes can reach: redis://HOST:PORT")
    for model in config.models:
        resolve_model(model.model)
    if not config.ray_address:
        _check_memory(config)
        check_room(Path(config.store_dir) if config.store_dir else shm_folder("none"))
    for flag, first in (("--port", config.port), ("--http-port", config.http_port)):
        for number in range(config.routers if first else 0):
            check_port(config.host, first + number, flag)


def _check_memory(config: ClusterConfig) -> None:
    needed_bytes = sum(
        (model.memory_bytes_per_replica or replica_memory_bytes(model)) * (model.prefill + model.decode) for model in config.models
    )
    free_bytes = psutil.virtual_memory().available - _FREE_MEMORY_BYTES
    if needed_bytes > free_bytes:
        count = sum(model.prefill + model.decode for model in config.models)
        raise ConfigError(
            f"{count} replicas need {needed_bytes // MIB} MiB of memory and {max(0, free_bytes) // MIB} MiB are free: "
            "ask for fewer, or for less --kv-cache-bytes",
            reason=Reason.NO_ROOM,
        )
    shm_bytes = shutil.disk_usage("/dev/shm").free
    if shm_bytes < OBJECT_STORE_BYTES:
        raise ConfigError(
            f"/dev/shm has {shm_bytes // MIB} MiB free, and Ray alone needs {OBJECT_STORE_BYTES // MIB} MiB", reason=Reason.NO_ROOM
        )


@contextlib.asynccontextmanager
async def _unwrapped():  # type: ignore[no-untyped-def]
    """The first ConfigError of a task group instead of the group."""
    try:
        yield
    except* ConfigError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def run_up(config: ClusterConfig) -> None:
    """Starts the cluster, prints its endpoints, serves until Ctrl-C or SIGTERM. Raises ConfigError."""
    asyncio.run(_run_up(config, Console()))


async def _run_up(config: ClusterConfig, console: Console) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    started_s = time.monotonic()
    stage = ""
    is_serving = False

    def progress(line: str) -> None:
        nonlocal stage
        if line != stage and (not console.is_terminal or is_serving):
            console.print(f"{time.monotonic() - started_s:6.1f} s  {line}", highlight=False)
        stage = line

    platform = Platform(config, progress)
    try:
        starting = asyncio.create_task(platform.start(), name="start")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        with console.status("") if console.is_terminal else contextlib.nullcontext() as status:
            while not starting.done() and not stopping.done():
                if status is not None:
                    status.update(f"{time.monotonic() - started_s:.0f} s  {stage}")
                await asyncio.wait({starting, stopping}, timeout=_STATUS_S, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            is_serving = True
            _print_ready(console, platform, time.monotonic() - started_s)
            await stopping
        else:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        console.print("stopping", highlight=False)
    finally:
        await platform.stop()


def _print_ready(console: Console, platform: Platform, took_s: float) -> None:
    console.print(f"ready in {took_s:.1f} s: {platform.ready_replicas} replicas, cluster {platform.cluster}", highlight=False)
    for name, addresses in (("gRPC  ", platform.router_addresses), ("HTTP  ", [f"http://{item}" for item in platform.http_addresses])):
        console.print(f"  {name}    {', '.join(addresses)}", highlight=False)
    console.print(f"  logs      {platform.folder}", highlight=False)
    console.print('  try       tandem generate "The for statement"', highlight=False)
    console.print("Ctrl-C stops all of it", highlight=False)
