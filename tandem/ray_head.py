"""The Ray head of a cluster that has no Ray of its own: a process apart, on loopback, without dashboard, client server and log monitor.

Prints `ray ready address=HOST:PORT`; ends, with all of Ray, on SIGTERM or at the end of stdin (its supervisor's death).
"""

import argparse
import contextlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.hang import LOOK_S, HangJudge, is_stopped
from tandem.ray_environment import set_ray_environment

OBJECT_STORE_BYTES = 100_000_000  # nothing of ours goes through it, and it shares /dev/shm with the KV blocks


def main() -> None:
    """Starts the head, then watches it."""
    parser = argparse.ArgumentParser(prog="python -m tandem.ray_head")
    parser.add_argument("--temp-dir", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--num-cpus", type=float, default=None)
    args = parser.parse_args()
    set_ray_environment(os.environ, args.host)
    # No public call starts a head without the dashboard's process of 80 MiB; Ray's own ray.cluster_utils uses these classes too.
    from ray._private import services
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class Head(Node):  # type: ignore[misc]
        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            self._webui_url = None

    start_process = services.start_ray_process

    def start_small(command: list[str], *arguments: Any, **options: Any) -> Any:
        return start_process([_small(part) for part in command], *arguments, **options)

    services.start_ray_process = start_small
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
    print(f"ray ready address={node.gcs_address}", flush=True)
    processes = [info.process for kind in node.all_processes.values() for info in kind]
    for process in processes:
        if process.stdin is not None:
            os.set_inheritable(process.stdin.fileno(), True)  # its end would be the process's
    # The same process without the 50 MiB of Ray: its children stay its children.
    os.execv(sys.executable, [sys.executable, "-m", "tandem.ray_head", "--watch", *(str(process.pid) for process in processes)])


def watch(pids: Sequence[int]) -> None:
    """Until SIGTERM, the end of stdin, or the death or stop of one of Ray's processes; then kills them all."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    poll = select.poll()
    for descriptor in (sys.stdin.fileno(), *map(os.pidfd_open, pids)):
        poll.register(descriptor, select.POLLIN)
    judges = {pid: HangJudge(silent_looks=1) for pid in pids}
    with contextlib.suppress(KeyboardInterrupt):
        while not poll.poll(1000 * LOOK_S):
            if any(judge.judge(is_stopped=is_stopped(pid), is_silent=False) for pid, judge in judges.items()):
                break
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _small(part: str) -> str:
    """Raylet ends without its agent of the dashboard, so that one is started without what it would show."""
    return f"{part} --minimal" if part.startswith("--dashboard_agent_command=") else part


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        watch([int(pid) for pid in sys.argv[2:]])
    else:
        main()
