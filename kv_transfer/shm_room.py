"""Whether shared memory has room for KV blocks, asked before anything starts."""

import shutil
from pathlib import Path

from kv_transfer.shm_store import ShmStore
from tandem.errors import ConfigError, Reason

_MIB = 1 << 20
# Below this a store holds a handful of blocks and every hand-off becomes a recompute.
MIN_FREE_BYTES = 64 * _MIB


def check_room(folder: Path, *, needed_bytes: int = MIN_FREE_BYTES) -> None:
    """Raises ConfigError where the file system of `folder` has less than `needed_bytes` free, blocks that it holds already not counted.

    Those give way to new ones, and a replica must be able to start again beside a full store.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes and folder.is_dir():  # counting blocks takes a second for some 300,000 of them
        free_bytes += ShmStore(folder, capacity_bytes=needed_bytes).stats().used_bytes
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"no room for KV blocks in {existing}: {free_bytes // _MIB} MiB free, at least {needed_bytes // _MIB} MiB needed; "
            "free some (stale folders are named tandem-*) or choose another folder with --store-dir",
            reason=Reason.NO_ROOM,
        )
