"""Replicas as detached named Ray actors, and one node agent per Ray node.

Starts, stops and hears of them; must not decide how many. Ray's calls that block run in threads.
"""

import asyncio
import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autoscaler.observation import PoolKey
from autoscaler.pool import PoolReplica, ReplicaNames
from tandem.cluster_config import ClusterConfig
from tandem.config import EngineConfig, ReplicaConfig
from tandem.domain import ReplicaId, Role
from tandem.errors import ConfigError, Reason, UnavailableError
from tandem.model_memory import replica_memory_bytes
from tandem.supervisor import SupervisedState

logger = logging.getLogger(__name__)

_CONNECT_S = 30.0
_CALL_S = 20.0
_STOP_S = 15.0


class RayPool:
    """The pool of one cluster. `on_change` is called, on the loop, whenever a replica's state changed."""

    def __init__(
        self,
        actors: Mapping[Role, Any],
        agent: Any,
        config: ClusterConfig,
        redis_url: str,
        on_change: Callable[[], None],
    ) -> None:
        self._actors = actors
        self._agent = agent
        self._config = config
        self._redis_url = redis_url
        self._on_change = on_change
        self._names = ReplicaNames(config.models)
        self._replicas: dict[ReplicaId, PoolReplica] = {}
        self._listeners: dict[str, asyncio.Task[None]] = {}
        self._agents: dict[str, asyncio.Task[None]] = {}

    @property
    def replicas(self) -> Mapping[ReplicaId, PoolReplica]:
        """What is there, as last heard."""
        return self._replicas

    @property
    def names(self) -> ReplicaNames:
        """How replicas are called."""
        return self._names

    async def connect(self, address: str) -> None:
        """Joins the Ray cluster as a driver. Raises ConfigError where it does not answer."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                await _in_own_thread(lambda: connect_ray(address, self._config))
        except (ConnectionError, RuntimeError, TimeoutError, RayError, ValueError) as error:
            raise ConfigError(f"RAY_ADDRESS {address!r}: no Ray cluster answers there ({_first_line(error)})") from error

    async def refresh(self) -> None:
        """Node agents on new nodes, replicas that another leader started."""
        nodes, names = await asyncio.gather(asyncio.to_thread(ray.nodes), asyncio.to_thread(ray.util.list_named_actors))
        for node in nodes:
            if node["Alive"]:
                self._keep_agent(node["NodeID"])
        for name in names:
            key = self._names.try_parse(name)
            if key is not None and name not in self._replicas:
                self._adopt(ReplicaId(name), key, await asyncio.to_thread(ray.get_actor, name))

    async def add(self, key: PoolKey, replica_id: ReplicaId) -> None:
        """Asks Ray for one more actor with the model's resources: one bundle."""
        model = self._names.config(key)
        engine = EngineConfig(
            model=model.model,
            dtype=model.dtype,
            kv_cache_bytes=model.kv_cache_bytes,
            context_tokens=model.context_tokens,
            max_num_seqs=model.max_num_seqs,
            max_num_batched_tokens=model.max_num_batched_tokens,
            seed=secrets.randbelow(2**31),
            store_capacity_bytes=self._config.store_capacity_bytes,
            faults=model.faults,
        )
        config = ReplicaConfig(
            replica_id=replica_id,
            role=key.role,
            incarnation=0,
            served_model=key.model,
            engine=engine,
            host=self._config.host,
            cluster=self._config.cluster,
            redis_url=self._redis_url,
        )
        options = {
            "name": replica_id,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": model.cpus_per_replica,
            "num_gpus": model.gpus_per_replica,
            "memory": model.memory_bytes_per_replica or replica_memory_bytes(model),
            "scheduling_strategy": "SPREAD",
        }
        self._replicas[replica_id] = PoolReplica(replica_id=replica_id, key=key, state=SupervisedState.STARTING)
        try:
            actor = await asyncio.to_thread(lambda: self._actors[key.role].options(**options).remote(config.to_json()))
        except (RayError, ValueError) as error:
            del self._replicas[replica_id]
            raise UnavailableError(f"Ray does not start {replica_id}: {_first_line(error)}", reason=Reason.START_FAILED) from error
        self._adopt(replica_id, key, actor)

    async def remove(self, replica_id: ReplicaId) -> None:
        """Has the actor end its replica, then ends the actor."""
        listener = self._listeners.pop(replica_id, None)
        if listener is not None:
            listener.cancel()
        try:
            actor = await asyncio.to_thread(ray.get_actor, replica_id)
            try:
                async with asyncio.timeout(_STOP_S):
                    await actor.stop.remote()
            except (RayError, TimeoutError) as error:
                logger.warning("replica_not_stopped replica_id=%s error=%s", replica_id, _first_line(error))
            await asyncio.to_thread(ray.kill, actor)
        except (ValueError, RayError):  # Ray has no such actor any more
            logger.info("actor_gone replica_id=%s", replica_id)
        self._replicas.pop(replica_id, None)
        self._on_change()

    async def close(self) -> None:
        """Leaves Ray; replicas go on."""
        for task in (*self._listeners.values(), *self._agents.values()):
            task.cancel()
        await asyncio.to_thread(ray.shutdown)

    def _adopt(self, replica_id: ReplicaId, key: PoolKey, actor: Any) -> None:
        self._replicas[replica_id] = PoolReplica(replica_id=replica_id, key=key, state=SupervisedState.STARTING)
        self._listeners[replica_id] = asyncio.create_task(self._listen(replica_id, key, actor), name=f"listen {replica_id}")

    async def _listen(self, replica_id: ReplicaId, key: PoolKey, actor: Any) -> None:
        """Takes the actor's reports until it dies."""
        version = 0
        try:
            await actor.start.remote()
            while True:
                report = await actor.report.remote(version)
                version = report["version"]
                self._set(
                    replica_id,
                    key,
                    SupervisedState(report["state"]),
                    **{name: report[name] for name in ("address", "pid", "error", "incarnation")},
                )
        except RayError as error:
            logger.warning("actor_lost replica_id=%s error=%s", replica_id, _first_line(error))
            self._set(replica_id, key, SupervisedState.STOPPED, error=_first_line(error))

    def _set(self, replica_id: ReplicaId, key: PoolKey, state: SupervisedState, **values: Any) -> None:
        self._replicas[replica_id] = replace(PoolReplica(replica_id=replica_id, key=key, state=state), **values)
        logger.info("replica_changed replica_id=%s state=%s %s", replica_id, state, values.get("error", ""))
        self._on_change()

    def _keep_agent(self, node_id: str) -> None:
        task = self._agents.get(node_id)
        if task is None or task.done():
            self._agents[node_id] = asyncio.create_task(self._run_agent(node_id), name=f"agent {node_id[:12]}")

    async def _run_agent(self, node_id: str) -> None:
        """Has the node's agent up until it dies; `refresh`, which its death brings about, starts the next."""
        node = node_id[:12]
        options = {
            "name": f"agent-{node}",
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        arguments = (self._config.to_json(), node, self._config.host, self._redis_url)
        try:
            actor = await asyncio.to_thread(lambda: self._agent.options(**options).remote(*arguments))
            await actor.start.remote()
            logger.info("agent_runs node=%s", node)
            await actor.wait.remote()
        except (RayError, ValueError) as error:
            logger.warning("agent_lost node=%s error=%s", node, _first_line(error))
        finally:
            asyncio.get_running_loop().call_later(0.1, self._on_change)


async def _in_own_thread(work: Callable[[], None]) -> None:
    """Like `asyncio.to_thread`, but the process may end while the thread still waits: Ray tries for minutes to reach what is not there."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except Exception as failure:  # handed on to the caller
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name="connect to Ray", daemon=True).start()
    await done


def connect_ray(address: str, config: ClusterConfig) -> None:
    """Joins `address` in the cluster's namespace; blocks."""
    extra = {"_node_ip_address": config.host} if config.host.startswith("127.") and not config.ray_address else {}
    ray.init(
        address=address,
        namespace=f"tandem-{config.cluster}",
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
        **extra,
    )


def stop_all(config: ClusterConfig) -> int:
    """Ends every actor of the cluster's namespace; how many there were. Blocks; for clusters on a Ray that is not ours."""
    names = sorted(ray.util.list_named_actors(), key=lambda name: name.startswith("agent-"))  # replicas before their node's daemons
    for name in names:
        actor = ray.get_actor(name)
        try:
            ray.get(actor.stop.remote(), timeout=_STOP_S)
        except (RayError, AttributeError) as error:
            logger.warning("actor_not_stopped name=%s error=%s", name, _first_line(error))
        ray.kill(actor)
    return len(names)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
