"""How long a step of the simulated engine takes, and what its machine holds: a profile of coefficients.

Must not be read by whoever predicts step times: routers learn from samples, as they do of a real engine.
"""

import math
from dataclasses import dataclass
from random import Random

from tandem.errors import ConfigError

_SHORTEST_STEP_S = 1e-5
_COEFFICIENTS = ("base_s", "prefill_token_s", "prefill_pair_s", "decode_request_s", "kv_token_s")
MIN_BLOCK_BYTES = 32  # a block's bytes are made of its hash


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one step computes, counted as in `StepSample`."""

    prefill_tokens: int
    prefill_pairs: int
    decode_requests: int
    kv_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """A machine and a model on it. The defaults are near the bundled model in vLLM on one idle CPU core.

    There 1,000 prompt tokens take 69 ms and a step of 1, 16 and 32 requests 1.4, 2.7 and 4.1 ms (reference/vllm.md, section 8).
    """

    base_s: float = 1.4e-3
    prefill_token_s: float = 6e-5
    prefill_pair_s: float = 1.5e-8
    decode_request_s: float = 9e-5
    kv_token_s: float = 1e-8
    noise_fraction: float = 0.0  # standard deviation of the logarithm of a step's time
    slowdown: float = 1.0  # multiplies every step's time
    kv_blocks: int = 2048  # of block_size_tokens; 65,536 tokens, as the bundled model has in 128 MiB
    block_bytes: int = 4096  # that a block takes in the store; the bundled model's take 131,072
    eos_fraction: float = 1 / 512  # of output tokens that are the end of the sequence

    def validate(self, where: str = "") -> None:
        """Raises ConfigError naming the key."""
        for key in (*_COEFFICIENTS, "noise_fraction"):
            if not 0.0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"{where}{key} must be a number and not negative, got {getattr(self, key)}")
        if not 0.0 < self.slowdown < math.inf:
            raise ConfigError(f"{where}slowdown must be above 0, got {self.slowdown}")
        if not 0.0 <= self.eos_fraction <= 1.0:
            raise ConfigError(f"{where}eos_fraction must be from 0 to 1, got {self.eos_fraction}")
        if self.kv_blocks < 1:
            raise ConfigError(f"{where}kv_blocks must be at least 1, got {self.kv_blocks}")
        if not MIN_BLOCK_BYTES <= self.block_bytes <= 1 << 24 or self.block_bytes % MIN_BLOCK_BYTES:
            raise ConfigError(f"{where}block_bytes must be a multiple of {MIN_BLOCK_BYTES} up to 16 MiB, got {self.block_bytes}")

    def step_s(self, work: StepWork, rng: Random) -> float:
        """Seconds of a step: linear in its work, times the slowdown and the noise."""
        seconds = (
            self.base_s
            + self.prefill_token_s * work.prefill_tokens
            + self.prefill_pair_s * work.prefill_pairs
            + self.decode_request_s * work.decode_requests
            + self.kv_token_s * work.kv_tokens
        )
        noise = math.exp(rng.gauss(0.0, self.noise_fraction)) if self.noise_fraction else 1.0
        return max(_SHORTEST_STEP_S, self.slowdown * noise * seconds)
