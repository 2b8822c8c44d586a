"""Penalties and seeded draws of runs that vLLM's sampler would get wrong across a seam, with vLLM's own functions, in fp32.

A logits processor of the V1 model runner: it runs after min_tokens and logit_bias, where the engine applies penalties. Rows that it does
not own are not touched, and without such rows a step costs nothing.
"""

from collections.abc import Sequence

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.model_executor.layers.utils import apply_penalties
from vllm.utils.torch_utils import make_tensor_with_pad
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from tandem.engine.seeded_draws import SeededDraws
from tandem.engine.takeover import Takeover, takeover_from


class SeamSampler(LogitsProcessor):
    """Rows of runs that carry a Takeover."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._sampler = TopKTopPSampler()
        self._rows: dict[int, _Row] = {}
        self._penalties: _Penalties | None = None
        self._draws: _Draws | None = None

    def is_argmax_invariant(self) -> bool:
        """Penalties change the most likely token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests in and out of the batch, and within it."""
        if process_dict_updates(self._rows, batch_update, self._new_row):
            penalised = {index: row for index, row in self._rows.items() if row.takeover.has_penalties}
            drawn = {index: row for index, row in self._rows.items() if row.draws is not None}
            self._penalties = _Penalties(penalised, self._device) if penalised else None
            self._draws = _Draws(drawn, self._sampler, self._device) if drawn else None

    def _new_row(self, params: SamplingParams, prompt_token_ids: list[int] | None, output_token_ids: list[int]) -> "_Row | None":
        takeover = takeover_from(params.extra_args)
        return None if takeover is None else _Row(takeover, prompt_token_ids or [], output_token_ids, self._device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Changes its rows of `logits` (num_requests, vocabulary) in place. A drawn token is the only one that its row leaves."""
        if self._penalties is not None:
            self._penalties.apply(logits)
        if self._draws is not None:
            self._draws.apply(logits)
        return logits


def install_sampler(config: VllmConfig) -> None:
    """Has the engine load the processor that its model runner takes."""
    if config.use_v2_model_runner:
        from tandem.engine.gpu_penalties import ResumedPenalties  # its module needs what only this runner has

        config.model_config.logits_processors = [ResumedPenalties]
    else:
        config.model_config.logits_processors = [SeamSampler]


class _Row:
    """One run. `_output_token_ids` is the engine's own list, which grows."""

    def __init__(self, takeover: Takeover, prompt_token_ids: list[int], output_token_ids: list[int], device: torch.device) -> None:
        prompt_tokens = len(prompt_token_ids) - takeover.resumed_tokens
        self.takeover = takeover
        self.prompt = prompt_token_ids[:prompt_tokens]
        self.draws = None if takeover.seed is None else SeededDraws(takeover.seed, device)
        self._resumed = prompt_token_ids[prompt_tokens:]
        self._output_token_ids = output_token_ids

    @property
    def output(self) -> list[int]:
        """Output tokens so far, resumed ones included."""
        return self._resumed + self._output_token_ids

    @property
    def position(self) -> int:
        """How many those are."""
        return len(self._resumed) + len(self._output_token_ids)


class _Penalties:
    """The penalties of some rows of the batch, as it is now."""

    def __init__(self, rows: dict[int, _Row], device: torch.device) -> None:
        takeovers = [row.takeover for row in rows.values()]
        self._rows = list(rows.values())
        self._indices = torch.tensor(list(rows), device=device)
        self._prompts: torch.Tensor | None = None
        self._penalties = (
            _floats([takeover.presence_penalty for takeover in takeovers], device),
            _floats([takeover.frequency_penalty for takeover in takeovers], device),
            _floats([takeover.repetition_penalty for takeover in takeovers], device),
        )

    def apply(self, logits: torch.Tensor) -> None:
        vocabulary_tokens = logits.shape[1]
        if self._prompts is None:
            self._prompts = self._padded([row.prompt for row in self._rows], vocabulary_tokens)
        outputs = self._padded([row.output for row in self._rows], vocabulary_tokens)
        logits[self._indices] = apply_penalties(logits[self._indices], self._prompts, outputs, *self._penalties)

    def _padded(self, token_ids: list[list[int]], vocabulary_tokens: int) -> torch.Tensor:
        """(rows, most tokens), filled up with an id that no token has."""
        return make_tensor_with_pad(token_ids, pad=vocabulary_tokens, dtype=torch.int64, device=self._indices.device)


class _Draws:
    """The draws of some rows of the batch, as it is now: temperature, min_p, top_k and top_p, noise, in the engine's order."""

    def __init__(self, rows: dict[int, _Row], sampler: TopKTopPSampler, device: torch.device) -> None:
        takeovers = [row.takeover for row in rows.values()]
        self._rows = list(rows.values())
        self._sampler = sampler
        self._indices = torch.tensor(list(rows), device=device)
        self._temperature = _floats([takeover.temperature for takeover in takeovers], device).unsqueeze(1)
        self._min_p = _floats([takeover.min_p for takeover in takeovers], device).unsqueeze(1) if any(t.min_p for t in takeovers) else None
        self._top_p = _floats([takeover.top_p for takeover in takeovers], device) if any(t.top_p < 1.0 for t in takeovers) else None
        self._top_k = torch.tensor([takeover.top_k for takeover in takeovers], dtype=torch.int32, device=device)
        self._has_top_k = any(takeover.top_k > 0 for takeover in takeovers)

    def apply(self, logits: torch.Tensor) -> None:
        vocabulary_tokens, candidates = logits.shape[1], logits[self._indices].div_(self._temperature)
        if self._min_p is not None:
            probabilities = candidates.softmax(dim=-1)
            candidates.masked_fill_(probabilities < probabilities.amax(dim=-1, keepdim=True).mul_(self._min_p), -torch.inf)
        top_k = self._top_k.masked_fill((self._top_k <= 0) | (self._top_k > vocabulary_tokens), vocabulary_tokens)
        generators = {
            number: row.draws.generator_at(row.position, vocabulary_tokens)
            for number, row in enumerate(self._rows)
            if row.draws is not None
        }
        tokens, _ = self._sampler(candidates, generators, top_k if self._has_top_k else None, self._top_p)
        logits.index_fill_(0, self._indices, -torch.inf)
        logits[self._indices, tokens] = 0.0


def _floats(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
