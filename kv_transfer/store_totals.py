"""What one store service has done since it started."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class StoreTotals:
    """Cumulative counts. Threads add to them without a lock: one that is lost is a count, not a block."""

    fetched_blocks: int = 0
    fetched_bytes: int = 0
    served_blocks: int = 0
    served_bytes: int = 0
    missing_blocks: int = 0  # asked for by another node and not held
    corrupt_blocks: int = 0  # failed their check, here or on the way here
    unstored_blocks: int = 0  # came and found no room
    evicted_blocks: int = 0
    bad_requests: int = 0  # what no store says
    bad_answers: int = 0
