"""The Ray head of a cluster that has no Ray of its own: a process apart, on loopback, without dashboard, client server and log monitor.

Prints `ray ready address=HOST:PORT`; ends, with all of Ray, on SIGTERM or at the end of stdin (its supervisor's death).
"""

import argparse
import contextlib
import os
import select
import signal
import sys
from pathlib import Path

_POLL_S = 0.5  # how late the death of one of Ray's processes is noticed
OBJECT_STORE_BYTES = 100_000_000  # nothing of ours goes through it, and it shares /dev/shm with the KV blocks


def set_ray_environment(environment: "os._Environ[str] | dict[str, str]", host: str) -> None:
    """What every process of Ray needs before it imports ray. On loopback Ray listens nowhere else (reference: platform, section 0)."""
    if host.startswith("127.") or host == "localhost":
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment.setdefault("RAY_num_workers_soft_limit", "1")  # of idle workers, 45 MiB each


def main() -> None:
    """Starts the head and stays until told."""
    parser = argparse.ArgumentParser(prog="python -m tandem.ray_head")
    parser.add_argument("--temp-dir", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--num-cpus", type=float, default=None)
    args = parser.parse_args()
    set_ray_environment(os.environ, args.host)
    # No public call starts a head without the dashboard's 80 MiB process; Ray's own ray.cluster_utils uses these classes too.
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class Head(Node):  # type: ignore[misc]
        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            self._webui_url = None

    parameters = RayParams(
        node_ip_address=args.host,
        num_cpus=args.num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        temp_dir=str(args.temp_dir),
        redis_port=0,
        gcs_server_port=0,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
    )
    # With spawn_reaper the kernel kills Ray's processes when this one dies.
    node = Head(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"ray ready address={node.gcs_address}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while not select.select([sys.stdin], [], [], _POLL_S)[0] and not node.dead_processes():
            pass
    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


if __name__ == "__main__":
    main()
