"""The zygote (CPU only): imports vLLM once and forks replicas, which are ready in about a second instead of eighteen.

Single-threaded for as long as it lives: no event loop, no gRPC, no torch operation before a fork. It dies without taking replicas along.

A supervisor connects to the Unix socket once per replica and sends one line of JSON (`ReplicaConfig`). The connection is the replica's
lifeline (`lifeline.py`). Lines come back: `pid N`, `replica ready ...` or `replica failed ...`, at last `exit STATUS`.
`unable WHY` says that it can fork no more: it ends then, and whoever keeps it starts another.

It listens once it has imported everything, so a connection that succeeds says that it is ready. It ends when nobody holds its tether.
"""

import argparse
import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import traceback
from pathlib import Path

from tandem.config import ReplicaConfig, replica_config_from_json
from tandem.heap import trim_heap
from tandem.parenthood import REPLICA_NAME, set_process_name
from tandem.tether import GRACE_S, POLL_S, Tether

_MAX_REQUEST_BYTES = 1 << 16


def main() -> None:
    """Imports, listens, forks until SIGTERM or until its tether is cut (the supervisor's death)."""
    parser = argparse.ArgumentParser(prog="python -m tandem.zygote")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--tether", type=Path, required=True)
    parser.add_argument("--tether-grace-s", type=float, default=GRACE_S)
    args = parser.parse_args()
    tether = Tether(args.tether, grace_s=args.tether_grace_s)
    _import_all()
    # What is imported stays for ever: out of the collector's sight its pages stay shared with every replica.
    trim_heap()
    gc.freeze()
    args.socket.unlink(missing_ok=True)  # of a zygote that was killed
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(args.socket))
        listener.listen(64)
        Zygote(listener, tether).run()
    args.socket.unlink(missing_ok=True)


def _import_all() -> None:
    """Everything a replica needs. Imported here and not above, so that a bad command line is told at once."""
    import kv_transfer.connector  # noqa: F401
    import tandem.redis_register  # 0.15 s of a replica's loop where it is imported after the fork
    import tandem.replica  # noqa: F401
    from tandem.engine.preload import register_kernels

    register_kernels()


class Zygote:
    """The loop: new connections, ended children, the tether."""

    def __init__(self, listener: socket.socket, tether: Tether) -> None:
        self._listener = listener
        self._tether = tether
        self._selector = selectors.DefaultSelector()
        self._lifelines: dict[int, socket.socket] = {}
        self._is_stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        """Serves until told to stop."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        while not self._is_stopping and not self._tether.is_cut():
            for key, _ in self._selector.select(POLL_S):
                if key.fileobj is self._listener:
                    self._fork_for(self._listener.accept()[0])
                else:
                    os.read(self._wake_read, 4096)
            self._reap()

    def _stop(self, *_: object) -> None:
        self._is_stopping = True

    def _reap(self) -> None:
        while self._lifelines:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            lifeline = self._lifelines.pop(pid, None)
            if lifeline is not None:
                _send_line(lifeline, f"exit {os.waitstatus_to_exitcode(status)}")
                lifeline.close()

    def _fork_for(self, connection: socket.socket) -> None:
        connection.settimeout(5.0)
        try:
            config = replica_config_from_json(_read_line(connection))
        except (OSError, ValueError, TypeError, KeyError) as error:
            _send_line(connection, f"replica failed bad request to the zygote: {error!r}")
            connection.close()
            return
        if len(os.listdir("/proc/self/task")) != 1:
            _send_line(connection, "unable it has more than one thread")
            connection.close()
            self._is_stopping = True
            return
        try:
            pid = os.fork()
        except OSError as error:
            _send_line(connection, f"replica failed the zygote cannot fork: {error}")
            connection.close()
            return
        if pid == 0:
            self._become_replica(config, connection)
        self._lifelines[pid] = connection

    def _become_replica(self, config: ReplicaConfig, connection: socket.socket) -> None:
        """The child: drops what is the zygote's, runs the replica, never returns."""
        status = 1
        try:
            _send_line(connection, f"pid {os.getpid()}")  # from here, so that it comes before all else that the replica says
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            self._selector.close()
            self._listener.close()
            for lifeline in self._lifelines.values():
                lifeline.close()
            os.setsid()
            set_process_name(REPLICA_NAME)
            if config.log_path:
                log = os.open(config.log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
                os.dup2(log, 1)
                os.dup2(log, 2)
            connection.settimeout(None)
            from tandem.replica import main_with_errors

            status = main_with_errors(config, connection.fileno())
        except BaseException:  # the root of this process; os._exit would swallow it
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):  # nobody may read them any more
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)


def _read_line(connection: socket.socket) -> str:
    received = b""
    while not received.endswith(b"\n"):
        part = connection.recv(_MAX_REQUEST_BYTES)
        received += part
        if not part or len(received) > _MAX_REQUEST_BYTES:
            raise ValueError("no line of JSON came")
    return received.decode()


def _send_line(connection: socket.socket, line: str) -> None:
    try:
        connection.sendall(f"{line}\n".encode())
    except OSError:
        return  # the supervisor has gone; the replica notices by itself


if __name__ == "__main__":
    main()
