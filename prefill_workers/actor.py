"""The Ray actor that supervises one prefill replica. Light: it imports neither vLLM nor gRPC.

Ray places it and its resources; the replica is the node's zygote's child and outlives the actor a while. Only reconcile replaces actors.
"""

import ray

from tandem.replica_actor import ReplicaActor


@ray.remote(num_cpus=0, max_restarts=0)
class PrefillActor(ReplicaActor):
    """One prefill replica; its methods are `ReplicaActor`'s."""

    def __init__(self, config_json: str) -> None:
        super().__init__(config_json, ray_node=ray.get_runtime_context().get_node_id()[:12])
