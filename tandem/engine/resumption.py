"""What every engine asks of a run that goes on from output of another one. Must not import an engine."""

from tandem.engine.base import EngineRequest
from tandem.errors import InvalidRequestError


def check_resumed(request: EngineRequest, eos_token_id: int | None) -> None:
    """Raises InvalidRequestError where the resumed tokens hold an end: what comes after it, no run would have drawn. O(resumed)."""
    resumed = request.token_ids[len(request.token_ids) - request.resumed_tokens :]
    ends = set(request.sampling.stop_token_ids)
    if eos_token_id is not None and not request.sampling.ignore_eos:
        ends.add(eos_token_id)
    if not ends.isdisjoint(resumed):
        raise InvalidRequestError("resume_token_ids", "hold a token that ends the output")
