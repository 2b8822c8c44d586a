"""Penalties of continuations under vLLM's V2 model runner (CUDA), with vLLM's own formulas, in fp32.

Seeds need nothing there: a token's draw follows from the run's seed and its position.
"""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.utils import apply_penalties
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from tandem.engine.takeover import Takeover, takeover_from


class ResumedPenalties(LogitsProcessor):
    """Rows of runs that carry a Takeover."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        super().__init__(vllm_config, req_states)
        self._states = req_states
        self._takeovers: dict[int, Takeover] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Takes slot `req_idx`, whoever had it."""
        takeover = takeover_from(sampling_params.extra_args)
        if takeover is None:
            self._takeovers.pop(req_idx, None)
            return False
        self._takeovers[req_idx] = takeover
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Changes its rows of `logits` (num_requests, vocabulary) in place; without speculation a row is a request."""
        if self._takeovers:
            for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
                takeover = self._takeovers.get(slot)
                if takeover is not None:
                    self._penalise(logits[row : row + 1], slot, takeover, int(ctx.seq_lens_upper_bound_np[row]))
        return logits

    def _penalise(self, logits: torch.Tensor, slot: int, takeover: Takeover, total_tokens: int) -> None:
        prompt_tokens = int(self._states.prompt_len.np[slot]) - takeover.resumed_tokens
        tokens = self._states.all_token_ids.gpu[slot, :total_tokens].long().unsqueeze(0)
        penalties = (takeover.presence_penalty, takeover.frequency_penalty, takeover.repetition_penalty)
        apply_penalties(
            logits,
            tokens[:, :prompt_tokens],
            tokens[:, prompt_tokens:],
            *(torch.tensor([penalty], dtype=torch.float32, device=logits.device) for penalty in penalties),
        )
