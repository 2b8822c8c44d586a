"""What a simulated request asks for, and what it is judged by. Must not simulate."""

from dataclasses import dataclass

from tandem.sim.engine_profile import EngineProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """TTFT <= ttft_base_s + ttft_stretch x the prompt's own prefill without any cache in an idle engine; TPOT <= tpot_s.

    The first is what each prompt could have anywhere with nobody before it, times 1.5, plus 0.25 s, which is most of a mean prompt's
    prefill: so it asks of every request what is possible for it, short or long, and the queue decides. The second is 20 tokens a second,
    faster than anybody reads.
    """

    ttft_base_s: float = 0.25
    ttft_stretch: float = 1.5
    tpot_s: float = 0.05

    def ttft_s(self, prompt_tokens: int, profile: EngineProfile) -> float:
        """Of a prompt of so many tokens."""
        return self.ttft_base_s + self.ttft_stretch * profile.prefill_s(prompt_tokens)
