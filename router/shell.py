"""Drives the core: gives it the time, carries out what it answers, counts what happens.

Must not decide: every choice is the core's. Belongs to one event loop.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import Abandon, CopyPrefix, Dispatch, Instruction, Reject
from router.quota import Quotas
from router.ticket import Ticket
from tandem.deadline import Deadline
from tandem.domain import BlockHash, Lease, ModelId, Namespace, Plan, Receipt, ReplicaId, Request, RequestId, Role, Stamp, WorkerLoad
from tandem.errors import InvalidRequestError, OverloadedError, Reason, TandemError, UnavailableError
from tandem.held_blocks import BlockChange
from tandem.ownership import count_unowned
from tandem.short_hash import SHORT_BYTES
from tandem.step_sample import StepSample
from tandem.telemetry import RouterMetrics

logger = logging.getLogger(__name__)

_TURNED_AWAY_S = 5.0  # several observations of the autoscaler
_OWN_STALL_S = 1.0
_IDLE_TICK_S = 0.25  # nothing waits for the tick then but gauges; a deadline that begins meanwhile is noticed this much later


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one model's clients want of this router."""

    queued_requests: int
    queued_work_s: float
    requests_total: int


class RouterShell:
    """The core with a clock, tickets and metrics around it."""

    def __init__(
        self,
        config: RouterConfig,
        core: RouterCore,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
        quotas: Quotas | None = None,
    ) -> None:
        self.config = config
        self.core = core
        self.metrics = metrics
        self.clock = clock
        self._quotas = Quotas() if quotas is None else quotas
        self._tickets: dict[RequestId, Ticket] = {}
        self._calls: Counter[ModelId | None] = Counter()
        self._held: Counter[ModelId] = Counter()
        self._turned_away_s: dict[ModelId, float] = {}  # when a request was last refused because the model's replicas do not start
        self._requests_total: Counter[ModelId] = Counter()
        self._stragglers: set[str] = set()
        self._models_changed = asyncio.Event()
        self.on_copy: Callable[[CopyPrefix], None] = lambda copy: self.prefix_copied(copy, "failed")  # who carries it out
        self.on_demand: Callable[[], None] = lambda: None  # called where a request waits for a replica that is still to be started

    @property
    def queued_requests(self) -> int:
        """Requests that wait: in the core, and those held for a model of which no replica was ever seen."""
        return self.core.queued_requests + self._held.total()

    @contextmanager
    def call(self, model: str) -> Iterator[None]:
        """Counts a call for `model` ("": the only one), from before its tokenisation; names that are not known share one count.

        Raises OverloadedError where more are here than may wait and run.
        """
        named = self.core.fleet.named(model)
        limit = self.config.max_queued_requests + self.config.max_running_requests
        if self._calls[named] >= limit:
            kind = "unknown models" if named is None else f"model {named!r}"
            raise OverloadedError(
                f"{self._calls[named]} calls for {kind} are being served, the limit is {limit}",
                retry_after_s=self.core.retry_after_s(named, self.clock()),
            )
        self._calls[named] += 1
        try:
            yield
        finally:
            self._calls[named] -= 1
            if not self._calls[named]:
                del self._calls[named]

    async def lease_for(self, model: str, deadline: Deadline) -> Lease:
        """How to read requests for `model`; waits a bounded time for the first word of any model, and for the first replica of this one.

        Raises DeadlineError, and UnavailableError (with the reason where no replica will come), NotFoundError or InvalidRequestError
        naming the models.
        """
        fleet = self.core.fleet
        await self._wait_while(lambda: not fleet.models, self.config.no_replica_wait_s, deadline)
        held = fleet.awaited(model)
        if held is not None:
            self._held[held] += 1
            try:
                self.on_demand()
                await self._wait_while(lambda: fleet.awaited(model) is not None, self.config.cold_start_wait_s, deadline)
            finally:
                self._held[held] -= 1
        named = fleet.named(model)
        if named is not None and fleet.is_held(named) and fleet.refusal(named) is not None:
            self._turned_away_s[named] = self.clock()
            self.on_demand()
        return fleet.lease_for(model)

    async def _wait_while(self, is_missing: Callable[[], bool], wait_s: float, deadline: Deadline) -> None:
        """Looks again at every change of the models, for `wait_s` at most. Raises DeadlineError."""
        if not is_missing():
            return
        remaining_s = deadline.remaining_s("arrival")
        try:
            async with asyncio.timeout(wait_s if remaining_s is None else min(wait_s, remaining_s)):
                while is_missing():
                    await self._models_changed.wait()
        except TimeoutError:
            deadline.remaining_s("waiting for the first worker")

    def demand(self) -> dict[ModelId, Demand]:
        """By model, those nothing waits for too: what waits here for a replica, and all that was ever submitted.

        A request that was just refused because the model's replicas do not start counts as one that waits: the next try is for it.
        """
        work, now_s = self.core.waiting_work(), self.clock()
        demand = {}
        for model in self.core.fleet.models:
            requests, work_s = work.get(model, (0, 0.0))
            is_wanted = now_s - self._turned_away_s.get(model, -math.inf) < _TURNED_AWAY_S
            demand[model] = Demand(
                queued_requests=requests + self._held[model] + is_wanted,
                queued_work_s=work_s,
                requests_total=self._requests_total[model],
            )
        return demand

    def submit(self, request: Request, block_hashes: Sequence[BlockHash], deadline: Deadline, *, is_begun: bool = False) -> Ticket:
        """Hands the request to the core; close the ticket. Its prompt is charged to its tenant, unless it `is_begun` or refused at once.

        Raises DeadlineError, OverloadedError where the tenant is over its quota, InvalidRequestError for an id in use.
        """
        remaining_s, now_s = deadline.remaining_s("admission"), self.clock()
        if request.request_id in self._tickets:  # ended in the core, perhaps, and its call has not heard of it yet
            raise InvalidRequestError("request_id", f"a request {request.request_id!r} is being served")
        if not is_begun:
            self._check_quota(request)
        deadline_s = None if remaining_s is None else now_s + remaining_s
        instructions = self.core.submit(request, block_hashes=block_hashes, deadline_s=deadline_s, now_s=now_s, is_begun=is_begun)
        ticket = self._tickets[request.request_id] = Ticket(request.request_id, request.tenant)
        is_free = is_begun or any(isinstance(item, Reject) and item.request_id == request.request_id for item in instructions)
        self._quotas.begin(request.tenant, 0 if is_free else len(request.prompt_token_ids))
        self._requests_total[request.model] += 1
        self._carry_out(instructions)
        if not self.core.is_served(request.model):
            self.on_demand()
        return ticket

    def _check_quota(self, request: Request) -> None:
        try:
            self._quotas.check(request.tenant)
        except OverloadedError as error:
            self.core.decisions.refused(request.request_id, error, None)
            raise

    def sent(self, ticket: Ticket, tokens: int) -> None:
        """The ticket's attempt has brought `tokens` more tokens to the client."""
        self._quotas.charge_output(ticket.tenant, tokens)
        self._carry_out(self.core.tokens(ticket.request_id, ticket.attempt, tokens, self.clock()))

    def failed(self, ticket: Ticket, error: TandemError) -> None:
        """The ticket's attempt failed; the ticket tells what follows."""
        logger.warning("attempt_failed request_id=%s attempt=%d reason=%s", ticket.request_id, ticket.attempt, error.reason)
        instructions = self.core.failed(ticket.request_id, ticket.attempt, error, self.clock())
        if not any(isinstance(item, Reject) and item.request_id == ticket.request_id for item in instructions):
            self.metrics.retries.labels(error.reason).inc()
        self._carry_out(instructions)

    def finished(self, ticket: Ticket, receipt: Receipt) -> None:
        """The ticket's request ended well."""
        self._carry_out(self.core.finished(ticket.request_id, ticket.attempt, receipt, self.clock()))

    def close(self, ticket: Ticket) -> None:
        """Frees whatever the request still holds; on every way out."""
        del self._tickets[ticket.request_id]
        self._quotas.end(ticket.tenant)
        self._carry_out(self.core.cancelled(ticket.request_id, self.clock()))

    def replica_seen(self, lease: Lease) -> None:
        """A lease came over a Watch stream."""
        self._carry_out(self.core.replica_seen(lease, self.clock()))
        self._tell_models_changed()

    def models_held(self, models: Sequence[ModelId], refused: Mapping[ModelId, str] = MappingProxyType({})) -> None:
        """The register's models: requests may wait for a replica of `models` to be started, and need not wait for those `refused`."""
        self.core.models_held(models, refused)
        self._tell_models_changed()

    def _tell_models_changed(self) -> None:
        """Wakes everybody who waits for a model now."""
        self._models_changed.set()
        self._models_changed = asyncio.Event()

    def replica_lost(self, replica_id: ReplicaId, incarnation: int) -> None:
        """A Watch stream broke or fell silent."""
        self._carry_out(self.core.replica_lost(replica_id, incarnation, self.clock()))

    def report(self, lease: Lease, incarnation: int, sequence: int, load: WorkerLoad | None, stamps: Sequence[Stamp]) -> None:
        """Load and stamps came over a Watch stream."""
        if not self.core.report(lease.replica_id, incarnation, sequence, load, stamps):
            self.metrics.dropped_reports.inc()

    def steps(self, lease: Lease, incarnation: int, samples: Sequence[StepSample]) -> None:
        """Measured steps came over a Watch stream."""
        if not self.core.steps(lease.replica_id, incarnation, samples, self.clock()):
            self.metrics.dropped_reports.inc()

    def cached(self, lease: Lease, incarnation: int, change: BlockChange) -> None:
        """Changes of a replica's own cache came over a Watch stream."""
        self._count_changes("engine", change)
        if not self.core.cached(lease.replica_id, incarnation, change):
            self.metrics.dropped_reports.inc()

    def stored(self, node: str, namespace: Namespace, change: BlockChange) -> None:
        """Changes of a node's store came over a Watch stream."""
        self._count_changes("store", change)
        self.core.stored(node, namespace, change)

    def store_lost(self, node: str) -> None:
        """A node's store is gone, or tells all that it holds anew."""
        self.core.store_lost(node)

    def stores_known(self, nodes: Collection[str]) -> None:
        """The nodes whose store services have a lease."""
        self.core.stores_known(nodes)

    def prefix_copied(self, copy: CopyPrefix, outcome: str, copied_blocks: int = 0) -> None:
        """A copy that the core asked for has ended; "copied": all its blocks are there."""
        self.metrics.prefix_copies.labels(outcome).inc()
        self.metrics.prefix_copied_blocks.inc(copied_blocks)
        self.core.copy_ended(copy, self.clock(), is_whole=outcome == "copied")

    def prefix_used(self, plan: Plan, receipt: Receipt, block_size_tokens: int) -> None:
        """A request ended as planned: how much of its prompt was believed to be cached, and was."""
        planned = (*plan.prefill, plan.decode)[0]
        if receipt.prefill_replica_id != planned.replica_id:
            return
        # An engine computes at least one token of each prompt, and so a whole block where all of them are there.
        believed_tokens = min(plan.cached_blocks, (receipt.prompt_tokens - 1) // block_size_tokens) * block_size_tokens
        self.metrics.believed_cached_tokens.inc(max(0, believed_tokens))
        self.metrics.cached_tokens.inc(receipt.cached_tokens)
        if receipt.cached_tokens < believed_tokens:
            self.metrics.missed_cached_tokens.inc(believed_tokens - receipt.cached_tokens)

    def _count_changes(self, tier: str, change: BlockChange) -> None:
        self.metrics.block_events.labels(tier, "stored").inc(len(change.stored) // SHORT_BYTES)
        self.metrics.block_events.labels(tier, "removed").inc(len(change.removed) // SHORT_BYTES)

    async def tick_forever(self) -> None:
        """Gives the core the time and refreshes gauges, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            is_idle = not (self.core.queued_requests or self.core.running_requests)
            pause_s = max(self.config.tick_s, _IDLE_TICK_S) if is_idle else self.config.tick_s
            due_s = loop.time() + pause_s
            await asyncio.sleep(pause_s)
            lag_s = max(0.0, loop.time() - due_s)
            self.metrics.loop_lag.observe(lag_s)
            try:
                self._carry_out(self.core.tick(self.clock()))
            except Exception:
                logger.exception("tick_failed")
                self.metrics.task_failures.labels("tick").inc()
            if lag_s < _OWN_STALL_S:  # else the messages of that time are still to be read
                self._end_silent()
            self._refresh_gauges()

    def _end_silent(self) -> None:
        """Breaks off streams that have begun and bring nothing any more: their workers are lost to them."""
        silence_s = self.config.stream_silence_s
        latest_s = self.clock() - silence_s
        for ticket in self._tickets.values():
            if ticket.is_silent_since(latest_s):
                ticket.abandon(ticket.attempt, UnavailableError(f"no token for {silence_s:g} s", reason=Reason.WORKER_LOST))

    def _refresh_gauges(self) -> None:
        self.metrics.queued_requests.set(self.queued_requests)
        self.metrics.running_requests.set(self.core.running_requests)
        self.metrics.indexed_blocks.set(len(self.core.prefixes))
        self.metrics.unowned_requests.set(count_unowned(self._tickets.values()))
        roles = [lease.role for lease in self.core.fleet.leases]
        for role in Role:
            self.metrics.replicas.labels(role).set(roles.count(role))
        self._name_stragglers()

    def _name_stragglers(self) -> None:
        """Logs who has become one since the last look, and who is none any more."""
        slowdowns = {one.replica_id: one.slowdown for one in self.core.predictor.pools.stragglers()}
        for replica_id in sorted(slowdowns.keys() - self._stragglers):
            logger.warning("straggler_named replica_id=%s slowdown=%.2f", replica_id, slowdowns[replica_id])
        for replica_id in sorted(self._stragglers - slowdowns.keys()):
            logger.info("straggler_cleared replica_id=%s", replica_id)
        self._stragglers = set(slowdowns)

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, CopyPrefix):
                self.on_copy(instruction)
                continue
            ticket = self._tickets.get(instruction.request_id)
            if ticket is None:
                continue
            match instruction:
                case Dispatch():
                    ticket.tell(instruction)
                case Reject():
                    ticket.tell(instruction.error)
                case Abandon():
                    ticket.abandon(instruction.attempt, instruction.error)
