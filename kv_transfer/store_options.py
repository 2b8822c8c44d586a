"""Settings of a store service's process, and its command line."""

import argparse
import os
from dataclasses import dataclass

from tandem.errors import ConfigError
from tandem.membership import REGISTER_URL

LOOPBACK = "127.0.0.1"
_MIN_CAPACITY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """One store service. `node` is the name under which its node's replicas are known."""

    store_dir: str
    capacity_bytes: int
    host: str = LOOPBACK
    port: int = 0  # any free one
    metrics_port: int = 0
    node: str = "local"
    lifeline_fd: int | None = None
    tether: str = ""  # a lock file; the service ends when nobody has held it for a while
    address_file: str = ""  # where its address is left; a service that finds its predecessor's takes the same port
    cluster: str = ""
    redis_url: str = ""  # the register it takes a lease in; empty: none
    is_shared: bool = False  # with other nodes' stores, by a directory in that Redis
    tenant_bytes: int = 0  # what one tenant's blocks may take of the arena; 0: no limit
    disk_dir: str = ""  # of the tier that outlives everything; empty: none
    disk_capacity_bytes: int = 16 << 30
    kv_redis_url: str = ""  # of the overflow tier, a server of its own; empty: none

    def validate(self) -> None:
        """Raises ConfigError naming the option."""
        if not self.store_dir:
            raise ConfigError("--store-dir must name a folder")
        if self.capacity_bytes < _MIN_CAPACITY_BYTES:
            raise ConfigError(f"--capacity-bytes must be at least {_MIN_CAPACITY_BYTES}, got {self.capacity_bytes}")
        if self.disk_dir and self.disk_capacity_bytes < _MIN_CAPACITY_BYTES:
            raise ConfigError(f"--disk-capacity-bytes must be at least {_MIN_CAPACITY_BYTES}, got {self.disk_capacity_bytes}")
        for name, port in (("--port", self.port), ("--metrics-port", self.metrics_port)):
            if not 0 <= port <= 65_535:
                raise ConfigError(f"{name} must be from 0 to 65535, got {port}")
        if self.lifeline_fd is not None:
            try:
                os.fstat(self.lifeline_fd)
            except OSError as error:
                raise ConfigError(f"--lifeline-fd {self.lifeline_fd} is no open descriptor") from error


def options_parser() -> argparse.ArgumentParser:
    """Of the command line; its names are the fields of StoreOptions."""
    parser = argparse.ArgumentParser(prog="python -m kv_transfer", description="Serves one node's KV blocks to other nodes.")
    parser.add_argument("--store-dir", required=True, help="folder of KV blocks that all replicas of the node share")
    parser.add_argument("--capacity-bytes", type=int, required=True, help="what the folder holds once eviction has run")
    parser.add_argument("--host", default=LOOPBACK, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="0: any free port (default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=0, help="port of /metrics, 0: any free one (default: %(default)s)")
    parser.add_argument("--node", default="local", help="name of the node (default: %(default)s)")
    parser.add_argument("--lifeline-fd", type=int, help="its end stops the service")
    parser.add_argument("--tether", default="", help="lock file of the supervisor; the service ends some time after nobody holds it")
    parser.add_argument("--address-file", default="", help="file its address is written to, and its port taken from where it is there")
    parser.add_argument("--cluster", default="", help="cluster whose register it joins")
    parser.add_argument("--redis-url", default=os.environ.get(REGISTER_URL, ""), help="that register; default: REDIS_URL, else none")
    parser.add_argument("--share", dest="is_shared", action="store_true", help="find and offer blocks of other nodes through that register")
    parser.add_argument("--tenant-bytes", type=int, default=0, help="what one tenant's blocks may take; 0: no limit (default: %(default)s)")
    parser.add_argument("--disk-dir", default="", help="folder on a disk where blocks outlive a restart (default: none)")
    parser.add_argument("--disk-capacity-bytes", type=int, default=16 << 30, help="of that folder (default: %(default)s)")
    parser.add_argument("--kv-redis-url", default="", help="a Redis of its own that blocks overflow into (default: none)")
    return parser
