"""Which replicas and models there are, by the leases their Watch streams brought.

Must not count work (`ledger.py`) or choose (`placement.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from tandem.domain import Lease, ModelId, ReplicaId, ReplicaState, Role
from tandem.errors import InvalidRequestError, NotFoundError, Reason, UnavailableError

MAX_KNOWN_MODELS = 256
_NONE_REFUSED: Mapping[ModelId, str] = MappingProxyType({})
_REFUSED_RETRY_S = 5.0  # somebody has to act first: a setting, a target set by hand


class Fleet:
    """Leases of reachable replicas; the last lease of each model is kept so that a model without replicas is not "unknown"."""

    def __init__(self) -> None:
        self._leases: dict[ReplicaId, Lease] = {}
        self._sorted: tuple[Lease, ...] = ()
        self._ready: dict[tuple[ModelId, Role], list[Lease]] = {}
        self._models: dict[ModelId, Lease] = {}
        self._unserved_since_s: dict[ModelId, float] = {}
        self._held: frozenset[ModelId] = frozenset()
        self._refused = _NONE_REFUSED

    def hold(self, models: Iterable[ModelId], refused: Mapping[ModelId, str] = _NONE_REFUSED) -> None:
        """Models whose requests may wait for a replica to be started; the register names them all each time.

        `refused`: those, and others, that no replica will come for now, and why.
        """
        self._held = frozenset(models)
        self._refused = dict(refused)

    def is_held(self, model: ModelId) -> bool:
        """Whether somebody will start a replica of the model."""
        return model in self._held

    def awaited(self, model: str) -> ModelId | None:
        """The model that `model` ("": the only one) names where it is held and no replica of it has been seen yet, else None."""
        named = self.named(model)
        return None if named in self._models or named in self._refused else named

    def named(self, model: str) -> ModelId | None:
        """The model that `model` ("": the only one) names; None where it is none or could be several."""
        named = [name for name in self.models if not model or name == model]
        return named[0] if len(named) == 1 else None

    def refusal(self, model: ModelId) -> UnavailableError | None:
        """Why a request for the model need not wait: no replica is ready, and none will come. None where it may wait or be served."""
        words = self._refused.get(model)
        if words is None or self.is_ready(model):
            return None
        return UnavailableError(
            f"no replica of model {model!r} is ready: {words}", reason=Reason.NO_REPLICA, retry_after_s=_REFUSED_RETRY_S
        )

    @property
    def leases(self) -> tuple[Lease, ...]:
        """Reachable replicas by id."""
        return self._sorted

    @property
    def models(self) -> tuple[ModelId, ...]:
        """Models that are or were served, or are to be, by name; those that the register names among them."""
        return tuple(sorted({*self._models, *self._held, *self._refused}))

    def get(self, replica_id: ReplicaId) -> Lease | None:
        """The replica's lease; None where it is not reachable."""
        return self._leases.get(replica_id)

    def is_stale(self, lease: Lease) -> bool:
        """Whether a newer incarnation of the replica is known."""
        known = self._leases.get(lease.replica_id)
        return known is not None and lease.incarnation < known.incarnation

    def see(self, lease: Lease, now_s: float) -> None:
        """Takes a lease in place of the replica's last one."""
        self._leases[lease.replica_id] = lease
        self._models.pop(lease.model, None)
        self._models[lease.model] = lease
        self._forget_models()
        self._note_served(now_s)

    def lose(self, replica_id: ReplicaId, incarnation: int, now_s: float) -> Lease | None:
        """Drops the replica and answers its lease; None where it is not known in this incarnation."""
        lease = self._leases.get(replica_id)
        if lease is None or lease.incarnation != incarnation:
            return None
        del self._leases[replica_id]
        self._note_served(now_s)
        return lease

    def ready(self, model: ModelId, role: Role) -> Sequence[Lease]:
        """Replicas that take new requests, by id."""
        return self._ready.get((model, role), ())

    def ready_count(self, model: ModelId) -> int:
        """Replicas of the model, of either role, that take new requests."""
        return sum(len(self._ready.get((model, role), ())) for role in Role)

    def is_ready(self, model: ModelId) -> bool:
        """Whether a replica of the model, of either role, takes new requests."""
        return any((model, role) in self._ready for role in Role)

    def last_lease(self, model: ModelId) -> Lease | None:
        """The lease of any replica of the model, the last one seen; None where none was."""
        return self._models.get(model)

    def is_known(self, lease: Lease) -> bool:
        """Whether that incarnation is reachable still."""
        known = self._leases.get(lease.replica_id)
        return known is not None and known.incarnation == lease.incarnation

    def is_taking(self, lease: Lease) -> bool:
        """Whether that incarnation takes new requests still."""
        known = self._leases.get(lease.replica_id)
        return known is not None and known.incarnation == lease.incarnation and known.state is ReplicaState.READY

    def unserved_s(self, model: ModelId, now_s: float) -> float | None:
        """Seconds for which no replica of the model has been ready; None where one is."""
        since_s = self._unserved_since_s.get(model)
        return None if since_s is None else now_s - since_s

    def lease_for(self, model: str) -> Lease:
        """A lease that says how to read requests for `model` ("": the only one).

        Raises UnavailableError where no model is known at all or no replica will come, NotFoundError or InvalidRequestError naming
        the models.
        """
        models = self.models
        if not models:
            raise UnavailableError("no worker has reported to this router yet", reason=Reason.NO_REPLICA, retry_after_s=1.0)
        names = ", ".join(models)
        if not model and len(models) > 1:
            raise InvalidRequestError("model", f"must name one of: {names}")
        named = ModelId(model) if model else models[0]
        if named not in models:
            raise NotFoundError(f"model {model!r} is not served; served are: {names}", reason=Reason.UNKNOWN_MODEL, field="model")
        refusal = self.refusal(named)
        if refusal is not None:
            raise refusal
        lease = self._models.get(named)
        if lease is None:
            raise UnavailableError(f"no replica of model {named!r} has started yet", reason=Reason.NO_REPLICA, retry_after_s=1.0)
        return lease

    def _note_served(self, now_s: float) -> None:
        """After every change of the leases; O(replicas log replicas)."""
        self._sorted = tuple(self._leases[replica_id] for replica_id in sorted(self._leases))
        self._ready = {}
        for lease in self._sorted:
            if lease.state is ReplicaState.READY:
                self._ready.setdefault((lease.model, lease.role), []).append(lease)
        for model in self._models:
            if self.is_ready(model):
                self._unserved_since_s.pop(model, None)
            else:
                self._unserved_since_s.setdefault(model, now_s)

    def _forget_models(self) -> None:
        """Keeps the bound by dropping the model seen longest ago that has no replica."""
        if len(self._models) <= MAX_KNOWN_MODELS:
            return
        in_use = {lease.model for lease in self._leases.values()}
        idle = next((model for model in self._models if model not in in_use), None)
        if idle is not None:
            del self._models[idle]
            self._unserved_since_s.pop(idle, None)
