"""Which replicas and models there are, by the leases their Watch streams brought.

Must not count work (`ledger.py`) or choose (`placement.py`).
"""

from collections.abc import Iterable

from tandem.domain import Lease, ModelId, ReplicaId, ReplicaState, Role
from tandem.errors import InvalidRequestError, NotFoundError, Reason, UnavailableError

MAX_KNOWN_MODELS = 256


class Fleet:
    """Leases of reachable replicas; the last lease of each model is kept so that a model without replicas is not "unknown"."""

    def __init__(self) -> None:
        self._leases: dict[ReplicaId, Lease] = {}
        self._models: dict[ModelId, Lease] = {}
        self._unserved_since_s: dict[ModelId, float] = {}
        self._held: frozenset[ModelId] = frozenset()

    def hold(self, models: Iterable[ModelId]) -> None:
        """Models whose requests may wait for a replica to be started; the register names them all each time."""
        self._held = frozenset(models)

    def is_held(self, model: ModelId) -> bool:
        """Whether somebody will start a replica of the model."""
        return model in self._held

    def awaited(self, model: str) -> ModelId | None:
        """The model that `model` ("": the only one) names where it is held and no replica of it has been seen yet, else None."""
        named = [name for name in self._held if not model or name == model]
        if len(named) != 1 or named[0] in self._models or (not model and self._models):
            return None
        return named[0]

    @property
    def leases(self) -> tuple[Lease, ...]:
        """Reachable replicas by id."""
        return tuple(self._leases[replica_id] for replica_id in sorted(self._leases))

    @property
    def models(self) -> tuple[ModelId, ...]:
        """Models that are or were served, or are to be, by name."""
        return tuple(sorted({*self._models, *self._held}))

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

    def ready(self, model: ModelId, role: Role) -> list[Lease]:
        """Replicas that take new requests, by id."""
        return [lease for lease in self.leases if lease.model == model and lease.role is role and lease.state is ReplicaState.READY]

    def last_lease(self, model: ModelId) -> Lease | None:
        """The lease of any replica of the model, the last one seen; None where none was."""
        return self._models.get(model)

    def unserved_s(self, model: ModelId, now_s: float) -> float | None:
        """Seconds for which no replica of the model has been ready; None where one is."""
        since_s = self._unserved_since_s.get(model)
        return None if since_s is None else now_s - since_s

    def lease_for(self, model: str) -> Lease:
        """A lease that says how to read requests for `model` ("": the only one).

        Raises UnavailableError where no model is known at all, NotFoundError or InvalidRequestError naming the models.
        """
        if not self._models and not self._held:
            raise UnavailableError("no worker has reported to this router yet", reason=Reason.NO_REPLICA, retry_after_s=1.0)
        names = ", ".join(self.models)
        if model:
            lease = self._models.get(ModelId(model))
            if lease is None and ModelId(model) in self._held:
                raise UnavailableError(f"no replica of model {model!r} has started yet", reason=Reason.NO_REPLICA, retry_after_s=1.0)
            if lease is None:
                raise NotFoundError(f"model {model!r} is not served; served are: {names}", reason=Reason.UNKNOWN_MODEL, field="model")
            return lease
        if len(self.models) > 1:
            raise InvalidRequestError("model", f"must name one of: {names}")
        if not self._models:
            raise UnavailableError(f"no replica of model {names!r} has started yet", reason=Reason.NO_REPLICA, retry_after_s=1.0)
        return next(iter(self._models.values()))

    def _note_served(self, now_s: float) -> None:
        served = {lease.model for lease in self._leases.values() if lease.state is ReplicaState.READY}
        for model in self._models:
            if model in served:
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
