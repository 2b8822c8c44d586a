"""How fast a simulated engine is: seconds of a step from what it computes, bytes of a token, room for KV.

Must not know the router's predictor: the simulator's physics and the predictions share no coefficient.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """One model on one kind of GPU.

    step_s = prefill_base_s (decode_base_s where it computes no prompt) + prefill_token_s * u + prefill_pair_s * pairs
           + decode_request_s * B + decode_kv_token_s * K
    u: prompt tokens computed; pairs: sum of u * c + u^2 / 2 over prompts, c tokens being there already; B: requests that get a further
    token; K: tokens of KV that those attend to.
    """

    name: str
    prefill_base_s: float
    prefill_token_s: float
    prefill_pair_s: float
    decode_base_s: float
    decode_request_s: float
    decode_kv_token_s: float
    kv_room_tokens: int
    kv_bytes_per_token: int
    max_num_batched_tokens: int = 8192  # prompt and output tokens of one step; vLLM's default for a server on such a GPU
    max_num_seqs: int = 256

    def step_s(self, prefill_tokens: int, prefill_pairs: float, decode_requests: int, kv_tokens: int) -> float:
        """Seconds of one step."""
        base_s = self.prefill_base_s if prefill_tokens else self.decode_base_s
        prefill_s = self.prefill_token_s * prefill_tokens + self.prefill_pair_s * prefill_pairs
        return base_s + prefill_s + self.decode_request_s * decode_requests + self.decode_kv_token_s * kv_tokens

    def prefill_s(self, uncached_tokens: int, context_tokens: int = 0) -> float:
        """Seconds to compute a prompt alone in an idle engine, chunk by chunk, on top of `context_tokens` that are there. O(1)."""
        steps = -(-uncached_tokens // self.max_num_batched_tokens)
        return steps * self.prefill_base_s + self.compute_s(uncached_tokens, context_tokens)

    def compute_s(self, uncached_tokens: int, context_tokens: int) -> float:
        """The same without the fixed seconds of each step: what these tokens add to steps that run anyway."""
        pairs = uncached_tokens * context_tokens + 0.5 * uncached_tokens * uncached_tokens
        return self.prefill_token_s * uncached_tokens + self.prefill_pair_s * pairs

    def decode_s(self, steps: int, requests: int, kv_tokens: int) -> float:
        """Seconds of `steps` decode steps of a batch that holds `kv_tokens` in the first one and `requests` more in each next. O(1)."""
        first_s = self.decode_base_s + self.decode_request_s * requests + self.decode_kv_token_s * kv_tokens
        return steps * first_s + self.decode_kv_token_s * requests * steps * (steps - 1) / 2


# Measured with vLLM, TP1: fits of reference/algorithms.md, section 3b. n^2 there is one prompt's; pairs are n^2 / 2 here.
H200_LLAMA_8B_FP8 = EngineProfile(
    name="h200-llama-3.1-8b-fp8",
    prefill_base_s=16.50e-3,
    prefill_token_s=0.015183e-3,
    prefill_pair_s=2 * 4.21e-10,
    decode_base_s=4.716e-3,
    decode_request_s=0.03697e-3,
    decode_kv_token_s=2.983e-8,
    kv_room_tokens=945_029,
    kv_bytes_per_token=131_072,  # 32 layers x 8 KV heads x 128 x (K, V) x 2 bytes
)
