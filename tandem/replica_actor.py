"""What the actors of both roles do: complete the replica's settings with their node's, supervise it, tell when it changes.

Must not import Ray: the actor modules do.
"""

import asyncio
import logging
import sys
from dataclasses import replace

from tandem.adoption import try_adopt
from tandem.cluster_config import VLLM
from tandem.config import PREFETCH_WAIT_S, ReplicaConfig, replica_config_from_json
from tandem.engine.environment import has_cuda
from tandem.errors import ConfigError
from tandem.launch import spawn_replica
from tandem.node_folder import NodeFacts, NodeFolder
from tandem.polling import poll_until
from tandem.supervisor import ReplicaSupervisor, SupervisorReport
from tandem.zygote_client import ZygoteClient

REPORT_S = 10.0
_FACTS_WAIT_S = 60.0
_POLL_S = 0.05


class ReplicaActor:
    """Supervises one replica. Every method may be called again, by the next leader too."""

    def __init__(self, config_json: str, *, ray_node: str) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._config = replica_config_from_json(config_json)
        self._folder = NodeFolder(self._config.cluster, self._config.node or ray_node)
        self._supervisor: ReplicaSupervisor | None = None
        self._started: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to supervise, once. Returns when the replica has been asked for."""
        if self._started is None:
            self._started = asyncio.create_task(self._start(), name="start")
        await asyncio.shield(self._started)

    async def report(self, version: int) -> dict[str, object]:
        """The replica's report once it is newer than `version`; the same after REPORT_S: a sign of the actor's life."""
        supervisor = await poll_until(lambda: self._supervisor, _POLL_S)
        report: SupervisorReport
        try:
            async with asyncio.timeout(REPORT_S):
                report = await supervisor.changed(version)
        except TimeoutError:
            report = supervisor.report
        return report.to_dict()

    async def stop(self) -> None:
        """Ends the replica at once; the actor is of no use afterwards. Without this it outlives the actor for a while."""
        if self._supervisor is not None:
            await self._supervisor.stop()

    async def _start(self) -> None:
        config = _complete(self._config, self._folder, await _facts(self._folder))
        is_forked = config.engine.engine == VLLM and not has_cuda()
        start = ZygoteClient(self._folder.zygote_socket).start_replica if is_forked else spawn_replica
        self._supervisor = ReplicaSupervisor(config, start, adopt=try_adopt)
        self._supervisor.begin()


def _complete(config: ReplicaConfig, folder: NodeFolder, facts: NodeFacts) -> ReplicaConfig:
    return replace(
        config,
        node=facts.node,
        host=facts.host,
        runtime_dir=str(folder.path),
        log_path=str(folder.log(config.replica_id)),
        store_address=facts.store_address,
        prefetch_wait_s=PREFETCH_WAIT_S if facts.is_store_tiered else 0.0,
        engine=replace(config.engine, store_dir=facts.store_dir),
    )


async def _facts(folder: NodeFolder) -> NodeFacts:
    """What the node's agent wrote; it may still be starting. Raises TimeoutError or ConfigError, which fail the actor."""
    async with asyncio.timeout(_FACTS_WAIT_S):
        facts = await poll_until(folder.try_read_facts, _POLL_S)
    if facts.error:
        raise ConfigError(facts.error)
    return facts
