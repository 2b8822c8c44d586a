"""The simulated engine's tokens: each follows from all tokens before it and a seed, so any worker continues any run alike.

Must not depend on the worker, the time or how the tokens before came about.
"""

from array import array
from collections.abc import Sequence, Set

import xxhash

_FRACTION_BITS = 53
_MULTIPLIER, _INCREMENT, _MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1  # Knuth's MMIX generator


class TokenDraws:
    """The draws of one run. `words` are the ordinary tokens to choose from, at least two more than can be `banned` at once."""

    def __init__(self, token_ids: Sequence[int], *, seed: int, words: Sequence[int], eos_token_id: int | None, eos_fraction: float) -> None:
        self._words = words
        self._eos_token_id = eos_token_id
        self._eos_below = int(eos_fraction * (1 << _FRACTION_BITS))
        self._digest = xxhash.xxh3_64(seed=seed & _MASK)
        self._digest.update(array("I", token_ids).tobytes())

    def draw(self, banned: Set[int] = frozenset()) -> int:
        """The next token, none of `banned`; what follows it follows from it too. About 1 us."""
        value = self._digest.intdigest()
        is_end = value >> (64 - _FRACTION_BITS) < self._eos_below
        if is_end and self._eos_token_id is not None and self._eos_token_id not in banned:
            token = self._eos_token_id
        else:
            token = self._words[value % len(self._words)]
            while token in banned:
                value = value * _MULTIPLIER + _INCREMENT & _MASK
                token = self._words[(value >> 11) % len(self._words)]
        self._digest.update(array("I", (token,)).tobytes())
        return token
