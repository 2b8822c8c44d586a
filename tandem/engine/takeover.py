"""What vLLM's sampler leaves to ours for one run, so that a continuation draws the tokens of the undisturbed run.

Lives in the engine's process: a run comes in with vLLM's settings and leaves the scheduler with neutral ones and a Takeover.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm.sampling_params import SamplingParams, SamplingType

RESUMED_TOKENS = "tandem_resumed_tokens"  # in a run's extra arguments: how many of its last prompt tokens are output so far
_TAKEOVER = "tandem_takeover"


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """Settings that vLLM's own sampler is not given. With a `seed` ours draws the token too, else what follows it is not used."""

    resumed_tokens: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty is on."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


def resumed_tokens(params: SamplingParams | None) -> int:
    """How many of the run's last prompt tokens are output of another worker or an earlier run."""
    return 0 if params is None else int((params.extra_args or {}).get(RESUMED_TOKENS, 0))


def take_over(params: SamplingParams, *, owns_draws: bool) -> SamplingParams:
    """The settings to run with: `params` itself where vLLM's sampler is exact, else neutral ones with a Takeover.

    vLLM counts resumed tokens as prompt: presence and frequency penalties miss them, the repetition penalty does not. `owns_draws`: its
    seeded draws depend on how many it made in this run, so ours makes them in all seeded runs.
    """
    resumed = resumed_tokens(params)
    draws = owns_draws and params.sampling_type is SamplingType.RANDOM_SEED
    if not (draws or (resumed and (params.presence_penalty or params.frequency_penalty))):
        return params
    takeover = Takeover(
        resumed_tokens=resumed,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed if draws else None,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
    )
    neutral = copy.copy(params)
    neutral.extra_args = {**(params.extra_args or {}), _TAKEOVER: asdict(takeover)}
    neutral.presence_penalty, neutral.frequency_penalty, neutral.repetition_penalty = 0.0, 0.0, 1.0
    if draws:  # one token is left to choose from
        neutral.seed, neutral.temperature, neutral.top_p, neutral.top_k, neutral.min_p = None, 0.0, 1.0, 0, 0.0
    return neutral


def takeover_from(extra_args: Mapping[str, Any] | None) -> Takeover | None:
    """The takeover in a run's extra arguments."""
    settings = (extra_args or {}).get(_TAKEOVER)
    return None if settings is None else Takeover(**settings)
