"""Our store in the run: its four side processes, and stores that live as long as one part of the run."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem.bench.kv.options import KvBenchOptions
from tandem.bench.kv.processes import ProcessSides, module_command, running_sides
from tandem.bench.kv.turns import System

PAIR = ("writer", "reader")
BOTH_PAIRS = (*PAIR, "writer-2", "reader-2")
_MODULE = "tandem.bench.kv.our_store"


@dataclass(frozen=True, slots=True, kw_only=True)
class OurSides:
    """Processes by role, and where stores may be made."""

    sides: ProcessSides
    folder: Path
    capacity_bytes: int

    @contextmanager
    def stores(self, checksums: Sequence[bool], roles: Sequence[str] = PAIR) -> Iterator[list[System]]:
        """A new, empty store for each, open in all `roles`; closed and removed at the end."""
        systems = [System(name=store_name(checksum), sides=self.sides, store=store_name(checksum)) for checksum in checksums]
        try:
            for system, checksum in zip(systems, checksums, strict=True):
                settings = {"folder": str(self.folder / system.store), "capacity_bytes": self.capacity_bytes, "checksum": checksum}
                for role in roles:
                    self.sides.call(role, do="open", store=system.store, settings=settings)
            yield systems
            for system in systems:
                for role in roles:
                    self.sides.call(role, do="shut", store=system.store)
        finally:
            for system in systems:
                shutil.rmtree(self.folder / system.store, ignore_errors=True)


def store_name(checksum: bool) -> str:
    """Also the system's name in turns."""
    return "ours-checksum" if checksum else "ours-plain"


@contextmanager
def running_our_sides(options: KvBenchOptions, folder: Path) -> Iterator[OurSides]:
    """Two writers and two readers; the second of each only work under contention, and idle they take no time."""
    config = {"buffer_bytes": options.buffer_bytes, "seed": options.seed}
    with running_sides(module_command(_MODULE), config, BOTH_PAIRS) as (sides, _):
        yield OurSides(sides=sides, folder=folder, capacity_bytes=options.capacity_bytes)
