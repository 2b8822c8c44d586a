"""What a request may hope for: whether waiting is in vain, and when a refused caller should come back.

Must not queue or refuse: it raises, and the core refuses.
"""

from math import inf

from router.admission import Admission
from router.config import RouterConfig
from router.fleet import Fleet
from router.placement import Assignment
from router.predict import LoadPredictor
from router.tracked import Tracked
from tandem.domain import ModelId, RequestId
from tandem.errors import OverloadedError, Reason, UnavailableError

_SHORTEST_RETRY_S = 0.1


class Prospects:
    """Reads the core's fleet, queue and predictor."""

    def __init__(self, config: RouterConfig, fleet: Fleet, admission: Admission, predictor: LoadPredictor) -> None:
        self._config = config
        self._fleet = fleet
        self._admission = admission
        self._predictor = predictor

    def start_wait_s(self, model: ModelId) -> float:
        """How long a request may wait for the first replica of a model."""
        return self._config.cold_start_wait_s if self._fleet.is_held(model) else self._config.no_replica_wait_s

    def retry_after_s(self, model: ModelId | None, now_s: float) -> float:
        """When a caller refused now should come back: once the model's queue has passed, or its replica may have started.

        None: the model is not known.
        """
        if model is None:
            return _SHORTEST_RETRY_S
        if not self._fleet.is_ready(model):
            return self.start_wait_s(model)
        _, work_s = self._admission.queued_for(model)
        return max(_SHORTEST_RETRY_S, self._predictor.queue_s(model, ahead_s=work_s, replicas=self._fleet.ready_count(model), now_s=now_s))

    def in_vain(self, model: ModelId, now_s: float) -> list[tuple[RequestId, UnavailableError]]:
        """Who waits for a model that no replica comes for, or has waited for one too long, and what to tell them."""
        error, until_s = self._fleet.refusal(model), now_s
        unserved_s = self._fleet.unserved_s(model, now_s)
        if error is None:
            wait_s = self.start_wait_s(model)
            if self._fleet.is_ready(model):
                return []
            if unserved_s is None:  # it was forgotten: too many other models came since
                unserved_s = wait_s
            if unserved_s < wait_s:
                return []
            message = f"no replica of model {model!r} has been ready for {unserved_s:.1f} s"
            error = UnavailableError(message, reason=Reason.NO_REPLICA, retry_after_s=self._config.no_replica_wait_s)
            until_s = now_s - wait_s
        return [(request_id, error) for request_id in self._admission.waiting_since(model, until_s)]

    def check(self, tracked: Tracked, assignment: Assignment, now_s: float) -> None:
        """Raises OverloadedError where waiting is in vain: by what is expected, or by its upper quantile where predictions are not trusted.

        The quantile follows what happens, however wrong the means are; without it a queue that is too long would serve nobody in time.
        A sheddable request must be predicted to meet its TTFT objective (its own, or the default). Any request that would have met its
        deadline on an idle cluster, and is predicted not to have a token by then, is better tried again later. One that has nothing ahead
        of it is not refused: later would be no better, and without outcomes nothing could show that the prediction is wrong.
        """
        is_trusted = self._predictor.scores.is_trusted(tracked.request.model)
        ttft_s = assignment.ttft.mean_s if is_trusted else assignment.ttft.q90_s
        if assignment.ahead_s <= 0.0 and tracked.slots_ahead_s <= 0.0:
            return
        left_s = inf if tracked.deadline_s is None else tracked.deadline_s - now_s
        late_s = ttft_s - left_s if assignment.own_s < left_s else 0.0
        if tracked.request.sheddable:
            late_s = max(late_s, ttft_s - (tracked.first_token_due_s - now_s))
        if late_s > 0.0:
            raise OverloadedError(
                f"the first token is predicted in {ttft_s:.2f} s, which is {late_s:.2f} s too late",
                retry_after_s=max(_SHORTEST_RETRY_S, late_s),
                reason=Reason.PREDICTED_LATE,
            )
