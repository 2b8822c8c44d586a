"""What a core finds out about a disturbance, and when: stragglers that it names, trust that it loses and regains.

Must not disturb or decide: it reads the predictor.
"""

from dataclasses import dataclass

from router.predict import LoadPredictor
from tandem.domain import ModelId


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedStraggler:
    """A replica that was named for the first time, so long after the disturbance; below 0: before."""

    replica_id: str
    after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustChange:
    """Predictions are not trusted any more, or again. `after_requests` ended between the disturbance and that."""

    is_trusted: bool
    after_s: float
    after_requests: int


class Watch:
    """One run's. Without a disturbance all counts from the start."""

    def __init__(self, predictor: LoadPredictor, model: ModelId) -> None:
        self._predictor = predictor
        self._model = model
        self._since_s = 0.0
        self._ended_requests = 0
        self._is_trusted = True
        self._named: dict[str, float] = {}
        self._changes: list[tuple[bool, float, int]] = []

    @property
    def stragglers(self) -> tuple[NamedStraggler, ...]:
        """In the order in which they were named."""
        return tuple(NamedStraggler(replica_id=name, after_s=time_s - self._since_s) for name, time_s in self._named.items())

    @property
    def trust_changes(self) -> tuple[TrustChange, ...]:
        """In their order; those before the disturbance have `after_requests` 0."""
        return tuple(
            TrustChange(is_trusted=is_trusted, after_s=time_s - self._since_s, after_requests=requests)
            for is_trusted, time_s, requests in self._changes
        )

    def disturbed(self, now_s: float) -> None:
        """It begins now."""
        self._since_s = now_s
        self._ended_requests = 0
        self._changes = [(is_trusted, time_s, 0) for is_trusted, time_s, _ in self._changes]

    def ended(self, now_s: float) -> None:
        """A further request has ended."""
        self._ended_requests += 1
        is_trusted = self._predictor.scores.is_trusted(self._model)
        if is_trusted is not self._is_trusted:
            self._is_trusted = is_trusted
            self._changes.append((is_trusted, now_s, self._ended_requests))

    def look(self, now_s: float) -> None:
        """Who is named now; O(pools)."""
        for straggler in self._predictor.pools.stragglers():
            self._named.setdefault(straggler.replica_id, now_s)
