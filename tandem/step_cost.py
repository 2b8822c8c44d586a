"""Seconds of engine work in closed form, from the five coefficients of one engine step.

Must not learn or remember: `steptime.py` finds the coefficients. One call is below 1 us and allocates nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """step_s = base + token * u + pair * sum(u * c + u^2 / 2) + request * n_dec + kv_token * K (algorithms.md, 3b); all >= 0.

    u: prompt tokens computed in the step, c: tokens present before them, n_dec: requests that decode, K: tokens of KV they attend to.
    """

    base_s: float
    token_s: float
    pair_s: float
    request_s: float
    kv_token_s: float

    def step_s(self, prefill_tokens: float, prefill_pairs: float, decode_requests: float, kv_tokens: float) -> float:
        """Seconds of one step."""
        return (
            self.base_s
            + self.token_s * prefill_tokens
            + self.pair_s * prefill_pairs
            + self.request_s * decode_requests
            + self.kv_token_s * kv_tokens
        )

    def decode_s(self, requests: float, kv_tokens: float) -> float:
        """Seconds of a step that only decodes: the TPOT of such a batch."""
        return self.base_s + self.request_s * requests + self.kv_token_s * kv_tokens

    def finish_s(
        self,
        own_tokens: float,
        own_pairs: float,
        chunk_tokens: int,
        pending_tokens: float = 0,
        pending_pairs: float = 0,
        requests: float = 0,
        kv_tokens: float = 0,
        elapsed_s: float | None = None,
    ) -> float:
        """Seconds until a prompt that comes now is computed, behind the pending ones: the rest of the step that runs, then chunks.

        The running step holds the first chunk of what is pending, or decodes only. Of it `elapsed_s` have passed, or half where unknown.
        Own tokens fill up the last pending chunk. With no own tokens: the backlog, until a new prompt has its turn.
        """
        budget = max(1.0, chunk_tokens - requests)
        running = min(max(0.0, pending_tokens), budget)
        decode_s = self.base_s + self.request_s * requests + self.kv_token_s * kv_tokens
        rest_s = 0.0
        if running > 0.0 or requests > 0:
            step_s = decode_s + self.token_s * running
            rest_s = step_s / 2 if elapsed_s is None else step_s - min(max(0.0, elapsed_s), step_s)
        later = max(0.0, pending_tokens) - running + own_tokens
        return rest_s + -(-later // budget) * decode_s + self.token_s * later + self.pair_s * (pending_pairs + own_pairs)

    def tpot_s(
        self,
        requests: float,
        kv_tokens: float,
        *,
        output_tokens: float = 1,
        pending_tokens: float = 0,
        pending_pairs: float = 0,
        chunk_tokens: int = 1,
    ) -> float:
        """Mean seconds per output token over the next `output_tokens` in a batch, while pending prompts are computed in between.

        As many chunks as there are steps make them longer; what is left over makes none longer.
        """
        step_s = self.decode_s(requests, kv_tokens)
        if pending_tokens <= 0:
            return step_s
        steps = max(1.0, output_tokens)
        share = min(1.0, steps * max(1.0, chunk_tokens - requests) / pending_tokens)
        return step_s + share * (self.token_s * pending_tokens + self.pair_s * pending_pairs) / steps

    def scaled(self, factor: float) -> "StepCost":
        """The same shape, slower by `factor`."""
        return StepCost(
            base_s=self.base_s * factor,
            token_s=self.token_s * factor,
            pair_s=self.pair_s * factor,
            request_s=self.request_s * factor,
            kv_token_s=self.kv_token_s * factor,
        )


def attention_pairs(uncached_tokens: int, cached_tokens: int) -> float:
    """Pairs of a token to be computed and one it attends to: u * c + u^2 / 2."""
    return uncached_tokens * (cached_tokens + uncached_tokens / 2)
