"""What a prompt would take on each replica that may have it, in predicted seconds, and whether it has room for the request.

Must not choose, book or remember requests: fleet news and lines are others'. What is the same for all replicas of a pool is computed
once for each prompt (`Quote`), what follows from a lease once for each lease: a decision looks at some fifty replicas.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from router.backlog import Backlog
from router.config import RouterConfig
from router.ledger import Ledger, ReplicaLoad
from router.line import Line, Shares
from router.output_length import OutputEstimate
from router.placement import Considered
from router.pool_times import PoolKey
from router.predict import LoadPredictor, PoolRates
from router.prefix_index import Holder, Match, StoreHolder
from router.tracked import Tracked
from tandem.domain import Lease, Namespace, ReplicaId
from tandem.step_cost import StepCost, attention_pairs

_KV_FILL_FRACTION = 0.95  # the rest is what partly filled blocks waste
_GROWTH_FRACTION = 0.5  # of what running requests are still expected to produce: they do not all end at once


class _Facts(NamedTuple):
    """What follows from a lease alone."""

    lease: Lease
    pool: PoolKey
    chunk_tokens: int
    block_tokens: int
    holder: Holder
    store: StoreHolder
    max_requests: int
    fill_tokens: float  # of KV


class Rates(dict[PoolKey, PoolRates]):
    """What engine work costs in each pool at one moment; asked of the predictor once."""

    __slots__ = ("_predictor",)

    def __init__(self, predictor: LoadPredictor) -> None:
        super().__init__()
        self._predictor = predictor

    def __missing__(self, pool: PoolKey) -> PoolRates:
        rates = self[pool] = self._predictor.rates(pool)
        return rates


class Quote:
    """One prompt at one moment: what it would take anywhere. For one decision."""

    __slots__ = ("_engine_s", "_most_stored", "cached", "now_s", "priority", "rates", "tenant", "total_tokens", "tracked")

    def __init__(self, predictor: LoadPredictor, tracked: Tracked, cached: Match, now_s: float) -> None:
        self.tracked = tracked
        self.cached = cached
        self.now_s = now_s
        self.total_tokens = tracked.total_tokens
        self.priority = tracked.request.priority
        self.tenant = tracked.request.tenant
        self.rates = Rates(predictor)
        self._engine_s: dict[tuple[PoolKey, int, int], float] = {}
        self._most_stored: dict[Namespace, int] = {}

    def prefill_s(self, pool: PoolKey, chunk_tokens: int, rates: PoolRates, bias: float, cached_tokens: int) -> float:
        """Seconds of its prefill with nothing ahead, as `LoadPredictor.prefill_s`."""
        key = (pool, chunk_tokens, cached_tokens)
        engine_s = self._engine_s.get(key)
        if engine_s is None:
            uncached_tokens = self.total_tokens - cached_tokens
            engine_s = rates.cost.finish_s(uncached_tokens, attention_pairs(uncached_tokens, cached_tokens), chunk_tokens)
            self._engine_s[key] = engine_s
        return bias * engine_s + rates.prefill_fixed_s

    def most_stored(self, namespace: Namespace) -> int:
        """Leading blocks in the store that has most of them, of any node."""
        blocks = self._most_stored.get(namespace)
        if blocks is None:
            stores = self.cached.stores.items()
            blocks = max((blocks for store, blocks in stores if store.namespace == namespace), default=0)
            self._most_stored[namespace] = blocks
        return blocks


class Estimator:
    """Reads ledger, backlog, lines and predictor, which are the core's."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        ledger: Ledger,
        backlog: Backlog,
        lines: Mapping[ReplicaId, Line],
        shares: Shares,
        predictor: LoadPredictor,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._backlog = backlog
        self._lines = lines
        self._shares = shares
        self._predictor = predictor
        self._facts: dict[ReplicaId, _Facts] = {}
        self._chunks: dict[tuple[PoolKey, int], tuple[StepCost, float]] = {}  # of one chunk, by the coefficients it was made of

    def forget(self, replica_id: ReplicaId) -> None:
        """The replica is gone."""
        self._facts.pop(replica_id, None)
        self._chunks.clear()

    def ahead_s(self, lease: Lease, now_s: float) -> float:
        """Seconds of prefill that the worker has been given and has not done: this router's, less what has passed, and others'."""
        replica_id = lease.replica_id
        ahead_s, tokens = self._backlog.ahead(replica_id, now_s)
        others_tokens = self._ledger.view(replica_id).pending_prefill_tokens - tokens
        if others_tokens > 0:
            facts = self._facts_of(lease)
            bias = self._predictor.pools.bias(facts.pool, replica_id)
            ahead_s += bias * self._predictor.pools.cost(facts.pool).finish_s(others_tokens, 0.0, facts.chunk_tokens)
        return ahead_s

    def chunk_s(self, lease: Lease) -> float:
        """Seconds of one step that computes prompts only."""
        facts = self._facts_of(lease)
        pool, chunk = facts.pool, facts.chunk_tokens
        cost, known = self._predictor.pools.cost(pool), self._chunks.get((pool, chunk))
        if known is None or known[0] is not cost:
            known = self._chunks[pool, chunk] = cost, cost.finish_s(chunk, 0.0, chunk)
        return self._predictor.pools.bias(pool, lease.replica_id) * known[1]

    def consider(self, quote: Quote, lease: Lease, *, is_one_worker: bool) -> Considered:
        """The prompt on this replica: computed, or with blocks fetched from another node's store where that is quicker.

        Blocks are fetched while the work ahead is done that the worker has; what waits in the router's line hides nothing.
        """
        facts, replica_id, cached = self._facts_of(lease), lease.replica_id, quote.cached
        _, pool, chunk, block_tokens, holder, store, _, _ = facts
        blocks = cached.get(holder, 0)
        if cached.stores:
            blocks = max(blocks, cached.stores.get(store, 0))
        cached_tokens = min(blocks * block_tokens, quote.total_tokens - 1)
        rates = quote.rates[pool]
        bias = rates.bias(replica_id)
        own_s = quote.prefill_s(pool, chunk, rates, bias, cached_tokens)
        line = self._lines.get(replica_id)
        ahead_s = self.ahead_s(lease, quote.now_s)
        if line is not None:
            ahead_s += line.work_before_s(quote.priority, quote.tenant, own_s, self._shares)
        fetched_tokens, wait_s = 0, 0.0
        stored_blocks = quote.most_stored(lease.namespace) if cached.stores else 0
        if stored_blocks > blocks:
            stored_tokens = min(stored_blocks * block_tokens, quote.total_tokens - 1)
            size_bytes = (stored_blocks - blocks) * lease.engine.kv_block_bytes
            fetch_s = self._predictor.transfer_s(lease.model, size_bytes=size_bytes, is_same_node=False)
            hidden_s = min(ahead_s, self._config.ahead_s + self.chunk_s(lease))
            fetch_wait_s = max(0.0, fetch_s - hidden_s)
            rest_s = quote.prefill_s(pool, chunk, rates, bias, stored_tokens)
            if fetch_wait_s + rest_s < own_s:
                fetched_tokens, wait_s = stored_tokens - cached_tokens, fetch_wait_s
                cached_tokens, own_s = stored_tokens, rest_s
        # Each request that decodes there waits as long for its next token.
        others_s = own_s * self._ledger.view(replica_id).running_requests if is_one_worker else 0.0
        return Considered(
            lease=lease,
            cached_tokens=cached_tokens,
            ahead_s=ahead_s,
            own_s=own_s,
            others_s=others_s,
            is_one_worker=is_one_worker,
            fetched_tokens=fetched_tokens,
            wait_s=wait_s,
        )

    def those_that_may_take_less(self, quote: Quote, leases: Iterable[Lease], limit_s: float) -> list[Lease]:
        """Where one worker might do both in less; those are left out whose streams alone it would harm too much.

        The work ahead is left out, so `consider` may say more; blocks of stores are reckoned to come for nothing.
        """
        cached, found = quote.cached, []
        for lease in leases:
            facts, replica_id = self._facts_of(lease), lease.replica_id
            blocks = cached.get(facts.holder, 0)
            if cached.stores:
                blocks = max(blocks, quote.most_stored(lease.namespace))
            cached_tokens = min(blocks * facts.block_tokens, quote.total_tokens - 1)
            rates = quote.rates[facts.pool]
            own_s = quote.prefill_s(facts.pool, facts.chunk_tokens, rates, rates.bias(replica_id), cached_tokens)
            if own_s * (1 + self._ledger.view(replica_id).running_requests) < limit_s:
                found.append(lease)
        return found

    def has_room(self, lease: Lease, load: ReplicaLoad, total_tokens: int, output: OutputEstimate) -> bool:
        """Whether the request fits in at the 90th percentile of its output, and a part of what the others still produce."""
        if load.running_requests == 0:
            return True
        facts = self._facts_of(lease)
        if load.running_requests >= facts.max_requests:
            return False
        growth_tokens = _GROWTH_FRACTION * load.running_requests * output.mean_tokens
        return load.kv_tokens + total_tokens + output.p90_tokens + growth_tokens <= facts.fill_tokens

    def tpot_s(self, prices: Rates, lease: Lease, load: ReplicaLoad, total_tokens: int, output: OutputEstimate) -> float:
        """Seconds per output token there with this request in the batch, as `LoadPredictor.tpot_s`."""
        facts = self._facts_of(lease)
        rates = prices[facts.pool]
        step_s = rates.cost.tpot_s(
            load.running_requests + 1,
            load.kv_tokens + total_tokens,
            output_tokens=max(1.0, output.mean_tokens),
            pending_tokens=load.pending_prefill_tokens,
            chunk_tokens=facts.chunk_tokens,
        )
        return rates.bias(lease.replica_id) * step_s + rates.tpot_fixed_s

    def _facts_of(self, lease: Lease) -> _Facts:
        facts = self._facts.get(lease.replica_id)
        if facts is None or facts.lease is not lease:
            facts = self._facts[lease.replica_id] = _Facts(
                lease=lease,
                pool=pool_of(lease),
                chunk_tokens=chunk_tokens(lease),
                block_tokens=lease.engine.block_size_tokens,
                holder=(lease.replica_id, lease.incarnation),
                store=StoreHolder(lease.node, lease.namespace),
                max_requests=lease.engine.max_num_seqs,
                fill_tokens=_KV_FILL_FRACTION * kv_room_tokens(lease),
            )
        return facts


def pool_of(lease: Lease) -> PoolKey:
    """Whose steps take alike."""
    return PoolKey(lease.model, lease.engine.hardware, lease.role)


def chunk_tokens(lease: Lease) -> int:
    """Tokens of one step of its engine."""
    return max(1, lease.engine.max_num_batched_tokens)


def kv_room_tokens(lease: Lease) -> int:
    """Tokens of KV that the replica has room for."""
    return max(1, lease.engine.kv_blocks * lease.engine.block_size_tokens)
