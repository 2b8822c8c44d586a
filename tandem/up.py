"""`tandem up`: starts a cluster's control processes on this machine, keeps them alive until Ctrl-C, leaves nothing behind.

Redis, the Ray head, routers and autoscalers are its children; replicas and node agents are the autoscaler's, through Ray. Decides nothing.
"""

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from types import MappingProxyType

import psutil

from kv_transfer.kv_redis_store import kv_redis_arguments
from tandem.cleanup import CONFIG_FILE, MEMBER_OF, clean_cluster, end_ray, processes_of
from tandem.client import AsyncClient
from tandem.cluster_config import ClusterConfig
from tandem.endpoint import write_endpoint_file
from tandem.errors import ConfigError, Reason, TandemError
from tandem.keeper import Keeper, Process
from tandem.launch import start_program, stop_process, tail
from tandem.membership import LEASE_S, REGISTER_URL, MemberKind, Snapshot
from tandem.network import advertised_host
from tandem.node_folder import cluster_folder, ray_folder, shm_folder
from tandem.parenthood import die_with_parent
from tandem.preflight import check
from tandem.ray_environment import set_ray_environment
from tandem.redis_register import RedisRegister
from tandem.redis_server import check_redis, find_redis_server, redis_arguments, wait_for_redis
from tandem.tenant_config import TENANTS_VARIABLE, tenants_to_json
from tandem.tether import hold, is_held

_READY_S = 300.0
_REDIS_START_S = 10.0
_CLEAN_S = 60.0
_POLL_S = 0.1
_REACHED_S = 30.0
_MAX_RESTARTS = 2  # of one child during the start
_KV_REDIS = "kv-redis"
_CLAIM = "claim"  # in the cluster's folder of blocks, which all users of a machine share: held by the `up` that runs

Progress = Callable[[str], None]


