"""All lines of a router: one for each worker that somebody waits for, and one for each model whose requests have no worker to wait for.

Must not choose workers or dispatch.
"""

from collections.abc import Iterable, Iterator, Mapping

from router.line import Line, Waiting
from tandem.domain import ModelId, ReplicaId, RequestId


class Lines(Mapping[ReplicaId, Line]):
    """By worker; workers that nobody waits for have none."""

    def __init__(self) -> None:
        self._lines: dict[ReplicaId, Line] = {}
        self._homeless: dict[ModelId, Line] = {}
        self._places: dict[RequestId, tuple[ModelId, ReplicaId | None]] = {}

    def __getitem__(self, replica_id: ReplicaId) -> Line:
        return self._lines[replica_id]

    def __iter__(self) -> Iterator[ReplicaId]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def by_worker(self) -> Mapping[ReplicaId, Line]:
        """The same, to read: quicker to ask for workers that nobody waits for."""
        return self._lines

    @property
    def requests(self) -> Iterable[RequestId]:
        """Everybody who waits."""
        return self._places.keys()

    def homeless(self, model: ModelId) -> tuple[RequestId, ...]:
        """Who waits for the model without a worker."""
        line = self._homeless.get(model)
        return () if line is None else tuple(waiting.request_id for waiting in line)

    @property
    def homeless_models(self) -> tuple[ModelId, ...]:
        """Models of those, by name."""
        return tuple(sorted(self._homeless))

    def add(self, waiting: Waiting, model: ModelId, replica_id: ReplicaId | None) -> None:
        """Takes one that waits nowhere."""
        assert waiting.request_id not in self._places, f"{waiting.request_id} waits twice"
        self._places[waiting.request_id] = (model, replica_id)
        line = self._homeless.setdefault(model, Line()) if replica_id is None else self._lines.setdefault(replica_id, Line())
        line.add(waiting)

    def discard(self, request_id: RequestId) -> None:
        """It waits no more; nothing where it does not wait."""
        place = self._places.pop(request_id, None)
        if place is None:
            return
        model, replica_id = place
        if replica_id is None:
            self._homeless[model].remove(request_id)
            if not self._homeless[model]:
                del self._homeless[model]
            return
        self._lines[replica_id].remove(request_id)
        if not self._lines[replica_id]:
            del self._lines[replica_id]

    def check_invariants(self) -> None:
        """Raises AssertionError where somebody waits twice or nowhere, or an empty line is left."""
        placed: list[RequestId] = []
        for line in (*self._lines.values(), *self._homeless.values()):
            line.check_invariants()
            assert line, "an empty line is left"
            placed += [waiting.request_id for waiting in line]
        assert sorted(placed) == sorted(self._places), "some wait twice or nowhere"
