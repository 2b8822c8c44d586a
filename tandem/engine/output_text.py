"""Text from tokens through vLLM's own incremental detokeniser, so that text and stop strings are the engine's.

`primed_stream.py` says where they are not.
"""

import time

from vllm.sampling_params import SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer

from tandem.domain import Sampling
from tandem.engine.primed_stream import PRIMER_TOKENS, PrimedStream


class VllmOutputText:
    """`OutputText` of one choice, primed with its prompt."""

    def __init__(self, tokenizer: TokenizerLike | None, token_ids: tuple[int, ...], sampling: Sampling) -> None:
        params = SamplingParams(
            stop=list(sampling.stop),
            min_tokens=sampling.min_tokens,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
        )
        request = EngineCoreRequest(
            request_id="text",
            prompt_token_ids=list(token_ids[-PRIMER_TOKENS:]),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        if isinstance(self._detokenizer, FastIncrementalDetokenizer):
            skips = sampling.skip_special_tokens
            self._detokenizer.stream = PrimedStream(self._detokenizer.tokenizer, token_ids, skip_special_tokens=skips)

    def add(self, token_ids: tuple[int, ...], *, is_stop_token: bool) -> str | None:
        """Takes new tokens; returns the stop string they complete, else None."""
        stop_string: str | None = self._detokenizer.update(list(token_ids), is_stop_token)
        return stop_string

    def kept_tokens(self) -> int:
        """Output tokens up to the one that completed the stop string."""
        return int(self._detokenizer.num_output_tokens())

    def take(self, *, is_finished: bool) -> str:
        """Text that was not taken yet."""
        return str(self._detokenizer.get_next_output_text(is_finished, True))
