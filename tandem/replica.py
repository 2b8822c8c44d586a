"""One replica: an engine and the Worker service, for prefill and decode alike. The role only says what routers send.

The engine is built first, on the main thread; then the event loop and gRPC start. `run` returns when the replica has come to its end
(`ending.py`); where its engine hangs, the process ends at once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys

import uvloop
from prometheus_client import REGISTRY, start_http_server

from decode_workers.remote_blocks import RemoteBlocks
from decode_workers.service import DecodeService
from kv_transfer.prefix_source import PrefixSource
from prefill_workers.service import PrefillService
from tandem.channel_pool import ChannelPool
from tandem.config import ReplicaConfig
from tandem.convert import block_change_to_pb, lease_to_pb, load_to_pb, step_to_pb
from tandem.custody import Custody, claim
from tandem.domain import Lease, ModelId, Namespace, ReplicaId, Role, WorkerLoad
from tandem.ending import Ending
from tandem.engine.base import Engine
from tandem.engine.model_files import resolve_model
from tandem.engine_watch import EngineJudge, WatchedEngine, until_hung
from tandem.errors import ConfigError
from tandem.faults import Faults
from tandem.heap import trim_heap
from tandem.membership import Member, MemberKind, Register
from tandem.registrar import Registrar
from tandem.replica_engines import build_engine
from tandem.rpc import ServerCall, service, start_server
from tandem.telemetry import RemoteKvMetrics, WorkerCollector
from tandem.v1 import worker_pb2
from tandem.worker_state import Stamp, StampKind, WorkerState

logger = logging.getLogger(__name__)

# Changes within this time travel in one message: the tokens that caused them have the processor first.
_WATCH_MIN_S = 0.02
# Nothing runs, so nothing changes unsaid: a sign of life. Each costs a router and a replica 0.1 % of a core.
_WATCH_IDLE_S = 1.0
_MAX_MESSAGE_BLOCKS = 4096  # 32 KiB; a snapshot of 10**6 blocks takes 250 messages
_LEASE_POLL_S = 3600.0  # the lease tells when it changes
_EXIT_HUNG = 71
_STAMP_KINDS = {
    StampKind.ACCEPTED: worker_pb2.RequestStamp.KIND_ACCEPTED,
    StampKind.FINISHED: worker_pb2.RequestStamp.KIND_FINISHED,
}


class WorkerService:
    """The Worker service of one replica."""

    def __init__(
        self, prefill: PrefillService, decode: DecodeService, engine: Engine, state: WorkerState, *, watch_interval_s: float
    ) -> None:
        self.prefill = prefill.prefill
        self.generate = decode.generate
        self._engine = engine
        self._state = state
        self._watch_interval_s = watch_interval_s

    async def watch(self, request: worker_pb2.WatchRequest, call: ServerCall) -> None:
        """Streams the lease, then load, stamps, measured steps and cached blocks at 10 Hz and on change, until the router goes."""
        sequence = 0
        lease, stamps = None, list[Stamp]()
        with self._state.watch(request.router_id) as watcher, self._engine.blocks.listen() as cached:
            while True:
                self._state.measured(self._engine.take_steps())
                message = worker_pb2.WatchResponse(
                    incarnation=self._state.lease.incarnation,
                    sequence=sequence,
                    lease=lease_to_pb(self._state.lease) if lease is not self._state.lease else None,
                    load=load_to_pb(self.load()),
                    stamps=[
                        worker_pb2.RequestStamp(request_id=stamp.request_id, attempt=stamp.attempt, kind=_STAMP_KINDS[stamp.kind])
                        for stamp in stamps
                    ],
                    steps=[step_to_pb(step) for step in watcher.take_steps()],
                    block_events=block_change_to_pb(cached.take(_MAX_MESSAGE_BLOCKS)),
                )
                lease = self._state.lease
                await call.write(message)
                sequence += 1
                if self._state.is_ending and not self._state.running_requests:
                    return
                await asyncio.sleep(_WATCH_MIN_S)
                idle_s = 0.0 if cached.is_behind else _WATCH_IDLE_S
                stamps = await watcher.changed(self._watch_interval_s if self._state.running_requests else idle_s)

    def load(self) -> WorkerLoad:
        """What routers are told."""
        engine, totals = self._engine.load(), self._engine.kv_totals()
        return WorkerLoad(
            running_requests=self._state.running_requests,
            waiting_requests=engine.waiting_requests,
            pending_prefill_tokens=self._state.pending_prefill_tokens,
            kv_used_fraction=engine.kv_used_fraction,
            kv_tokens=self._state.kv_tokens,
            generated_tokens_total=self._state.generated_tokens_total,
            corrupt_blocks_total=totals.corrupt_blocks,
            missing_blocks_total=totals.missing_blocks,
            loaded_bytes_total=totals.loaded_bytes,
            published_bytes_total=totals.published_bytes,
        )

    def unowned_requests(self) -> int:
        """Attempts booked here, and runs of the engine, that no call waits for any more."""
        return self._state.unowned_requests + self._engine.load().unowned_requests

    def accepted_prefill_tokens(self) -> int:
        """Prompt tokens that attempts had computed here, or were to, since the start."""
        return self._state.accepted_prefill_tokens_total

    async def drain(self, request: worker_pb2.DrainRequest, call: ServerCall) -> worker_pb2.DrainResponse:
        """Takes no new work from now on; running requests go on."""
        self._state.drain()
        return worker_pb2.DrainResponse(running_requests=self._state.running_requests)


def run(config: ReplicaConfig, lifeline_fd: int | None = None) -> None:
    """Builds the engine, serves until it is told to end, and ends everything it started.

    SIGINT ends it at once, SIGTERM once nothing runs. Writes one line to stdout (or `lifeline_fd`) once it serves:
    `replica ready id=... address=...`. The end of the lifeline is the supervisor's death: it serves on for a while. Raises ConfigError.
    """
    faults = Faults.parse(config.engine.faults)
    if lifeline_fd is not None and config.runtime_dir:
        claim(config)
    engine, namespace = build_engine(config)
    try:
        uvloop.run(_serve(config, engine, namespace, faults, lifeline_fd))
    finally:
        engine.close()


async def _serve(config: ReplicaConfig, engine: WatchedEngine, namespace: Namespace, faults: Faults, lifeline_fd: int | None) -> None:
    ending = Ending()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ending.drain)
    loop.add_signal_handler(signal.SIGINT, ending.stop)
    engine.start()
    watching = asyncio.create_task(_end_where_hung(config, engine), name="watch the engine")
    trim_heap()
    channels = ChannelPool()
    lease = Lease(
        replica_id=ReplicaId(config.replica_id),
        incarnation=config.incarnation,
        node=config.node,
        role=Role(config.role),
        model=ModelId(config.served_model),
        model_path=str(resolve_model(config.engine.model)),
        namespace=namespace,
        address="",
        engine=engine.info,
        store_address=config.store_address,
    )
    state = WorkerState(lease)
    remote_blocks = RemoteBlocks(engine, state, channels, RemoteKvMetrics(REGISTRY), wait_s=config.publish_wait_s)
    prefixes: PrefixSource | None = None
    if config.store_address and config.prefetch_wait_s > 0:
        prefixes = PrefixSource(engine.info, namespace, channels, config.store_address, wait_s=config.prefetch_wait_s)
    wait_s = config.publish_wait_s
    worker = WorkerService(
        PrefillService(engine, state, publish_wait_s=wait_s, faults=faults, prefixes=prefixes),
        DecodeService(engine, state, channels, publish_wait_s=wait_s, remote_blocks=remote_blocks, prefixes=prefixes),
        engine,
        state,
        watch_interval_s=config.watch_interval_s,
    )
    server = await start_server(config.host, config.port, {"tandem.v1.Worker": service(worker_pb2, "Worker", worker)})
    REGISTRY.register(WorkerCollector(worker.load, engine.kv_totals, worker.unowned_requests, worker.accepted_prefill_tokens))
    metrics_server, _ = start_http_server(config.metrics_port, addr=config.host)
    state.set_addresses(server.address, f"{config.host}:{metrics_server.server_port}")
    _report(f"replica ready id={config.replica_id} role={config.role} address={state.lease.address}", lifeline_fd)
    custody = Custody(config, ending, lambda: _introduction(config, state, ending))
    if lifeline_fd is not None:
        await custody.open(lifeline_fd)
    registration = asyncio.create_task(_stay_registered(config, state, ending), name="registration")

    def registration_ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:  # a replica without a lease would go on, unseen
            logger.error("registration_died replica_id=%s error=%r", config.replica_id, error, exc_info=error)
            ending.stop()

    registration.add_done_callback(registration_ended)
    try:
        await ending.ordered()
        state.end()
        await server.set_serving(False)
        await ending.drained(state, config.drain_s)
        registration.cancel()
    finally:
        watching.cancel()
        await asyncio.gather(registration, server.stop(), return_exceptions=True)
        await channels.close()
        metrics_server.shutdown()
        custody.close()


async def _end_where_hung(config: ReplicaConfig, engine: WatchedEngine) -> None:
    """Nothing could be ended in order where the engine takes part no more; its process goes with this one."""
    why = await until_hung(engine, EngineJudge(config.step_timeout_s, os.sysconf("SC_CLK_TCK")))
    logger.error("engine_hung replica_id=%s the engine %s", config.replica_id, why)
    os._exit(_EXIT_HUNG)


def _introduction(config: ReplicaConfig, state: WorkerState, ending: Ending) -> str:
    """What the replica's next supervisor is told."""
    own = f"id={config.replica_id} pid={os.getpid()} address={state.lease.address} incarnation={config.incarnation}"
    return f"replica adopted {own} fingerprint={config.fingerprint()} is_ending={int(state.is_ending or ending.is_draining)}"


