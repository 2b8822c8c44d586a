"""What a request will cost in seconds: step times per model, and the wait in the router's queue.

Must not know single requests or replicas. All models learn from receipts of this router's own requests.
"""

from tandem.domain import ModelId
from tandem.steptime import DecodeTime, PrefillTime

_REQUEST_PRIOR_S = 1.0
_REQUEST_WEIGHT = 0.05  # about the last 20 requests
_SHORTEST_RETRY_S = 0.1


class Predictor:
    """One pair of step times per model; models are few and never forgotten, the fleet bounds them."""

    def __init__(self) -> None:
        self._prefill: dict[ModelId, PrefillTime] = {}
        self._decode: dict[ModelId, DecodeTime] = {}
        self._request_s = _REQUEST_PRIOR_S

    def backlog_s(self, model: ModelId, pending_tokens: int) -> float:
        """Seconds of prefill work ahead of a new request."""
        return self._prefill_of(model).backlog_s(pending_tokens)

    def prefill_s(self, model: ModelId, *, uncached_tokens: int, context_tokens: int) -> float:
        """Seconds to compute the uncached tokens of a prompt of `context_tokens`, once it is its turn."""
        return self._prefill_of(model).predict_s(uncached_tokens, context_tokens)

    def tpot_s(self, model: ModelId, *, batch_requests: int, kv_tokens: int) -> float:
        """Seconds per output token in such a batch."""
        return self._decode_of(model).predict_s(batch_requests, kv_tokens)

    def wait_s(self, ahead_requests: int, max_running_requests: int) -> float:
        """Seconds in the router's queue behind `ahead_requests`: slots come free at max_running / mean request seconds (Little's law)."""
        return ahead_requests * self._request_s / max_running_requests

    def retry_after_s(self, queued_requests: int, max_running_requests: int) -> float:
        """When a refused caller should come back: once the present queue has passed, and not at once."""
        return max(_SHORTEST_RETRY_S, self.wait_s(queued_requests, max_running_requests))

    def observe_prefill(self, model: ModelId, *, uncached_tokens: int, context_tokens: int, ahead_tokens: int, measured_s: float) -> None:
        """Learns from a prompt that took `measured_s` at its worker, the wait behind `ahead_tokens` included."""
        self._prefill_of(model).observe(uncached_tokens, context_tokens, ahead_tokens, measured_s)

    def observe_decode(self, model: ModelId, *, batch_requests: int, kv_tokens: int, measured_s: float) -> None:
        """Learns from a request's mean seconds per step."""
        self._decode_of(model).observe(batch_requests, kv_tokens, measured_s)

    def observe_request(self, measured_s: float) -> None:
        """Learns how long a request holds its slot, dispatch to end."""
        self._request_s += _REQUEST_WEIGHT * (measured_s - self._request_s)

    def _prefill_of(self, model: ModelId) -> PrefillTime:
        return self._prefill.setdefault(model, PrefillTime())

    def _decode_of(self, model: ModelId) -> DecodeTime:
        return self._decode.setdefault(model, DecodeTime())
