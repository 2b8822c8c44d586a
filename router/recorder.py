"""A core that has every event and its answer written to a file, so that `python -m router.replay` can have it decide again.

Must not decide or alter anything, nor write by itself.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random, SystemRandom
from typing import Protocol, TypeVar

from router.block_probe_library import load_probe
from router.config import RouterConfig
from router.core import RouterCore
from router.core_events import (
    AskedReplicas,
    AskedRetry,
    Cached,
    Cancelled,
    CopyEnded,
    CoreEvent,
    Failed,
    Finished,
    ModelsHeld,
    ReplicaLost,
    ReplicaSeen,
    Report,
    SharesHeard,
    Steps,
    Stored,
    StoreLost,
    StoresKnown,
    Submit,
    Tick,
    Tokens,
    error_facts,
    request_facts,
    short_blocks,
)
from router.event_log import LogHeader, encode_entry
from router.instructions import CopyPrefix, Instruction, ReplicaStatus
from router.tenants import RouterShares
from tandem import __version__
from tandem.domain import BlockHash, Lease, ModelId, Namespace, Receipt, ReplicaId, Request, RequestId, Stamp, WorkerLoad
from tandem.errors import TandemError
from tandem.fingerprint import code_fingerprint
from tandem.held_blocks import BlockChange
from tandem.step_sample import StepSample

_ANSWER = TypeVar("_ANSWER")


class Records(Protocol):
    """Where records go."""

    @property
    def is_open(self) -> bool:
        """Whether more are wanted."""

    def add(self, record: bytes, /) -> None:
        """The next one."""


def new_header(config: RouterConfig, *, weights: Mapping[str, float] | None = None, seed: int | None = None) -> LogHeader:
    """Of a log that begins now; with a seed that nobody can guess where none is given."""
    return LogHeader(
        version=__version__,
        code=code_fingerprint(),
        begun_unix_s=time.time(),
        seed=SystemRandom().getrandbits(63) if seed is None else seed,
        config=config,
        weights=dict(weights or {}),
    )


class RecordedCore(RouterCore):
    """The core of `header`, whose events go to `records`; the header is written by whoever made it."""

    def __init__(self, header: LogHeader, records: Records) -> None:
        super().__init__(header.config, Random(header.seed), weights=header.weights, bind_probe=load_probe())
        self._records = records

    def submit(
        self, request: Request, *, block_hashes: Sequence[BlockHash], deadline_s: float | None, now_s: float, is_begun: bool = False
    ) -> list[Instruction]:
        """Recorded."""
        event = Submit(request_facts(request), short_blocks(block_hashes), deadline_s, now_s, is_begun)
        act = partial(super().submit, request, block_hashes=block_hashes, deadline_s=deadline_s, now_s=now_s, is_begun=is_begun)
        return self._recorded(event, act)

    def tokens(self, request_id: RequestId, attempt: int, tokens: int, now_s: float) -> list[Instruction]:
        """Recorded."""
        return self._recorded(Tokens(request_id, attempt, tokens, now_s), partial(super().tokens, request_id, attempt, tokens, now_s))

    def finished(self, request_id: RequestId, attempt: int, receipt: Receipt, now_s: float) -> list[Instruction]:
        """Recorded."""
        return self._recorded(Finished(request_id, attempt, receipt, now_s), partial(super().finished, request_id, attempt, receipt, now_s))

    def failed(self, request_id: RequestId, attempt: int, error: TandemError, now_s: float) -> list[Instruction]:
        """Recorded."""
        event = Failed(request_id, attempt, error_facts(error), now_s)
        return self._recorded(event, partial(super().failed, request_id, attempt, error, now_s))

    def cancelled(self, request_id: RequestId, now_s: float) -> list[Instruction]:
        """Recorded."""
        return self._recorded(Cancelled(request_id, now_s), partial(super().cancelled, request_id, now_s))

    def models_held(self, models: Iterable[ModelId], refused: Mapping[ModelId, str]) -> None:
        """Recorded."""
        names = tuple(models)
        self._recorded(ModelsHeld(names, dict(refused)), partial(super().models_held, names, refused))

    def replica_seen(self, lease: Lease, now_s: float) -> list[Instruction]:
        """Recorded."""
        return self._recorded(ReplicaSeen(lease, now_s), partial(super().replica_seen, lease, now_s))

    def replica_lost(self, replica_id: ReplicaId, incarnation: int, now_s: float) -> list[Instruction]:
        """Recorded."""
        return self._recorded(ReplicaLost(replica_id, incarnation, now_s), partial(super().replica_lost, replica_id, incarnation, now_s))

    def report(self, replica_id: ReplicaId, incarnation: int, sequence: int, load: WorkerLoad | None, stamps: Sequence[Stamp]) -> bool:
        """Recorded."""
        event = Report(replica_id, incarnation, sequence, load, tuple(stamps))
        return self._recorded(event, partial(super().report, replica_id, incarnation, sequence, load, stamps))

    def steps(self, replica_id: ReplicaId, incarnation: int, samples: Sequence[StepSample], now_s: float) -> bool:
        """Recorded."""
        event = Steps(replica_id, incarnation, tuple(samples), now_s)
        return self._recorded(event, partial(super().steps, replica_id, incarnation, samples, now_s))

    def cached(self, replica_id: ReplicaId, incarnation: int, change: BlockChange) -> bool:
        """Recorded."""
        return self._recorded(Cached(replica_id, incarnation, change), partial(super().cached, replica_id, incarnation, change))

    def stored(self, node: str, namespace: Namespace, change: BlockChange) -> None:
        """Recorded."""
        self._recorded(Stored(node, namespace, change), partial(super().stored, node, namespace, change))

    def store_lost(self, node: str) -> None:
        """Recorded."""
        self._recorded(StoreLost(node), partial(super().store_lost, node))

    def stores_known(self, nodes: Collection[str]) -> None:
        """Recorded."""
        self._recorded(StoresKnown(tuple(nodes)), partial(super().stores_known, nodes))

    def copy_ended(self, copy: CopyPrefix, now_s: float, *, is_whole: bool) -> None:
        """Recorded."""
        self._recorded(
            CopyEnded(replace(copy, block_hashes=()), now_s, is_whole), partial(super().copy_ended, copy, now_s, is_whole=is_whole)
        )

    def shares_heard(self, others: Mapping[str, RouterShares]) -> None:
        """Recorded."""
        self._recorded(SharesHeard(dict(others)), partial(super().shares_heard, others))

    def tick(self, now_s: float) -> list[Instruction]:
        """Recorded."""
        return self._recorded(Tick(now_s), partial(super().tick, now_s))

    def retry_after_s(self, model: ModelId | None, now_s: float) -> float:
        """Recorded."""
        return self._recorded(AskedRetry(model, now_s), partial(super().retry_after_s, model, now_s))

    def replicas(self, now_s: float) -> list[ReplicaStatus]:
        """Recorded."""
        act = partial(super().replicas, now_s)
        return self._recorded(AskedReplicas(now_s), act, lambda found: [status.predicted_work_s for status in found])

    def _recorded(self, event: CoreEvent, act: Callable[[], _ANSWER], told: Callable[[_ANSWER], object] | None = None) -> _ANSWER:
        """What the core answers, or raises: that is written down too."""
        if not self._records.is_open:
            return act()
        try:
            answer = act()
        except Exception as error:
            self._records.add(encode_entry(event, error))
            raise
        self._records.add(encode_entry(event, answer if told is None else told(answer)))
        return answer
