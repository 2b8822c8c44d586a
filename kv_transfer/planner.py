"""Which blocks to load and which to save, step by step: the scheduler's half of the connector, without the engine's types.

Nothing here blocks; lookups in the store are hints that the loader checks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kv_transfer.store import leading_count
from tandem.domain import BlockHash, Namespace

# From the match to the load: the step of the load comes at once, or once the engine has blocks for it.
_LEASE_S = 10.0
_PARAMS = ("tandem_tag", "tandem_load", "tandem_publish", "tandem_counts_use")


class LookupStore(Protocol):
    """What a store says of blocks before they are loaded."""

    def contains(self, namespace: Namespace, hashes: Sequence[BlockHash], *, lease_s: float = 0.0) -> list[bool]:
        """Which blocks are held; those are not evicted for `lease_s`."""

    def note_use(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> None:
        """A request's prefix has these blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDirective:
    """What one request wants of the store. `tag` names it in notices; the engine changes request ids.

    The second half of a hand-off does not count as a use: else every block would look as if others wanted it too.
    """

    tag: str
    load: bool = True
    publish: bool = True
    counts_use: bool = True

    def to_params(self) -> dict[str, str | bool]:
        """As the engine's kv_transfer_params."""
        return dict(zip(_PARAMS, (self.tag, self.load, self.publish, self.counts_use), strict=True))

    @classmethod
    def from_params(cls, params: dict[str, str | bool] | None) -> "KvDirective":
        """Out of kv_transfer_params; without them a request neither loads nor publishes."""
        tag, load, publish, counts_use = ((params or {}).get(name, "") for name in _PARAMS)
        return cls(tag=str(tag), load=bool(load), publish=bool(publish), counts_use=bool(counts_use))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """Blocks to copy out of the store into the engine's blocks; `local_tokens` came from the engine's own cache."""

    request_id: str
    tag: str
    local_tokens: int
    block_ids: list[int]
    hashes: list[BlockHash]
    is_async: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """Blocks to publish after this step's forward; `prompt_hashes` come with the step that ends the prompt."""

    request_id: str
    tag: str
    block_ids: list[int]
    hashes: list[BlockHash]
    first_position: int  # of the first block in its chain
    tenant: int  # whose blocks they are, for quotas; 0: nobody's
    prompt_hashes: list[BlockHash] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepJobs:
    """All transfers of one engine step."""

    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledRequest:
    """One request of this step: tokens whose KV exists after the step, and its block table."""

    request_id: str
    computed_after_tokens: int
    prompt_tokens: int
    hashes: Sequence[BlockHash]
    block_ids: Sequence[int]


@dataclass(slots=True)
class _Tracked:
    directive: KvDirective
    tenant: int = 0
    has_failed: bool = False
    is_use_noted: bool = False
    is_prompt_saved: bool = False
    saved_blocks: int = 0
    local_tokens: int = 0
    is_async: bool = False
    hashes: Sequence[BlockHash] = ()


class TransferPlanner:
    """Per-request state between asking the store and the end of the request."""

    def __init__(self, store: LookupStore, namespace: Namespace, *, block_size_tokens: int, block_bytes: int, sync_load_bytes: int) -> None:
        self._store = store
        self._namespace = namespace
        self._block_size_tokens = block_size_tokens
        self._sync_load_blocks = max(1, sync_load_bytes // block_bytes)
        self._sync_blocks_this_step = 0
        self._requests: dict[str, _Tracked] = {}
        self._loads: list[LoadJob] = []

    def __len__(self) -> int:
        return len(self._requests)

    def track(self, request_id: str, directive: KvDirective, tenant: int = 0) -> None:
        """A request came; it stays until `finished`."""
        self._requests[request_id] = _Tracked(directive, tenant)

    def match(self, request_id: str, hashes: Sequence[BlockHash], total_tokens: int, local_tokens: int) -> tuple[int, bool]:
        """Tokens that the store can supply beyond `local_tokens`, and whether to load them outside the step.

        Asked at every scheduling attempt, so idempotent. At least one token is always left to compute. A request whose load
        failed once is never given blocks again.
        """
        tracked = self._requests[request_id]
        if not tracked.directive.load or tracked.has_failed:
            return 0, False
        first = local_tokens // self._block_size_tokens
        limit = min(len(hashes), (total_tokens - 1) // self._block_size_tokens)
        held = leading_count(self._store.contains(self._namespace, hashes[first:limit], lease_s=_LEASE_S))
        if tracked.directive.counts_use and not tracked.is_use_noted:
            tracked.is_use_noted = True
            self._store.note_use(self._namespace, hashes[: first + held])
        tracked.local_tokens, tracked.hashes = local_tokens, hashes
        tracked.is_async = self._sync_blocks_this_step + held > self._sync_load_blocks
        return held * self._block_size_tokens, tracked.is_async and held > 0

    def allocate(self, request_id: str, block_ids: Sequence[int], external_tokens: int) -> None:
        """The scheduler took `external_tokens` of the match and allocated `block_ids` (the whole table)."""
        tracked = self._requests[request_id]
        if external_tokens == 0:
            return
        first = tracked.local_tokens // self._block_size_tokens
        last = first + -(-external_tokens // self._block_size_tokens)
        if not tracked.is_async:
            self._sync_blocks_this_step += last - first
        job = LoadJob(
            request_id=request_id,
            tag=tracked.directive.tag,
            local_tokens=tracked.local_tokens,
            block_ids=list(block_ids[first:last]),
            hashes=list(tracked.hashes[first:last]),
            is_async=tracked.is_async,
        )
        self._loads.append(job)

    def plan_step(self, scheduled: Iterable[ScheduledRequest]) -> StepJobs:
        """The loads allocated since the last step, and the blocks that this step fills."""
        jobs = StepJobs(loads=self._loads)
        self._loads = []
        self._sync_blocks_this_step = 0
        for request in scheduled:
            tracked = self._requests.get(request.request_id)
            if tracked is None or not tracked.directive.publish:
                continue
            full = min(request.computed_after_tokens // self._block_size_tokens, len(request.hashes))
            ends_prompt = not tracked.is_prompt_saved and request.computed_after_tokens >= request.prompt_tokens
            if full <= tracked.saved_blocks and not ends_prompt:
                continue
            prompt_blocks = request.prompt_tokens // self._block_size_tokens
            jobs.saves.append(
                SaveJob(
                    request_id=request.request_id,
                    tag=tracked.directive.tag,
                    block_ids=list(request.block_ids[tracked.saved_blocks : full]),
                    hashes=list(request.hashes[tracked.saved_blocks : full]),
                    first_position=tracked.saved_blocks,
                    tenant=tracked.tenant,
                    prompt_hashes=list(request.hashes[:prompt_blocks]) if ends_prompt else None,
                )
            )
            tracked.saved_blocks = full
            tracked.is_prompt_saved = tracked.is_prompt_saved or ends_prompt
        return jobs

    def loads_failed(self, request_ids: Iterable[str]) -> None:
        """Blocks of these requests were missing or corrupt: they compute from here on."""
        for request_id in request_ids:
            if request_id in self._requests:
                self._requests[request_id].has_failed = True

    def saves_dropped(self, request_ids: Iterable[str]) -> None:
        """This step's blocks of these requests are not to be trusted; they are saved again when they are computed again."""
        for request_id in request_ids:
            if request_id in self._requests:
                self._requests[request_id].saved_blocks = 0
                self._requests[request_id].is_prompt_saved = False

    def finish(self, request_id: str) -> None:
        """The request has ended, in whatever way."""
        self._requests.pop(request_id, None)
