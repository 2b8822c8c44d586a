"""Mooncake's master and the client that owns its memory, in a network of their own. Standard library and mooncake only.

Run by a Mooncake interpreter; see `mooncake_peer`. Ends both when stdin ends.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tandem.bench.kv.private_network import enter_private_network

_PR_SET_PDEATHSIG = 1
_START_S = 20.0
_LEASE_MS = 5000  # a get must find what was put before it (reference: stores, section 3)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _start(program: Path, port: int, *arguments: str) -> "subprocess.Popen[bytes]":
    """Returns once it listens."""
    environment = {**os.environ, "MC_STORE_MEMCPY": "1"}
    if not os.access(program, os.X_OK):
        program.chmod(program.stat().st_mode | 0o111)  # the wheel ships it without
    process = subprocess.Popen([str(program), *arguments], stdin=subprocess.DEVNULL, stdout=2, env=environment, preexec_fn=_die_with_parent)
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            time.sleep(0.05)
        else:
            return process
    process.kill()
    raise RuntimeError(f"{program.name} did not start (exit status {process.wait()})")


def main() -> None:
    """Reads one line (segment_bytes), answers with the address, and waits for the end of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    segment_bytes = json.loads(sys.stdin.readline())["segment_bytes"]
    is_private = enter_private_network()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        import mooncake

        folder = Path(mooncake.__path__[0])
        master_port, metrics_port, client_port = _free_ports(3)
        master = f"127.0.0.1:{master_port}"
        processes.append(
            _start(
                folder / "mooncake_master",
                master_port,
                *("-rpc_address", "127.0.0.1", "-rpc_port", str(master_port)),
                *("-metrics_host", "127.0.0.1", "-metrics_port", str(metrics_port), "-enable_metric_reporting=false"),
                *("-default_kv_lease_ttl", str(_LEASE_MS), "-logtostderr"),
            )
        )
        processes.append(
            _start(
                folder / "mooncake_client",
                client_port,
                *("-host", "127.0.0.1", "-port", str(client_port), "-global_segment_size", str(segment_bytes)),
                *("-master_server_address", master, "-metadata_server", "P2PHANDSHAKE", "-protocol", "tcp", "-logtostderr"),
            )
        )
        answer = {"ready": True, "address": f"127.0.0.1:{client_port}", "pid": os.getpid(), "is_private": is_private}
    except Exception as error:  # a root: what it was is for the bench to say
        answer = {"error": f"{type(error).__name__}: {error}", "is_missing": isinstance(error, ModuleNotFoundError)}
    print(json.dumps(answer), flush=True)
    sys.stdin.read()
    for process in reversed(processes):
        process.kill()
        process.wait()
