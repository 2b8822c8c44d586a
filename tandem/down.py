"""`tandem down`: stops a cluster of this user on this machine, and clears away what a killed `tandem up` left."""

import contextlib
import os
import signal
import time
from pathlib import Path

from tandem.cleanup import clean_cluster, processes_of
from tandem.endpoint import known_clusters, read_endpoint_file
from tandem.errors import ConfigError, NotFoundError, Reason

_STOP_S = 30.0
_POLL_S = 0.1


def choose_clusters(cluster: str | None, *, is_all: bool) -> list[str]:
    """The clusters meant. Raises NotFoundError where there is none, ConfigError where it is not clear which."""
    known = known_clusters()
    if cluster is not None:
        if cluster not in known:
            raise NotFoundError(f"no cluster {cluster!r} here; there are: {', '.join(known) or 'none'}", reason=Reason.CONFIG)
        return [cluster]
    if not known:
        raise NotFoundError("no cluster of this user on this machine", reason=Reason.CONFIG)
    if len(known) > 1 and not is_all:
        raise ConfigError(f"several clusters: name one with --cluster, or say --all: {', '.join(known)}")
    return known


def stop_cluster(cluster: str) -> None:
    """Ends its `tandem up` as Ctrl-C does, then whatever is left."""
    pid = _pid_of_up(cluster)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            _wait_gone(pid)
    deadline_s = time.monotonic() + _STOP_S
    while any(process.kind == "guard" for process in processes_of(cluster)) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)  # it is cleaning up
    clean_cluster(cluster)


def _pid_of_up(cluster: str) -> int | None:
    """The pid in the endpoint file, where it is still a `tandem` process of this user."""
    pid = (read_endpoint_file(cluster) or {}).get("pid")
    if not isinstance(pid, int) or pid <= 1:
        return None
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"tandem" in command and Path(f"/proc/{pid}").stat().st_uid == os.getuid():
            return pid
    return None


def _wait_gone(pid: int) -> None:
    deadline_s = time.monotonic() + _STOP_S
    while time.monotonic() < deadline_s:
        os.kill(pid, 0)
        time.sleep(_POLL_S)
