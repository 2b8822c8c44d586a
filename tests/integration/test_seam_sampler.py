"""Our half of the sampler beside vLLM's own functions, on made-up logits: no engine, real torch."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.seam_parts import seam_parts

pytestmark = pytest.mark.integration

VOCABULARY_TOKENS = 64
PROMPT = [3, 5, 5, 9]
OUTPUT = [7, 7, 3, 20, 11]
PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.4}
CPU = torch.device("cpu")


@pytest.fixture
def parts() -> Any:
    return seam_parts()


def params(parts: Any, resumed_tokens: int = 0, **settings: Any) -> Any:
    """As they leave the scheduler under the V1 model runner."""
    return parts.take_over(parts.SamplingParams(extra_args={parts.RESUMED_TOKENS: resumed_tokens}, **settings), owns_draws=True)


def make_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, VOCABULARY_TOKENS), generator=torch.Generator().manual_seed(seed)) * 3


def penalised(parts: Any, logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    """What vLLM's own sampler makes of them."""
    return parts.apply_penalties(
        logits.clone(), torch.tensor([prompt]), torch.tensor([output]), *(torch.tensor([p]) for p in order(PENALTIES))
    )


def order(penalties: dict[str, float]) -> list[float]:
    return [penalties["presence_penalty"], penalties["frequency_penalty"], penalties["repetition_penalty"]]


class Batch:
    """A SeamSampler and the moves of vLLM's batch."""

    def __init__(self, parts: Any) -> None:
        self._parts = parts
        self.sampler = parts.SeamSampler(SimpleNamespace(), CPU, False)

    def update(self, size: int, **changes: Any) -> None:
        self.sampler.update_state(self._parts.BatchUpdate(size, **{"removed": [], "added": [], "moved": []} | changes))


@pytest.mark.parametrize("cut", range(len(OUTPUT) + 1))
def test_penalties_of_a_continuation_are_the_engine_s_own_wherever_it_starts(parts: Any, cut: int) -> None:
    batch, logits = Batch(parts), make_logits(3)
    run = params(parts, cut, temperature=0.0, **PENALTIES)
    assert (parts.takeover_from(run.extra_args) is None) == (cut == 0)
    assert cut == 0 or (run.presence_penalty, run.frequency_penalty, run.repetition_penalty) == (0.0, 0.0, 1.0)
    batch.update(3, added=[(1, run, PROMPT + OUTPUT[:cut], OUTPUT[cut:])])
    got = batch.sampler.apply(logits.clone())
    assert torch.equal(got[[0, 2]], logits[[0, 2]])
    assert torch.equal(got[1:2], penalised(parts, logits[1:2], PROMPT, OUTPUT) if cut else logits[1:2])


@pytest.mark.parametrize("cut", range(len(OUTPUT) + 1))
def test_penalties_under_the_gpu_model_runner_are_the_same(parts: Any, cut: int) -> None:
    slot, tokens = 2, PROMPT + OUTPUT
    history = torch.zeros((4, 32), dtype=torch.int32)
    history[slot, : len(tokens)] = torch.tensor(tokens)
    states = SimpleNamespace(
        prompt_len=SimpleNamespace(np=np.array([0, 0, len(PROMPT) + cut, 0])), all_token_ids=SimpleNamespace(gpu=history)
    )
    processor = parts.ResumedPenalties(SimpleNamespace(), states)
    run = parts.take_over(parts.SamplingParams(temperature=0.0, extra_args={parts.RESUMED_TOKENS: cut}, **PENALTIES), owns_draws=False)
    assert processor.add_request(slot, run) == (cut > 0)
    layout = SimpleNamespace(idx_mapping_np=np.array([0, slot]), seq_lens_upper_bound_np=np.array([1, len(tokens)]))
    logits = make_logits(2)
    got = processor.apply(logits.clone(), layout)
    assert torch.equal(got[0], logits[0])
    assert torch.equal(got[1:], penalised(parts, logits[1:], PROMPT, OUTPUT) if cut else logits[1:])
    assert not processor.add_request(slot, parts.SamplingParams())  # the slot's next request
    assert torch.equal(processor.apply(logits.clone(), layout), logits)


def test_seeds_are_left_to_the_gpu_model_runner(parts: Any) -> None:
    run = parts.SamplingParams(seed=3, temperature=0.7, extra_args={parts.RESUMED_TOKENS: 2})
    assert parts.take_over(run, owns_draws=False) is run


@pytest.mark.parametrize("filters", [{}, {"top_k": 7}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02}])
def test_seeded_tokens_are_those_of_vllm_s_sampler_wherever_the_run_starts(parts: Any, filters: dict[str, Any]) -> None:
    steps = [make_logits(seed=number) for number in range(6)]
    generator, own = torch.Generator().manual_seed(11), parts.TopKTopPSampler()
    expected: list[int] = []
    for logits in steps:
        candidates = logits / torch.tensor([[0.8]])
        if "min_p" in filters:
            probabilities = candidates.softmax(dim=-1)
            candidates[probabilities < probabilities.amax() * filters["min_p"]] = -torch.inf
        top_k = torch.tensor([filters["top_k"]], dtype=torch.int32) if "top_k" in filters else None
        top_p = torch.tensor([filters["top_p"]]) if "top_p" in filters else None
        expected.append(int(own(candidates, {0: generator}, top_k, top_p)[0]))
    for cut in range(len(steps)):
        output: list[int] = []
        batch = Batch(parts)
        run = params(parts, cut, seed=11, temperature=0.8, **filters)
        assert run.temperature == 0.0  # the engine takes the one token that is left
        batch.update(2, added=[(0, parts.SamplingParams(), [1], []), (1, run, PROMPT + expected[:cut], output)])
        for logits in steps[cut:]:
            both = torch.cat([logits, logits])
            batch.sampler.apply(both.clone())  # a chunk of the prompt, or a token that is taken back
            got = batch.sampler.apply(both.clone())
            assert torch.equal(got[:1], logits)
            assert int(torch.isfinite(got[1]).sum()) == 1
            output.append(int(got[1].argmax()))
        assert expected[:cut] + output == expected


def test_rows_follow_their_requests_through_the_batch(parts: Any) -> None:
    batch, logits = Batch(parts), make_logits(4)
    one, other = params(parts, 2, **PENALTIES, temperature=0.0), params(parts, 0, seed=4)
    batch.update(4, added=[(0, one, PROMPT + OUTPUT, []), (1, parts.SamplingParams(), [1], []), (3, other, PROMPT, [])])
    batch.update(4, moved=[(0, 2, parts.MoveDirectionality.SWAP), (3, 1, parts.MoveDirectionality.UNIDIRECTIONAL)])
    got = batch.sampler.apply(logits.clone())
    assert torch.equal(got[[0, 3]], logits[[0, 3]])
    assert torch.equal(got[2:3], penalised(parts, logits[2:3], PROMPT + OUTPUT[:3], OUTPUT[3:]))
    assert int(torch.isfinite(got[1]).sum()) == 1
    batch.update(2, removed=[1, 2])
    assert torch.equal(batch.sampler.apply(logits.clone()), logits)


def test_runs_that_vllm_s_sampler_gets_right_are_left_to_it(parts: Any) -> None:
    for run in (
        parts.SamplingParams(extra_args={parts.RESUMED_TOKENS: 3}),
        parts.SamplingParams(repetition_penalty=1.3, extra_args={parts.RESUMED_TOKENS: 3}),
        parts.SamplingParams(**PENALTIES),
        parts.SamplingParams(temperature=0.0, seed=3),
    ):
        assert parts.take_over(run, owns_draws=True) is run
