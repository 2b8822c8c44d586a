"""The autoscaler process: stands for election, and as the leader observes, decides and reconciles until it is told to stop.

The only place that builds its objects. One line on stdout says that it runs, one on stderr why it cannot.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress

from prometheus_client import CollectorRegistry, start_http_server

from autoscaler.config import PoolLimits, ScalerConfig
from autoscaler.core import ScalerCore
from autoscaler.observation import Observation
from autoscaler.observe import Observer
from autoscaler.plan import DecisionReason, Plan
from autoscaler.pool import ReplicaNames, model_name
from autoscaler.ray_client import join_ray, stop_all
from autoscaler.ray_pool import RayPool
from autoscaler.reconcile import Reconciler
from decode_workers.actor import DecodeActor
from prefill_workers.actor import PrefillActor
from tandem.channel_pool import ChannelPool
from tandem.cluster_config import ClusterConfig, cluster_config_from_json, read_section
from tandem.domain import ModelId, ReplicaTarget, Role
from tandem.errors import ConfigError, Reason, TandemError, UnavailableError
from tandem.membership import REGISTER_URL, RENEW_S, Member, MemberKind, Register, ServedModel
from tandem.network import advertised_host
from tandem.node_agent import NodeAgent
from tandem.ray_environment import set_ray_environment
from tandem.redis_register import RedisRegister
from tandem.registrar import Registrar
from tandem.telemetry import ScalerMetrics

logger = logging.getLogger(__name__)

_EXIT_CONFIG = 2
_TICK_S = 1.0  # between observations; nudges and deaths bring the next one at once
_IDLE_TICK_S = 3.0  # the same while no request runs and no replica starts
_REFRESH_S = 6.0  # between looks at Ray for what nobody told
_SETTLE_S = 0.05  # a burst of changes makes one tick
_STUCK_S = 60.0  # a leader whose tick takes longer lets another one lead


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an autoscaler; the exit code: 0 stopped by a signal, 2 a setting is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m autoscaler", description="Decides how many replicas there are, and starts and stops them."
    )
    parser.add_argument("--config-json", required=True, help="a whole ClusterConfig")
    parser.add_argument("--redis-url", default=os.environ.get(REGISTER_URL, ""), help="the register; default: REDIS_URL")
    parser.add_argument("--ray-address", required=True)
    parser.add_argument("--id", default=f"autoscaler-{os.getpid()}")
    parser.add_argument("--stop-all", action="store_true", help="end every actor of the cluster, then exit")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    status = 0
    try:
        config = cluster_config_from_json(options.config_json)
        if options.stop_all:
            stop_all(options.ray_address, config)
            return 0
        asyncio.run(_serve(config, options.redis_url, options.ray_address, options.id))
    except* ConfigError as group:
        print(f"autoscaler: {_first(group).message}", file=sys.stderr)
        status = _EXIT_CONFIG
    return status


def _first(group: BaseExceptionGroup[ConfigError]) -> ConfigError:
    """One of its errors: they come out of nested task groups."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _serve(config: ClusterConfig, redis_url: str, ray_address: str, name: str) -> None:
    set_ray_environment(os.environ, config.host)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    registry = CollectorRegistry()
    register = RedisRegister(redis_url, config.cluster)
    metrics_server, thread = start_http_server(0, addr=config.host, registry=registry)
    channels = ChannelPool()
    member = Member(
        kind=MemberKind.AUTOSCALER,
        member_id=name,
        incarnation=time.time_ns(),
        node=socket.gethostname(),
        pid=os.getpid(),
        metrics_address=f"{advertised_host(config.host)}:{metrics_server.server_port}",
    )
    scaler = Autoscaler(config, register, redis_url, ray_address, channels, ScalerMetrics(registry), name)
    print(f"autoscaler ready metrics={member.metrics_address}", flush=True)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(Registrar(register, member, stop.set).run(), name="registrar"),
                group.create_task(scaler.run(), name="autoscaler"),
            ]
            await stop.wait()
            for task in tasks:
                task.cancel()
    finally:
        await channels.close()
        await register.close()
        metrics_server.shutdown()
        metrics_server.server_close()
        thread.join()


