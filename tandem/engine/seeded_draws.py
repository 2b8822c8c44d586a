"""The random generator of one seeded run, as vLLM's sampler uses it: where it stands at any output position.

Must not draw tokens.
"""

import torch

_DRAW_SEEDS = 2**31  # each draw on CPU takes one integer below this (vLLM's TopKTopPSampler.forward_cpu)


class SeededDraws:
    """A generator that has made as many draws as there are output tokens before the next one, wherever the run started."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._draws = 0  # that it has made

    def generator_at(self, position: int, vocabulary_tokens: int) -> torch.Generator:
        """For the draw at `position`, which the caller makes. 10 us per 1,000 positions that are skipped on CPU.

        A chunk of a prompt draws a token that is thrown away, and tokens may be taken back: then it starts anew from the seed.
        """
        if self._draws > position:
            self._generator.manual_seed(self._seed)
            self._draws = 0
        self._skip(position - self._draws, vocabulary_tokens)
        self._draws = position + 1
        return self._generator

    def _skip(self, draws: int, vocabulary_tokens: int) -> None:
        device = self._generator.device
        if device.type == "cpu":
            torch.randint(0, _DRAW_SEEDS, (draws,), generator=self._generator, dtype=torch.int64)
            return
        noise = torch.empty(vocabulary_tokens, dtype=torch.float32, device=device)
        for _ in range(draws):
            noise.exponential_(generator=self._generator)
