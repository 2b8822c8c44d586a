"""`tandem down`: stops a cluster of this user on this machine, and clears away what a killed `tandem up` left."""

import contextlib
import os
import time

import psutil

from tandem.cleanup import clean_cluster, processes_of
from tandem.endpoint import known_clusters, read_endpoint_file
from tandem.errors import ConfigError, NotFoundError, Reason

_STOP_S = 30.0
_POLL_S = 0.1
_SAME_START_S = 30.0  # a correction of the clock moves the start time of what runs; no pid comes round again so soon


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
    process = try_up_process(cluster)
    if process is not None:
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile, or ends too slowly
            process.terminate()
            process.wait(_STOP_S)
    deadline_s = time.monotonic() + _STOP_S
    while any(process.kind == "guard" for process in processes_of(cluster)) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)  # it is cleaning up
    clean_cluster(cluster)


def try_up_process(cluster: str) -> psutil.Process | None:
    """The process in the endpoint file, where it still runs as this user; started then, where the file says when, else some `tandem`."""
    endpoints = read_endpoint_file(cluster) or {}
    pid, started = endpoints.get("pid"), endpoints.get("started")
    if not isinstance(pid, int) or pid <= 1:
        return None
    try:
        process = psutil.Process(pid)
        if process.uids().real != os.getuid():
            return None
        if isinstance(started, int | float):
            is_it = abs(process.create_time() - started) < _SAME_START_S
        else:
            is_it = any("tandem" in part for part in process.cmdline())
    except psutil.Error:
        return None
    return process if is_it else None
