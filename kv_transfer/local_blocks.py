"""The node's store for an engine that lives in the replica's own process and has no KV tensors: the simulated one's.

A block's bytes are its hash over and over, so that a wrong block shows. Puts and gets are the connector's: staged into granted slots,
committed, loaded with their checksums. Must not wait for anybody but the arena's lock.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from kv_transfer.arena_store import ArenaStore
from kv_transfer.copies import BlockRows
from kv_transfer.notices import TransferTotals
from kv_transfer.quotas import tenant_of
from kv_transfer.store import BlockOutcome, Bytes, PutOutcome, leading_count
from tandem.config import EngineConfig
from tandem.domain import BlockHash, Namespace
from tandem.engine.base import KvTotals
from tandem.faults import Faults

_LEASE_S = 10.0
_GRANTED_BLOCKS = 128  # slots held ready
_MAX_COPIED_BLOCKS = 256  # at once: the loop is held for as long


class LocalBlocks:
    """`StoredBlocks` over the arena in `config.store_dir`. Raises ConfigError where it cannot be used."""

    def __init__(self, config: EngineConfig, namespace: Namespace, block_bytes: int) -> None:
        self._store = ArenaStore(Path(config.store_dir), capacity_bytes=config.store_capacity_bytes)
        self._namespace = namespace
        self.block_bytes = block_bytes
        self._faults = Faults.parse(config.faults)
        self._totals = TransferTotals()
        self._granted_blocks = 0
        self._is_closed = False
        with suppress(OSError):  # a quota that cannot be written is no reason not to serve
            self._store.quotas.set_model(namespace, config.kv_store_bytes)

    def held(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading ones are there; they are not evicted for a while."""
        return leading_count(self._store.contains(self._namespace, hashes, lease_s=_LEASE_S))

    def note_use(self, hashes: Sequence[BlockHash]) -> None:
        """A request's prefix has these blocks."""
        self._store.note_use(self._namespace, hashes)

    def load(self, hashes: Sequence[BlockHash]) -> int:
        """Copies blocks out, up to the first that is missing, corrupt or not what its hash stands for; how many are good."""
        good = 0
        for start in range(0, len(hashes), _MAX_COPIED_BLOCKS):
            part = hashes[start : start + _MAX_COPIED_BLOCKS]
            rows = np.empty((len(part), self.block_bytes), np.uint8)
            places = np.arange(len(part))
            outcomes = self._store.load(self._namespace, part, BlockRows((rows,)), places, only_leading=True)
            is_right = (rows == self._bytes_of(part)).all(axis=1).tolist()
            hits = [outcome is BlockOutcome.HIT for outcome in outcomes]
            valid = leading_count([hit and right for hit, right in zip(hits, is_right, strict=True)])
            good += valid
            if valid < len(part):
                self._totals.missing_blocks += outcomes[valid] is BlockOutcome.MISSING
                self._totals.corrupt_blocks += outcomes[valid] is not BlockOutcome.MISSING
                break
        self._totals.loaded_blocks += good
        self._totals.loaded_bytes += good * self.block_bytes
        return good

    def save(self, hashes: Sequence[BlockHash], *, first_position: int, cache_salt: str, then: Callable[[], None]) -> None:
        """Publishes the blocks that the store lacks, then calls `then`, later where a fault says so."""

        def publish() -> None:
            if not self._is_closed:
                for start in range(0, len(hashes), _MAX_COPIED_BLOCKS):
                    self._put(hashes[start : start + _MAX_COPIED_BLOCKS], first_position + start, cache_salt)
                then()

        if delay_s := self._faults.delay_s("kv_publish.delay_s"):
            asyncio.get_running_loop().call_later(delay_s, publish)
        else:
            publish()

    def totals(self) -> KvTotals:
        """Transfer counts now."""
        totals = self._totals
        return KvTotals(**{name: getattr(totals, name) for name in TransferTotals.__slots__})

    def close(self) -> None:
        """Gives granted slots back; blocks stay."""
        if not self._is_closed:
            self._is_closed = True
            self._store.close()

    def _put(self, hashes: Sequence[BlockHash], first_position: int, cache_salt: str) -> None:
        held = self._store.contains(self._namespace, hashes)
        wanted = [index for index, is_held in enumerate(held) if not is_held and not self._faults.fires("kv_put.drop_every")]
        if not wanted:
            return
        if self._granted_blocks < len(wanted):
            self._granted_blocks = self._store.prepare(self.block_bytes, max(_GRANTED_BLOCKS, len(wanted)))
            self._totals.evicted_blocks = self._store.evicted_blocks
        new = [hashes[index] for index in wanted]
        staged = self._store.stage(
            self._namespace,
            new,
            BlockRows((self._bytes_of(new),)),
            np.arange(len(new)),
            first_position=first_position + wanted[0],
            tenant=tenant_of(cache_salt),
        )
        self._granted_blocks = max(0, self._granted_blocks - len(staged.slots))
        stored = self._store.commit(staged).count(PutOutcome.STORED)
        self._store.announce()
        self._totals.published_blocks += stored
        self._totals.published_bytes += stored * self.block_bytes
        self._totals.unstored_blocks += len(new) - stored

    def _bytes_of(self, hashes: Sequence[BlockHash]) -> Bytes:
        """(n, block_bytes), each row its block's hash repeated."""
        digests = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1)
        return np.tile(digests, self.block_bytes // digests.shape[1])
