"""Whether shared memory has room for KV blocks, asked before anything starts."""

import shutil
from pathlib import Path

from kv_transfer.arena import FILE_NAME
from tandem.errors import ConfigError, Reason

_MIB = 1 << 20
# Below this a store holds a handful of blocks and every hand-off becomes a recompute.
MIN_FREE_BYTES = 64 * _MIB
_UNIT_BYTES = 512  # of st_blocks


def check_room(folder: Path, *, needed_bytes: int = MIN_FREE_BYTES) -> None:
    """Raises ConfigError where the file system of `folder` has less than `needed_bytes` free, an arena that is there already not counted.

    Its blocks give way to new ones, and a replica must be able to start again beside a full store.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    arena = folder / FILE_NAME
    if arena.is_file():
        free_bytes += arena.stat().st_blocks * _UNIT_BYTES
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"no room for KV blocks in {existing}: {free_bytes // _MIB} MiB free, at least {needed_bytes // _MIB} MiB needed; "
            "free some (stale folders are named tandem-*) or choose another folder with --store-dir",
            reason=Reason.NO_ROOM,
        )
