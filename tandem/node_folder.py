"""Where one node of one cluster keeps its sockets, logs and blocks: the same paths for agent, actors and clean-up.

Two Ray nodes on one machine (a test) have two folders.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.endpoint import endpoint_folder

SHM = Path("/dev/shm")
# Set for what `tandem up` starts and for what outlives Ray's actors, inherited by all of it, and by nothing else. Clean-up looks for it.
MEMBER_OF = "TANDEM_MEMBER_OF"
ENDED = "ended"  # in the cluster's folder: it is being cleared away, and a node's agent is to start nothing any more
LOCAL_NODE = "local"  # the only node of a Ray that is the cluster's own: its daemons outlive a restart of Ray


def cluster_folder(cluster: str) -> Path:
    """Private files of a cluster on this machine: sockets, logs, Ray's session."""
    return endpoint_folder() / cluster


def ray_folder(cluster: str) -> Path:
    """Ray's session. Its sockets have long names, and the kernel takes 107 bytes: so it is in no deep folder."""
    return Path(f"/tmp/tandem-ray-{cluster}")


def shm_folder(cluster: str) -> Path:
    """The cluster's KV blocks on this machine."""
    return SHM / f"tandem-{cluster}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node's agent found or made: where its replicas keep blocks and ask for those of other nodes."""

    node: str
    host: str  # where its processes listen, and what others call them
    store_dir: str
    store_address: str
    is_store_tiered: bool = False  # it has blocks of other nodes, or of lower tiers, for the asking
    error: str = ""  # why no replica may run here


class NodeFolder:
    """The folder of one node."""

    def __init__(self, cluster: str, node: str) -> None:
        self.node = node
        self.path = cluster_folder(cluster) / node
        self.default_store_dir = shm_folder(cluster) / node
        self.zygote_socket = self.path / "zygote.sock"
        self.tether = self.path / "agent.lock"
        self._facts = self.path / "node.json"

    def make(self) -> None:
        """Makes it, for this user alone."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def is_ended(self) -> bool:
        """Whether the cluster is being cleared away on this machine, or has been."""
        return not self.path.exists() or (self.path.parent / ENDED).exists()

    def log(self, name: str) -> Path:
        """Where a process of this node logs."""
        return self.path / f"{name}.log"

    def write_facts(self, facts: NodeFacts) -> None:
        """Leaves them for the node's replicas, in one step."""
        temporary = self._facts.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(facts)))
        os.replace(temporary, self._facts)

    def try_read_facts(self) -> NodeFacts | None:
        """What the agent wrote; None before that."""
        try:
            return NodeFacts(**json.loads(self._facts.read_text()))
        except (OSError, ValueError, TypeError):
            return None
