"""A run's settings as vLLM's SamplingParams.

Must not check what the domain has checked.
"""

from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from tandem.domain import StructuredKind, StructuredOutput
from tandem.engine.base import EngineRequest
from tandem.engine.takeover import RESUMED_TOKENS
from tandem.errors import InvalidRequestError


def to_sampling_params(request: EngineRequest, kv_params: dict[str, str | bool] | None) -> SamplingParams:
    """For one run; `kv_params` go to the KV connector. Raises InvalidRequestError where vLLM refuses a setting."""
    sampling = request.sampling
    extra_args: dict[str, Any] = {RESUMED_TOKENS: request.resumed_tokens} if request.resumed_tokens else {}
    if kv_params is not None:
        extra_args["kv_transfer_params"] = kv_params
    try:
        return SamplingParams(
            n=sampling.n,
            max_tokens=request.max_new_tokens,
            min_tokens=min(sampling.min_tokens, request.max_new_tokens),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=sampling.ignore_eos,
            logprobs=sampling.logprobs,
            logit_bias=dict(sampling.logit_bias) or None,
            structured_outputs=_to_structured(sampling.structured_output),
            detokenize=False,  # text and stop strings are the decode worker's, across the seam
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args or None,
        )
    except ValueError as error:
        raise InvalidRequestError("sampling", last_line(error)) from error


def last_line(error: BaseException) -> str:
    """What an error says in the end."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _to_structured(structured: StructuredOutput | None) -> StructuredOutputsParams | None:
    if structured is None:
        return None
    match structured.kind:
        case StructuredKind.JSON_SCHEMA:
            return StructuredOutputsParams(json=structured.value[0])
        case StructuredKind.REGEX:
            return StructuredOutputsParams(regex=structured.value[0])
        case StructuredKind.GRAMMAR:
            return StructuredOutputsParams(grammar=structured.value[0])
        case StructuredKind.CHOICE:
            return StructuredOutputsParams(choice=list(structured.value))
        case StructuredKind.JSON_OBJECT:
            return StructuredOutputsParams(json_object=True)
