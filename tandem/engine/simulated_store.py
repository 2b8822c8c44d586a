"""The simulated engine's side of the KV store: what each run takes from it and publishes to it, and who waits for that.

Must not know how blocks are kept: `StoredBlocks` does, and is handed in.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tandem.domain import BlockHash
from tandem.engine.base import EngineRequest, KvLoaded, KvTotals
from tandem.engine.simulated_batching import SimulatedRun, full_blocks


class StoredBlocks(Protocol):
    """The node's KV store as seen by an engine in the replica's own process. Nothing here waits for anybody."""

    @property
    def block_bytes(self) -> int:
        """What a block takes."""

    def held(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading ones are there; they stay for a while."""

    def note_use(self, hashes: Sequence[BlockHash]) -> None:
        """A request's prefix has these blocks."""

    def load(self, hashes: Sequence[BlockHash]) -> int:
        """Copies blocks out and checks them; how many leading ones are good."""

    def save(self, hashes: Sequence[BlockHash], *, first_position: int, cache_salt: str, then: Callable[[], None]) -> None:
        """Publishes blocks; those that are there already are not written again. `then` is called once they can be seen, on the loop."""

    def totals(self) -> KvTotals:
        """Transfer counts now."""

    def close(self) -> None:
        """Gives back what this process holds; idempotent."""


@dataclass(slots=True, kw_only=True)
class _Traffic:
    """Of one run, until it is forgotten."""

    request: EngineRequest
    published: asyncio.Future[int]
    loaded: KvLoaded | None = None
    saved_blocks: int = 0
    is_prompt_saved: bool = False


@dataclass(slots=True)
class StoreSide:
    """Traffic by run id. An `OuterBlocks` for the batching. Without a store nothing is held and nothing is published."""

    store: StoredBlocks | None
    block_size_tokens: int
    _traffic: dict[str, _Traffic] = field(default_factory=dict)

    def begin(self, request: EngineRequest, hashes: Sequence[BlockHash]) -> None:
        """A run comes; it is known until `forget`."""
        if self.store is None:
            return
        self._traffic[request.run_id] = _Traffic(request=request, published=asyncio.get_running_loop().create_future())
        if request.load_kv and request.counts_use:
            self.store.note_use(hashes)

    def held(self, run: SimulatedRun, first: int, limit: int) -> int:
        """How many blocks of the run the store holds, from block `first` to below `limit`."""
        traffic = self._traffic.get(run.run_id)
        if self.store is None or traffic is None or not traffic.request.load_kv or first >= limit:
            return 0
        return self.store.held(run.hashes[first:limit])

    def load(self, run: SimulatedRun, first: int, count: int) -> int:
        """Copies them out; how many leading ones were good."""
        assert self.store is not None, "only what is held is loaded"
        blocks = self.store.load(run.hashes[first : first + count])
        traffic = self._traffic.get(run.run_id)
        if traffic is not None:
            local_tokens = first * self.block_size_tokens
            traffic.loaded = KvLoaded(local_tokens=local_tokens, blocks=blocks, payload_bytes=blocks * self.store.block_bytes)
        return blocks

    def computed(self, run: SimulatedRun) -> None:
        """Publishes the blocks that are full now; with the prompt's last one whoever waits for it is told."""
        traffic = self._traffic.get(run.run_id)
        if self.store is None or traffic is None or not traffic.request.publish_kv:
            return
        full = full_blocks(run, self.block_size_tokens)
        ends_prompt = not traffic.is_prompt_saved and run.computed_tokens >= run.prompt_tokens
        first = traffic.saved_blocks
        if len(full) <= first and not ends_prompt:
            return
        traffic.saved_blocks = max(first, len(full))
        traffic.is_prompt_saved = traffic.is_prompt_saved or ends_prompt
        prompt = run.hashes[: run.prompt_tokens // self.block_size_tokens]
        store = self.store

        def saved() -> None:
            if ends_prompt and not traffic.published.done():
                traffic.published.set_result(store.held(prompt))

        store.save(full[first:], first_position=first, cache_salt=traffic.request.cache_salt, then=saved)

    async def published(self, run_id: str, timeout_s: float) -> int:
        """As `Engine.published`."""
        traffic = self._traffic.get(run_id)
        if traffic is None:
            return 0
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(traffic.published)
        except TimeoutError:
            return 0

    def take_loaded(self, run_id: str) -> KvLoaded | None:
        """As `Engine.take_loaded`."""
        traffic = self._traffic.get(run_id)
        if traffic is None:
            return None
        loaded, traffic.loaded = traffic.loaded, None
        return loaded

    def forget(self, run_id: str) -> None:
        """The run has ended."""
        traffic = self._traffic.pop(run_id, None)
        if traffic is not None:
            traffic.published.cancel()

    def totals(self) -> KvTotals:
        """Transfer counts now."""
        return KvTotals() if self.store is None else self.store.totals()

    def close(self) -> None:
        """Lets go of the store."""
        if self.store is not None:
            self.store.close()
            self.store = None
