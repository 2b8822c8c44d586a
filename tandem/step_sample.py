"""One engine step as it was measured: what it computed and how long it took. Engines make them, `steptime.py` learns from them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """The work of one step. A request of which it computed u prompt tokens on top of c that were there adds u and u * c + u**2 / 2."""

    prefill_tokens: int  # prompt tokens computed
    prefill_pairs: int  # pairs of such a token and one that it attends to
    decode_requests: int  # requests that got a further token
    kv_tokens: int  # tokens of KV that those requests attended to
    duration_s: float