class Autoscaler:
    """One candidate: waits to lead, leads as long as it may."""

    def __init__(
        self,
        config: ClusterConfig,
        register: Register,
        redis_url: str,
        ray_address: str,
        channels: ChannelPool,
        metrics: ScalerMetrics,
        name: str,
    ) -> None:
        self._config = config
        self._register = register
        self._redis_url = redis_url
        self._ray_address = ray_address
        self._channels = channels
        self._metrics = metrics
        self._name = f"{name}-{time.time_ns()}"  # another process under the same id is another candidate
        self._epoch: int | None = None
        self._wake = asyncio.Event()
        self._ticked_s = 0.0  # when the leader last began a tick
        self._must_refresh = False

    async def run(self) -> None:
        """Stands for election for ever; gives leadership back when cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._stand(), name="election")
                group.create_task(self._hear_nudges(), name="nudges")
                group.create_task(self._lead(), name="lead")
        finally:
            await self._resign()

    async def _resign(self) -> None:
        with suppress(TandemError, TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.shield(self._register.resign(self._name))

    async def _stand(self) -> None:
        """Holds or takes the lock. Where the register is silent the last word holds: it could tell nobody else either."""
        while True:
            if self._epoch is not None and time.monotonic() - self._ticked_s > _STUCK_S:
                logger.error("leader_stuck candidate=%s", self._name)
                await self._resign()
                raise UnavailableError("the leader's tick does not end", reason=Reason.START_FAILED)
            try:
                epoch = await self._register.try_lead(self._name)
            except TandemError as error:
                logger.warning("election_silent error=%s", error.message)
            else:
                if (epoch is None) != (self._epoch is None):
                    logger.info("leadership candidate=%s is_leader=%s", self._name, epoch is not None)
                    self._ticked_s = time.monotonic()
                    self._wake.set()
                self._epoch = epoch
                self._metrics.is_leader.set(epoch is not None)
            await asyncio.sleep(RENEW_S)

    async def _hear_nudges(self) -> None:
        async with aclosing(self._register.nudges(_REFRESH_S)) as nudges:
            async for _ in nudges:
                self._wake.set()

    def _changed(self) -> None:
        self._must_refresh = True
        self._wake.set()

    async def _lead(self) -> None:
        """Each time it is elected begins anew: what it knew of the pools is another's past."""
        while True:
            while self._epoch is None:
                await self._wake.wait()
                self._wake.clear()
            await join_ray(self._ray_address, self._config)
            await self._reign()

    async def _reign(self) -> None:
        """A tick at each wake-up, as long as it leads."""
        config = self._config
        core = ScalerCore(_limits(config, await self._last_targets()), read_section(ScalerConfig, config.scaler, "scaler."))
        actors = {Role.PREFILL: PrefillActor, Role.DECODE: DecodeActor}
        pool = RayPool(actors, NodeAgent, config, self._redis_url, self._changed, self._register)
        observer = Observer(self._register, self._channels)
        refreshed_s, pause_s = 0.0, _TICK_S
        async with asyncio.TaskGroup() as group:
            reconciler = Reconciler(
                pool,
                ReplicaNames(config.models),
                self._channels,
                group,
                on_start_failed=lambda key: core.starts_failed(key, time.monotonic()),
            )
            try:
                while self._epoch is not None:
                    self._ticked_s = time.monotonic()
                    try:
                        if self._must_refresh or self._ticked_s - refreshed_s > _REFRESH_S:
                            self._must_refresh = False
                            await pool.refresh()
                            refreshed_s = time.monotonic()
                        with self._metrics.ticks.time():
                            observation = await self._tick(pool, core, observer, reconciler)
                        pause_s = _IDLE_TICK_S if observation.is_idle else _TICK_S
                    except UnavailableError as error:  # Ray; the register's silence is no error here
                        logger.warning("tick_failed error=%s", error.message)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause_s):
                            await self._wake.wait()
                    await asyncio.sleep(_SETTLE_S)
                    self._wake.clear()
            finally:
                reconciler.abandon()
                pool.close()

    async def _last_targets(self) -> Sequence[ReplicaTarget]:
        """Of the leader before, where the register knows."""
        try:
            return (await self._register.snapshot()).targets
        except TandemError:
            return ()

    async def _tick(self, pool: RayPool, core: ScalerCore, observer: Observer, reconciler: Reconciler) -> Observation:
        await reconciler.clear()
        observation = await observer.observe(pool.replicas.values(), reconciler.leaving)
        plan = core.tick(observation, time.monotonic())
        for decision in plan:
            if decision.is_changed:
                logger.info(
                    "decision model=%s role=%s replicas=%d current=%d reason=%s detail=%s",
                    *(decision.model, decision.role, decision.replicas, decision.current, decision.reason, decision.detail),
                )
                self._metrics.decisions.labels(decision.model, decision.role, decision.reason).inc()
            self._metrics.target_replicas.labels(decision.model, decision.role).set(decision.replicas)
            self._metrics.current_replicas.labels(decision.model, decision.role).set(decision.current)
        await reconciler.converge(plan, observation)
        await self._publish(plan, reconciler.errors)
        return observation

    async def _publish(self, plan: Plan, errors: Mapping[ModelId, str]) -> None:
        started = {item.model for item in plan if item.replicas or item.reason is not DecisionReason.MANUAL}
        names = [model_name(model) for model in self._config.models]
        models = [ServedModel(model=name, is_held=name in started, error=errors.get(name, "")) for name in names]
        targets = [ReplicaTarget(model=item.model, role=item.role, replicas=item.replicas) for item in plan]
        if self._epoch is None:
            return
        try:
            await self._register.publish(self._epoch, models, targets)
        except TandemError as error:
            logger.warning("publish_failed error=%s", error.message)


def _limits(config: ClusterConfig, targets: Sequence[ReplicaTarget]) -> list[PoolLimits]:
    """Every pool's bounds, and what the leader before wanted."""
    inherited = {(target.model, target.role): target.replicas for target in targets}
    limits = []
    for model in config.models:
        for role in Role:
            low, high = model.bounds(role)
            limits.append(
                PoolLimits(
                    model=model_name(model),
                    role=role,
                    min_replicas=low,
                    max_replicas=high,
                    initial_replicas=model.replicas(role),
                    inherited_replicas=inherited.get((model_name(model), role)),
                )
            )
    return limits
