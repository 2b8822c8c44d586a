"""The planner and what it reads, as the core builds them: to be filled by hand in tests."""

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

from router.backlog import Backlog
from router.config import RouterConfig
from router.fleet import Fleet
from router.interval import PredictionKind
from router.ledger import Ledger
from router.lines import Lines
from router.objectives import Objectives
from router.output_length import OutputLengths
from router.placement import Assignment, Placement
from router.planner import Planner
from router.policies import PolicyParameters
from router.predict import LoadPredictor
from router.prefix_index import PrefixIndex
from router.tracked import Tracked
from router.turns import Turns
from tandem.domain import BlockHash, Lease, ReplicaId, RequestId, Role, WorkerLoad
from tests.samples import make_lease, make_request

M = "m"
HASHES = tuple(BlockHash(bytes([number])) for number in range(6))  # of 192 tokens
HANDING_OFF = RouterConfig(one_worker_max_tokens=0)


class FixedShares:
    """Tenants in the order of their names, or as said. Counts nothing. `others_first`: this one's turn is another router's."""

    def __init__(self, *order: str, others_first: str = "") -> None:
        self._order = order
        self._others_first = others_first

    def activate(self, tenant: str) -> None:
        """The tenant waits."""

    def order(self, tenants: Iterable[str]) -> list[str]:
        """The named first, then the others by name."""
        return sorted(tenants, key=lambda tenant: (self._order.index(tenant) if tenant in self._order else len(self._order), tenant))

    def must_wait(self, tenant: str) -> bool:
        """Whether the others' turn is before its own."""
        return tenant == self._others_first

    def weight(self, tenant: str) -> float:
        """All alike, but for the one called "heavy"."""
        return 3.0 if tenant == "heavy" else 1.0


def make_tracked(
    request_id: str = "r1", prompt_tokens: int = 192, *, arrival: int = 1, arrived_s: float = 0.0, ttft_s: float = 10.0, **changes: Any
) -> Tracked:
    """A request that waits; `changes` are its request's."""
    return Tracked(
        request=make_request(request_id, prompt_tokens, **changes),
        block_hashes=HASHES[: prompt_tokens // 32],
        deadline_s=None,
        arrived_s=arrived_s,
        arrival=arrival,
        first_token_due_s=arrived_s + ttft_s,
    )


def distrust(predictor: LoadPredictor, model: str = M) -> None:
    """Its predictions of the model have been wrong for long enough."""
    for _ in range(60):
        predictor.scores.observe(PredictionKind.PREFILL, model, predicted=1.0, q90=1.5, actual=10.0, now_s=0.0)
    assert not predictor.scores.is_trusted(model)


class RouterParts:
    """A planner over replicas named by role: "prefill-0", "decode-1"."""

    def __init__(self, *replicas: str, config: RouterConfig = HANDING_OFF, seed: int = 7) -> None:
        self.config = config
        self.fleet = Fleet()
        self.ledger = Ledger(config.stamp_settle_s)
        self.backlog = Backlog()
        self.lines = Lines()
        self.prefixes = PrefixIndex(config.max_prefix_blocks)
        self.predictor = LoadPredictor()
        self.lengths = OutputLengths()
        self.objectives = Objectives()
        self.requests: dict[RequestId, Tracked] = {}
        self.planner = Planner(
            config,
            fleet=self.fleet,
            ledger=self.ledger,
            backlog=self.backlog,
            lines=self.lines,
            shares=FixedShares(),
            prefixes=self.prefixes,
            predictor=self.predictor,
            lengths=self.lengths,
            rng=Random(seed),
            parameters=PolicyParameters(),
            objectives=self.objectives,
        )
        for name in replicas:
            self.see(make_lease(name, Role(name.split("-")[0])))

    def turns(self, shares: FixedShares | None = None) -> Turns:
        """Whose turn it is, over these parts."""
        return Turns(
            self.config, self.fleet, self.planner, self.lines, shares or FixedShares(), self.requests, self.backlog, self.predictor
        )

    def see(self, lease: Lease) -> Lease:
        """A replica that is new, or has changed."""
        if self.fleet.get(lease.replica_id) is None:
            self.ledger.add_replica(lease.replica_id, lease.incarnation)
            self.backlog.add_replica(lease.replica_id)
        self.fleet.see(lease, 0.0)
        self.planner.note_load(lease.replica_id)
        return lease

    def lease(self, name: str) -> Lease:
        """The replica's."""
        lease = self.fleet.get(ReplicaId(name))
        assert lease is not None
        return lease

    def engine(self, name: str, **changes: Any) -> None:
        """The replica's engine is another."""
        lease = self.lease(name)
        self.see(replace(lease, engine=replace(lease.engine, **changes)))

    def report(self, name: str, **load: int) -> None:
        """The replica's totals, all routers' work."""
        assert self.ledger.report(ReplicaId(name), self.lease(name).incarnation, 1, WorkerLoad(**load))
        self.planner.note_load(ReplicaId(name))

    def give(self, name: str, work_s: float, *, key: str = "given", tokens: int = 1, now_s: float = 0.0) -> None:
        """A prompt was sent there."""
        self.backlog.start(ReplicaId(name), (RequestId(key), 1), work_s=work_s, tokens=tokens, now_s=now_s)
        self.planner.note_load(ReplicaId(name))

    def hold(self, name: str, blocks: int) -> None:
        """The replica has the first so many blocks of every sample request."""
        lease = self.lease(name)
        self.prefixes.record(HASHES[:blocks], (lease.replica_id, lease.incarnation))

    def assign(self, tracked: Tracked, now_s: float = 0.0) -> Assignment:
        """What the planner chooses; it must find somebody."""
        assignment = self.planner.try_assign(tracked, now_s)
        assert assignment is not None
        return assignment

    def place(self, tracked: Tracked, now_s: float = 0.0) -> Placement:
        """Assigned and placed at once; there must be room."""
        tracked.assignment = tracked.first_assignment = self.assign(tracked, now_s)
        placement = self.planner.try_place(tracked, tracked.assignment, now_s)
        assert placement is not None
        return placement
