"""What every block store offers, tier by tier: put, checked get, drop.

A missing block is a value, never an exception. All blocks of one call are of one namespace and of one size. Implementations: `arena_store`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tandem.domain import BlockHash, Namespace

Bytes = npt.NDArray[np.uint8]


class BlockOutcome(StrEnum):
    """What became of one block of a get."""

    HIT = "hit"
    MISSING = "missing"
    CORRUPT = "corrupt"


class PutOutcome(StrEnum):
    """What became of one block of a put."""

    STORED = "stored"
    EXISTS = "exists"
    NO_ROOM = "no_room"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """What a store holds."""

    used_bytes: int
    capacity_bytes: int
    blocks: int


class BlockStore(Protocol):
    """Blocks by content address. Safe to use from several processes and threads."""

    def contains(self, namespace: Namespace, hashes: Sequence[BlockHash], *, lease_s: float = 0.0) -> list[bool]:
        """Which blocks are held; those are not evicted for `lease_s`. A hint that is checked at use."""

    def put(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes, *, first_position: int = 0) -> list[PutOutcome]:
        """Stores row i of `rows` (n, payload_bytes) as block i, all of it or nothing; what is there already is not written again.

        `first_position` is the first block's place in its prompt: what is deep in a prompt is worth less to others.
        """

    def get_into(self, namespace: Namespace, hashes: Sequence[BlockHash], rows: Bytes) -> list[BlockOutcome]:
        """Copies block i into row i of `rows` (n, payload_bytes) and verifies it there; a corrupt one is dropped.

        The row of what is not a hit may hold anything.
        """

    def payload_bytes(self, namespace: Namespace, block_hash: BlockHash) -> int | None:
        """Size of a held block; None where it is not held. A hint: `get_into` checks."""

    def drop(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> int:
        """Takes blocks out of sight of all readers; how many there were."""

    def make_room(self) -> int:
        """Makes room ahead of need; how many blocks were evicted."""

    def stats(self) -> StoreStats:
        """Sizes now."""

    def close(self) -> None:
        """Gives back what this process holds; blocks stay."""


def leading_count(flags: Sequence[bool]) -> int:
    """How many of the first flags are all true."""
    return next((index for index, flag in enumerate(flags) if not flag), len(flags))
