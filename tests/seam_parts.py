"""vLLM's types and our parts of its engine, imported when a test first asks: the import takes seconds and warns of itself."""

import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any


@cache
def seam_parts() -> Any:
    """The names that tests of the seam inside the engine use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tandem.engine.environment import set_engine_environment

        set_engine_environment()
        import vllm
        from vllm.model_executor.layers.utils import apply_penalties
        from vllm.sampling_params import StructuredOutputsParams
        from vllm.v1.request import Request
        from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
        from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

        from tandem.engine import takeover
        from tandem.engine.gpu_penalties import ResumedPenalties
        from tandem.engine.seam_sampler import SeamSampler
        from tandem.engine.seam_scheduler import prepare

    return SimpleNamespace(
        SamplingParams=vllm.SamplingParams,
        StructuredOutputsParams=StructuredOutputsParams,
        Request=Request,
        BatchUpdate=BatchUpdate,
        MoveDirectionality=MoveDirectionality,
        TopKTopPSampler=TopKTopPSampler,
        apply_penalties=apply_penalties,
        RESUMED_TOKENS=takeover.RESUMED_TOKENS,
        take_over=takeover.take_over,
        takeover_from=takeover.takeover_from,
        ResumedPenalties=ResumedPenalties,
        SeamSampler=SeamSampler,
        prepare=prepare,
    )
