"""The node agent: one detached Ray actor per node, without a CPU of its own, that keeps the node's zygote and store service alive.

Both are detached from it (Ray kills an actor's children) and outlive it for a while: its successor finds them by their files.
"""

import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

import ray

from tandem.cluster_config import VLLM, ClusterConfig, cluster_config_from_json
from tandem.daemon import Daemon, keep_alive
from tandem.engine.environment import has_cuda
from tandem.fingerprint import code_fingerprint
from tandem.launch import remove_folder
from tandem.membership import REGISTER_URL
from tandem.network import advertised_host, is_loopback
from tandem.node_folder import NodeFacts, NodeFolder
from tandem.polling import poll_until
from tandem.replica_actor import REPORT_S
from tandem.tether import GRACE_S, hold
from tandem.zygote_client import zygote_command

logger = logging.getLogger(__name__)

_STORE_START_S = 60.0  # it starts beside the zygote, which imports vLLM
_POLL_S = 0.05


@ray.remote(num_cpus=0, max_restarts=0)
class NodeAgent:
    """Keeps the daemons of node `node` alive."""

    def __init__(self, cluster_json: str, node: str, redis_url: str, fingerprint: str) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._config = cluster_config_from_json(cluster_json)
        self._folder = NodeFolder(self._config.cluster, node)
        self._host = _host(self._config)
        self._redis_url = redis_url
        self._fingerprint = fingerprint  # of the autoscaler's code
        self._tether: int | None = None
        self._daemons: list[Daemon] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._started: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes the node over and returns once its store service answers; the zygote may still be importing."""
        if self._started is None or (self._started.done() and self._started.exception() is not None):
            self._started = asyncio.create_task(self._start(), name="start")
        await asyncio.shield(self._started)

    async def stop(self) -> None:
        """Ends the daemons and removes the node's blocks and folder; the actor is of no use afterwards."""
        for keeper in self._keepers:
            keeper.cancel()
        for daemon in self._daemons:
            await daemon.stop()
        for folder in (self._folder.default_store_dir, self._folder.path):
            remove_folder(folder)
            with contextlib.suppress(OSError):  # another node's is in it
                folder.parent.rmdir()

    async def wait(self) -> None:
        """Returns after a while: a sign of this actor's life. The caller learns of its death by the call's failure."""
        await asyncio.sleep(REPORT_S)

    async def _start(self) -> None:
        """May be called again where it failed: what runs stays."""
        self._folder.make()
        if self._fingerprint != code_fingerprint():
            error = f"node {self._folder.node} ({self._host}) has another version of Tandem: install the same on all nodes of Ray"
            logger.error("other_code node=%s ours=%s theirs=%s", self._folder.node, code_fingerprint(), self._fingerprint)
            self._folder.write_facts(NodeFacts(node=self._folder.node, host=self._host, store_dir="", store_address="", error=error))
            return
        address_file = self._folder.path / "store.address"
        async with asyncio.timeout(_STORE_START_S):
            if self._tether is None:
                self._tether = await poll_until(lambda: hold(self._folder.tether), _POLL_S)  # a predecessor may just be dying
            store_dir = Path(self._config.store_dir) / self._folder.node if self._config.store_dir else self._folder.default_store_dir
            if not self._keepers:
                if not has_cuda() and any(model.engine == VLLM for model in self._config.models):
                    self._keep(self._zygote())
                self._keep(self._store(store_dir, address_file))
            await poll_until(address_file.exists, _POLL_S)
        address = address_file.read_text().strip()
        config = self._config
        facts = NodeFacts(
            node=self._folder.node,
            host=self._host,
            store_dir=str(store_dir),
            store_address=address,
            is_store_tiered=bool(config.ray_address or config.kv_disk or config.kv_redis_url),
        )
        self._folder.write_facts(facts)

    def _zygote(self) -> Daemon:
        command = zygote_command(self._folder.zygote_socket, self._folder.tether, grace_s=GRACE_S)
        pid_file, log = self._folder.path / "zygote.pid", self._folder.log("zygote")
        return Daemon(name="zygote", cluster=self._config.cluster, command=command, pid_file=pid_file, log=log)

    def _store(self, store_dir: Path, address_file: Path) -> Daemon:
        command = [
            *(sys.executable, "-m", "kv_transfer"),
            f"--store-dir={store_dir}",
            f"--capacity-bytes={self._config.store_capacity_bytes}",
            f"--host={self._host}",
            f"--node={self._folder.node}",
            f"--address-file={address_file}",
            f"--tether={self._folder.tether}",
            f"--cluster={self._config.cluster}",
            f"--tenant-bytes={self._config.kv_tenant_bytes}",
            *self._tiers(),
        ]
        return Daemon(
            name="store",
            cluster=self._config.cluster,
            command=command,
            pid_file=self._folder.path / "store.pid",
            log=self._folder.log("store"),
            environment={REGISTER_URL: self._redis_url},
        )

    def _tiers(self) -> list[str]:
        """What there is beyond the arena: other nodes, a disk, a Redis for overflow."""
        config = self._config
        folder = Path(config.kv_disk) / self._folder.node if config.ray_address else config.kv_disk  # nodes of a test share a disk
        return [
            *(["--share"] if config.ray_address else []),
            *([f"--disk-dir={folder}", f"--disk-capacity-bytes={config.kv_disk_bytes}"] if config.kv_disk else []),
            *([f"--kv-redis-url={config.kv_redis_url}"] if config.kv_redis_url else []),
        ]

    def _keep(self, daemon: Daemon) -> None:
        self._daemons.append(daemon)
        self._keepers.append(asyncio.create_task(self._keep_alive(daemon), name=f"keep {daemon.name}"))

    async def _keep_alive(self, daemon: Daemon) -> None:
        """Until the cluster is cleared away, of which Ray may not have told this actor: then it is of no use."""
        await keep_alive(daemon, lambda: self._folder.is_ended)
        logger.info("cluster_ended name=%s", daemon.name)
        os._exit(0)  # Ray heeds no signal while nobody calls


def _host(config: ClusterConfig) -> str:
    """Where this node's processes listen: on a Ray of many machines each has its own address."""
    if config.ray_address and not is_loopback(config.host):
        address: str = ray.util.get_node_ip_address()
        return address
    return advertised_host(config.host)
