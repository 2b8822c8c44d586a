"""A Ray cluster of two nodes on this machine, of Ray's own making: prints its address, ends with its stdin.

In a process of its own, so that no test imports Ray.
"""

import os
import sys

from tandem.ray_environment import set_ray_environment
from tandem.ray_head import OBJECT_STORE_BYTES


def main() -> None:
    set_ray_environment(os.environ, "127.0.0.1")
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 2, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    second = cluster.add_node(**settings)
    print(f"nodes ready address={cluster.address}", flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(second, allow_graceful=False)
            print("nodes removed", flush=True)
        elif line.strip() == "add":
            second = cluster.add_node(**settings)
            print("nodes added", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
