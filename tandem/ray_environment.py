"""The environment of every process that imports Ray, to be set before it does. Must not import Ray."""

import os

from tandem.network import is_loopback


def set_ray_environment(environment: "os._Environ[str] | dict[str, str]", host: str) -> None:
    """What every process of Ray needs before it imports ray. On loopback Ray listens nowhere else (reference: platform, section 0)."""
    if is_loopback(host):
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    environment["SPT_NOENV"] = "1"  # Ray's processes rename themselves, and their environment must stay: by it they are found
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment.setdefault("RAY_num_workers_soft_limit", "1")  # of idle workers, 45 MiB each