class Platform:
    """One cluster. `start`, use it, `stop`; `stop` cleans up after a failed start too."""

    def __init__(self, config: ClusterConfig, progress: Progress = lambda _: None) -> None:
        self.config = config if config.cluster else replace(config, cluster=f"{os.getuid()}-{secrets.token_hex(3)}")
        self.cluster = self.config.cluster
        self.folder = cluster_folder(self.cluster)
        self.router_addresses: list[str] = [""] * self.config.routers
        self.http_addresses: list[str] = [""] * self.config.routers
        self.register: RedisRegister | None = None
        self.ready_replicas = 0  # at the end of the start
        self._progress = progress
        self._keeper = Keeper(progress, self._restarted)
        self._guard: Process | None = None
        self._claim_lock: int | None = None
        self._redis_url = self.config.redis_url
        self._ray_address = self.config.ray_address
        self._kv_redis_bytes = self.config.kv_redis_bytes

    async def start(self) -> None:
        """Starts all of it and waits until every replica asked for serves. Raises ConfigError."""
        await asyncio.to_thread(check, self.config)
        try:
            await self._claim()
        except OSError as error:
            raise ConfigError(f"cannot make the cluster's folders: {error}") from error
        set_ray_environment(os.environ, self.config.host)
        self._progress("starting Redis and Ray" if not self._ray_address else f"using Ray at {self._ray_address}")
        async with _unwrapped(), asyncio.TaskGroup() as group:
            group.create_task(self._start_redis_and_routers(), name="redis and routers")
            if not self._ray_address:
                group.create_task(self._keeper.keep("ray", self._start_ray), name="ray")
        self.register = RedisRegister(self._redis_url, self.cluster)
        self._progress("starting the autoscaler")
        for number in range(self.config.autoscalers):
            await self._keeper.keep(f"autoscaler-{number}", lambda number=number: self._start_autoscaler(number))  # type: ignore[misc]
        await self._wait_ready()
        self._progress("waiting for the routers to reach them")
        await asyncio.gather(*(self._wait_reached(address) for address in self.router_addresses))
        self._write_endpoint_file()

    async def stop(self) -> None:
        """Ends every process and removes every file: by the guard, as after a crash."""
        await self._keeper.release()
        if self.register is not None:
            await self.register.close()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            if await self._guard.wait() != 0:  # it was killed, so this process does its work
                await asyncio.to_thread(clean_cluster, self.cluster)
        await self._keeper.stop()
        if self._claim_lock is not None:
            os.close(self._claim_lock)

    @property
    def _configured_replicas(self) -> int:
        return sum(model.prefill + model.decode for model in self.config.models)

    async def _claim(self) -> None:
        """Takes the cluster id on this machine for this process's life. Raises ConfigError where it is in use."""
        blocks = shm_folder(self.cluster)
        in_use = ConfigError(f"cluster {self.cluster!r} runs already on this machine: stop it with `tandem down --cluster {self.cluster}`")
        if is_held(blocks / _CLAIM):
            raise in_use
        if blocks.exists() or self.folder.exists() or processes_of(self.cluster):
            self._progress("clearing away what the last run left")
            async with asyncio.timeout(_CLEAN_S):
                while any(process.kind == "guard" for process in processes_of(self.cluster)):  # noqa: ASYNC110 - it does so itself
                    await asyncio.sleep(_POLL_S)
            await asyncio.to_thread(clean_cluster, self.cluster)
        try:
            blocks.mkdir(mode=0o700)
        except FileExistsError as error:  # another one was quicker, or it is another user's
            raise in_use from error
        self._claim_lock = hold(blocks / _CLAIM)
        os.environ[MEMBER_OF] = self.cluster
        for folder in (self.folder, ray_folder(self.cluster)):
            folder.mkdir(mode=0o700, parents=True)
        (self.folder / CONFIG_FILE).write_text(self.config.to_json())
        self._write_endpoint_file(is_ready=False)
        self._guard = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tandem.guard", self.cluster),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

    def _restarted(self, name: str) -> None:
        """Autoscalers know the Ray that died, or try to reach it: they are to begin again."""
        if name == "ray":
            for child in self._keeper.children.values():
                if child.name.startswith("autoscaler"):
                    with contextlib.suppress(ProcessLookupError):  # it has died of that already
                        child.process.terminate()

    async def _start_redis_and_routers(self) -> None:
        if self._redis_url:
            await check_redis(self._redis_url)
            await self._take_register()
        else:
            self._redis_url = f"unix://{self.folder / 'redis.sock'}"
            await self._keeper.keep("redis", lambda: self._start_redis("redis"), may_stop=True)
        if self._kv_redis_bytes:
            self.config = replace(self.config, kv_redis_url=f"unix://{self.folder / _KV_REDIS}.sock", kv_redis_bytes=0)
            await self._keeper.keep(_KV_REDIS, lambda: self._start_redis(_KV_REDIS), may_stop=True)
        for number in range(self.config.routers):
            await self._keeper.keep(f"router-{number}", lambda number=number: self._start_router(number))  # type: ignore[misc]

    async def _take_register(self) -> None:
        """Of a Redis that outlives clusters: nobody of this one may live there, and an earlier run is forgotten. Raises ConfigError."""
        register = RedisRegister(self._redis_url, self.cluster)
        try:
            async with asyncio.timeout(2 * LEASE_S):
                while (await register.snapshot()).members:  # noqa: ASYNC110 - they may have been killed a moment ago
                    await asyncio.sleep(_POLL_S)
            await register.erase()
        except TimeoutError as error:
            raise ConfigError(
                f"cluster {self.cluster!r} runs already with this Redis, on another machine or by another user: choose another --cluster"
            ) from error
        except TandemError as error:
            raise ConfigError(error.message) from error
        finally:
            await register.close()

    async def _start_redis(self, name: str) -> Process:
        """The control database, "redis", or the one that blocks overflow into, "kv-redis"."""
        folder, socket = self.folder / name, self.folder / f"{name}.sock"
        folder.mkdir(mode=0o700, exist_ok=True)
        arguments = kv_redis_arguments(socket, folder, self._kv_redis_bytes) if name == _KV_REDIS else redis_arguments(socket, folder)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(str(find_redis_server()), *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            await wait_for_redis(f"unix://{socket}", _REDIS_START_S)
        except TandemError as error:
            await stop_process(process)
            raise ConfigError(f"Redis did not start: {tail(self.folder / f'{name}.log')}", reason=Reason.START_FAILED) from error
        return process

    async def _start_ray(self) -> Process:
        await asyncio.to_thread(end_ray, self.cluster)  # of a head that died some processes live on for a minute
        arguments = ["tandem.ray_head", f"--temp-dir={ray_folder(self.cluster)}", f"--host={advertised_host(self.config.host)}"]
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
            *(f"--port={port}", f"--http-port={http_port}", *settings),
        ]
        if self.config.event_log:
            arguments.append(f"--event-log={self.config.event_log}/router-{number}.events")
        environment = {TENANTS_VARIABLE: tenants_to_json(self.config.tenants)}
        process, facts = await self._start_program(arguments, f"router-{number}", ready="router ready", environment=environment)
        self.router_addresses[number], self.http_addresses[number] = facts["address"], facts["http"]
        return process

    async def _start_autoscaler(self, number: int) -> Process:
        ray_address, told = self._ray_address, replace(self.config, redis_url="", tenants=()).to_json()
        arguments = ["autoscaler", f"--id=autoscaler-{number}", f"--config-json={told}", f"--ray-address={ray_address}"]
        process, _ = await self._start_program(arguments, f"autoscaler-{number}", ready="autoscaler ready")
        if ray_address != self._ray_address:
            await stop_process(process)
            raise ConfigError("Ray has begun again meanwhile", reason=Reason.START_FAILED)
        return process

    async def _start_program(
        self, arguments: list[str], name: str, *, ready: str, environment: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[Process, dict[str, str]]:
        environment = {**environment, REGISTER_URL: self._redis_url}
        return await start_program(arguments, self.folder / f"{name}.log", ready=ready, environment=environment)

    async def _wait_ready(self) -> None:
        """Until every replica that is configured has its lease; says what is waited for. Raises ConfigError."""
        assert self.register is not None
        try:
            async with asyncio.timeout(_READY_S), aclosing(self.register.snapshots(1.0)) as snapshots:
                async for snapshot in snapshots:
                    ready = self.ready_replicas = count_replicas(snapshot)
                    wanted = sum(target.replicas for target in snapshot.targets) or self._configured_replicas
                    self._progress(f"waiting for replicas: {ready} of {wanted} serve")
                    if ready >= wanted:
                        return
                    self._check_children()
                    _check_starts(snapshot)
        except TimeoutError as error:
            raise ConfigError(
                f"{self.ready_replicas} of {self._configured_replicas} replicas started in {_READY_S:.0f} s", reason=Reason.START_FAILED
            ) from error

    async def _wait_reached(self, address: str) -> None:
        """Until this router reaches the replicas that are ready: it reads the register a moment after us. Raises ConfigError."""
        reached = 0
        async with AsyncClient(address) as client:
            for _ in range(int(_REACHED_S / _POLL_S)):
                with contextlib.suppress(TandemError):  # it may be starting again
                    reached = sum(replica.is_reachable for replica in (await client.status(timeout_s=_POLL_S * 10)).replicas)
                if reached >= self.ready_replicas:
                    return
                await asyncio.sleep(_POLL_S)
        raise ConfigError(f"the router at {address} reaches {reached} of {self.ready_replicas} replicas", reason=Reason.START_FAILED)

    def _check_children(self) -> None:
        """Raises ConfigError where a child dies again and again during the start."""
        for child in self._keeper.children.values():
            if child.restarts > _MAX_RESTARTS:
                raise ConfigError(f"{child.name} does not stay up: {tail(self.folder / f'{child.name}.log')}", reason=Reason.START_FAILED)

    def _write_endpoint_file(self, *, is_ready: bool = True) -> None:
        endpoints: dict[str, object] = {"cluster": self.cluster, "pid": os.getpid(), "started": psutil.Process().create_time()}
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


@contextlib.asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """The first ConfigError of a task group instead of the group."""
    try:
        yield
    except* ConfigError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
