"""Replicas as detached named Ray actors, and one node agent per Ray node.

Starts, stops and hears of them; must not decide how many. Ray's calls that block run in threads.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autoscaler.observation import PoolKey
from autoscaler.pool import PoolReplica, ReplicaNames
from autoscaler.ray_client import ask_ray, first_line
from tandem.cluster_config import ClusterConfig
from tandem.config import EngineConfig, ReplicaConfig
from tandem.domain import ReplicaId, Role
from tandem.errors import Reason, TandemError, UnavailableError
from tandem.fingerprint import code_fingerprint
from tandem.membership import MemberKind, Register
from tandem.model_memory import replica_memory_bytes
from tandem.node_folder import LOCAL_NODE
from tandem.replica_actor import REPORT_S
from tandem.supervisor import SupervisedState

logger = logging.getLogger(__name__)

_STOP_S = 15.0
_PLACE_S = 90.0  # for Ray to find room for an actor, and for its node's agent to be there
_UNHEARD_S = 10.0  # for a connection to an actor to come back
_SILENT_S = 2 * REPORT_S  # an actor that says nothing for longer hangs: it answers each REPORT_S
_AGENT_START_S = 120.0  # its store service has 60 s
_PAUSE_S = 0.5


class RayPool:
    """The pool of one cluster. `on_change` is called, on the loop, whenever a replica's state changed."""

    def __init__(
        self,
        actors: Mapping[Role, Any],
        agent: Any,
        config: ClusterConfig,
        redis_url: str,
        on_change: Callable[[], None],
        register: Register,
    ) -> None:
        self._actors = actors
        self._agent = agent
        self._config = config
        self._redis_url = redis_url
        self._on_change = on_change
        self._register = register
        self._orphans: set[ReplicaId] | None = None  # not looked for yet
        self._names = ReplicaNames(config.models)
        self._replicas: dict[ReplicaId, PoolReplica] = {}
        self._handles: dict[ReplicaId, Any] = {}  # by handle an actor is itself; its name may be a later one's
        self._listeners: dict[ReplicaId, asyncio.Task[None]] = {}
        self._agents: dict[str, asyncio.Task[None]] = {}
        self._unheard_agents: dict[str, float] = {}  # by node, since when its agent cannot be reached

    @property
    def replicas(self) -> Mapping[ReplicaId, PoolReplica]:
        """What is there, as last heard."""
        return self._replicas

    @property
    def orphans(self) -> Collection[ReplicaId]:
        """Replicas whose actor is lost."""
        return self._orphans or ()

    async def refresh(self) -> None:
        """Node agents on new nodes, replicas that another leader started. Raises UnavailableError where Ray does not answer."""
        try:
            nodes, names = await asyncio.gather(ask_ray(ray.nodes), ask_ray(ray.util.list_named_actors))
            for node in nodes:
                if node["Alive"]:
                    self._keep_agent(node["NodeID"])
            for name in names:
                key = self._names.try_parse(name)
                if key is not None and name not in self._replicas:
                    self._adopt(ReplicaId(name), key, await ask_ray(lambda name=name: ray.get_actor(name)))  # type: ignore[misc]
            if self._orphans is None:
                self._orphans = await self._serving() - self._replicas.keys()
        except (RayError, ValueError) as error:  # ValueError: an actor has just gone
            raise UnavailableError(f"Ray does not say what there is: {first_line(error)}", reason=Reason.START_FAILED) from error

    async def _serving(self) -> set[ReplicaId]:
        """What is in the register: of a Ray head that died the replicas live on."""
        try:
            members = (await self._register.snapshot()).members
        except TandemError as error:
            logger.warning("orphans_not_looked_for error=%s", error.message)
            return set()
        return {ReplicaId(member.member_id) for member in members if member.kind is MemberKind.REPLICA}

    async def add(self, key: PoolKey, replica_id: ReplicaId) -> None:
        """Asks Ray for one more actor with the model's resources: one bundle."""
        model = self._names.config(key)
        engine = EngineConfig(
            engine=model.engine,
            step_profile=model.profile_of(replica_id),
            model=model.model,
            dtype=model.dtype,
            kv_cache_bytes=model.kv_cache_bytes,
            context_tokens=model.context_tokens,
            max_num_seqs=model.max_num_seqs,
            max_num_batched_tokens=model.max_num_batched_tokens,
            seed=secrets.randbelow(2**31),
            store_capacity_bytes=self._config.store_capacity_bytes,
            kv_store_bytes=model.kv_store_bytes,
            faults=model.faults,
        )
        config = ReplicaConfig(
            replica_id=replica_id,
            role=key.role,
            incarnation=0,
            served_model=key.model,
            engine=engine,
            node=LOCAL_NODE if not self._config.ray_address else "",
            cluster=self._config.cluster,
            redis_url=self._redis_url,
        )
        options = {
            "name": replica_id,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": model.declared_cpus,
            "num_gpus": model.gpus_per_replica,
            "memory": model.memory_bytes_per_replica or replica_memory_bytes(model),
            "scheduling_strategy": "SPREAD",
        }
        self._replicas[replica_id] = PoolReplica(replica_id=replica_id, key=key, state=SupervisedState.STARTING)
        try:
            actor = await ask_ray(lambda: self._actors[key.role].options(**options).remote(config.to_json()))
        except (RayError, ValueError, UnavailableError) as error:
            del self._replicas[replica_id]
            raise UnavailableError(f"Ray does not start {replica_id}: {first_line(error)}", reason=Reason.START_FAILED) from error
        self._adopt(replica_id, key, actor)

    async def remove(self, replica_id: ReplicaId) -> None:
        """Has the actor end its replica, then ends the actor. The replica of an actor that is lost already waits for the next one."""
        listener, actor, replica = (
            self._listeners.pop(replica_id, None),
            self._handles.pop(replica_id, None),
            self._replicas.get(replica_id),
        )
        if listener is not None:
            listener.cancel()
        if replica is not None and replica.state is SupervisedState.STOPPED and self._orphans is not None:
            self._orphans.add(replica_id)
        if actor is not None:
            if replica is None or replica.state is not SupervisedState.STOPPED:
                try:
                    async with asyncio.timeout(_STOP_S):
                        await actor.stop.remote()
                except (RayError, TimeoutError) as error:
                    logger.info("replica_not_asked replica_id=%s error=%s", replica_id, first_line(error))
            await _kill(actor, replica_id)
        self._replicas.pop(replica_id, None)
        self._on_change()

    def close(self) -> None:
        """Listens no more; replicas go on."""
        for task in (*self._listeners.values(), *self._agents.values()):
            task.cancel()

    def _adopt(self, replica_id: ReplicaId, key: PoolKey, actor: Any) -> None:
        if self._orphans is not None:
            self._orphans.discard(replica_id)
        self._replicas[replica_id] = PoolReplica(replica_id=replica_id, key=key, state=SupervisedState.STARTING)
        self._handles[replica_id] = actor
        self._listeners[replica_id] = asyncio.create_task(self._listen(replica_id, key, actor), name=f"listen {replica_id}")

    async def _listen(self, replica_id: ReplicaId, key: PoolKey, actor: Any) -> None:
        """Takes the actor's reports until it dies. An actor that never had its replica up has failed."""
        version, end = 0, SupervisedState.FAILED
        try:
            async with asyncio.timeout(_PLACE_S):
                await actor.start.remote()
            while True:
                report = await _heard(actor, version)
                if report["version"] == version:
                    continue
                version, state = report["version"], SupervisedState(report["state"])
                if state is SupervisedState.RUNNING:
                    end = SupervisedState.STOPPED
                self._set(replica_id, key, state, **{name: report[name] for name in ("address", "pid", "error", "incarnation")})
        except TimeoutError:
            needs = self._names.config(key)
            room = f"{needs.declared_cpus:g} CPUs, {needs.gpus_per_replica:g} GPUs"
            error = f"Ray has not found room for {replica_id} in {_PLACE_S:g} s: {room}"
            logger.warning("actor_not_placed replica_id=%s", replica_id)
            self._set(replica_id, key, SupervisedState.FAILED, error=error)
        except (RayError, _SilentActorError) as failure:
            logger.warning("actor_lost replica_id=%s error=%s", replica_id, first_line(failure))
            self._set(replica_id, key, end, error=first_line(failure))

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
        node = node_id[:12] if self._config.ray_address else LOCAL_NODE
        options = {
            "name": f"agent-{node}",
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        arguments = (self._config.to_json(), node, self._redis_url, code_fingerprint())
        pause_s = _PAUSE_S
        try:
            actor = await ask_ray(lambda: self._agent.options(**options).remote(*arguments))
            try:
                async with asyncio.timeout(_AGENT_START_S):
                    await _start_agent(actor)
                self._unheard_agents.pop(node_id, None)
                logger.info("agent_runs node=%s", node)
                pause_s = 0.0
                while True:
                    async with asyncio.timeout(_SILENT_S):
                        await actor.wait.remote()
            except TimeoutError as error:
                logger.warning("agent_silent node=%s error=%s", node, first_line(error))
                await _kill(actor, node)
            except ActorUnavailableError:  # one that was stopped before this leader had spoken to it says no more than that
                now_s = asyncio.get_running_loop().time()
                if now_s - self._unheard_agents.setdefault(node_id, now_s) > _SILENT_S:
                    logger.warning("agent_silent node=%s error=it cannot be reached", node)
                    del self._unheard_agents[node_id]
                    await _kill(actor, node)
                raise
        except (RayError, ValueError, UnavailableError) as error:
            logger.warning("agent_lost node=%s error=%s", node, first_line(error))
            await asyncio.sleep(pause_s)
        self._on_change()


async def _start_agent(actor: Any) -> None:
    """Asks again where it takes long, which does no harm. Raises TimeoutError where the agent hangs meanwhile."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SILENT_S):
                await actor.start.remote()
            return
        async with asyncio.timeout(_SILENT_S):
            await actor.wait.remote()


class _SilentActorError(Exception):
    """An actor lives and does not answer."""


async def _kill(actor: Any, name: str) -> None:
    try:
        await ask_ray(lambda: ray.kill(actor))
    except (RayError, ValueError, UnavailableError) as error:
        logger.info("actor_gone name=%s error=%s", name, first_line(error))


async def _heard(actor: Any, version: int) -> dict[str, Any]:
    """The actor's next report. A broken connection to it may come back; raises RayError where it does not, or the actor is dead.

    Raises _SilentActorError where it hangs.
    """
    deadline_s: float | None = None
    while True:
        try:
            report: dict[str, Any]
            async with asyncio.timeout(_SILENT_S):
                report = await actor.report.remote(version)
            return report
        except TimeoutError as error:
            raise _SilentActorError(f"it has said nothing for {_SILENT_S:g} s") from error
        except ActorUnavailableError:
            now_s = asyncio.get_running_loop().time()
            deadline_s = deadline_s or now_s + _UNHEARD_S
            if now_s > deadline_s:
                raise
            await asyncio.sleep(_PAUSE_S)