async def _stay_registered(config: ReplicaConfig, state: WorkerState, ending: Ending) -> None:
    """Holds the replica's lease in the register, where there is one. A newer incarnation of the same replica stops this one."""
    if not config.redis_url:
        return
    from tandem.redis_register import RedisRegister

    register: Register = RedisRegister(config.redis_url, config.cluster)
    registrar = Registrar(register, _member(state.lease), ending.stop)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(registrar.run(), name="registrar")
            lease = state.lease
            with state.watch("") as watcher:
                while not ending.stopped.is_set():
                    await watcher.changed(_LEASE_POLL_S)
                    if state.lease is not lease:
                        lease = state.lease
                        registrar.update(_member(lease))
    finally:
        await register.close()


def _member(lease: Lease) -> Member:
    return Member(
        kind=MemberKind.REPLICA,
        member_id=lease.replica_id,
        incarnation=lease.incarnation,
        node=lease.node,
        pid=os.getpid(),
        address=lease.address,
        metrics_address=lease.metrics_address,
        model=lease.model,
        role=lease.role,
        namespace=lease.namespace,
        state=lease.state,
    )


def _report(line: str, lifeline_fd: int | None) -> None:
    if lifeline_fd is None:
        print(line, flush=True)
        return
    with contextlib.suppress(BrokenPipeError):
        os.write(lifeline_fd, f"{line}\n".encode())


def main_with_errors(config: ReplicaConfig, lifeline_fd: int | None = None) -> int:
    """`run`, with a ConfigError as one line on stderr and exit status 2."""
    try:
        run(config, lifeline_fd)
    except ConfigError as error:
        _report(f"replica failed {error.message}", lifeline_fd)
        print(f"tandem: error: {error.message}", file=sys.stderr)
        return 2
    return 0
