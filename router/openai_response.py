"""Output to OpenAI's objects: choices, deltas, log probabilities, usage, receipts.

Must not do I/O or know the clock. An object is a dict that JSON can hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.convert import finish_reason_from_pb
from tandem.domain import Receipt
from tandem.v1 import common_pb2, inference_pb2

JsonObject = dict[str, Any]
TokenBytes = Callable[[int], bytes]  # a token alone; its text has U+FFFD where it is part of a character

_LEAST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI's stand-in


@dataclass(slots=True, kw_only=True)
class Output:
    """Some output of one choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[common_pb2.Logprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    is_first: bool = True
    first_char: int = 0  # characters of its tokens' own texts before it


class Choice:
    """One choice as it grows: takes chunks, gives what is new."""

    def __init__(self, index: int, stop_token_ids: frozenset[int]) -> None:
        self._index = index
        self._stop_token_ids = stop_token_ids
        self._new = Output(index=index)
        self._chars = 0
        self.output_tokens = 0

    def add(self, chunk: inference_pb2.GenerateResponse) -> None:
        """Takes the next chunk."""
        new = self._new
        new.text += chunk.text
        new.token_ids += chunk.token_ids
        new.logprobs += chunk.logprobs
        self.output_tokens += len(chunk.token_ids)
        if chunk.finish_reason:
            new.finish_reason = finish_reason_from_pb(chunk.finish_reason)
            new.stop_reason = self._stop_reason(chunk.stop_reason)

    def take(self, token_bytes: TokenBytes | None) -> Output:
        """What came since the last time; `token_bytes` counts the characters where log probabilities are wanted."""
        taken = self._new
        if token_bytes is not None:
            self._chars += sum(len(_token_text(token_bytes, item.sampled)) for item in taken.logprobs)
        self._new = Output(index=self._index, is_first=False, first_char=self._chars)
        return taken

    def _stop_reason(self, text: str) -> str | int | None:
        if text.isdecimal() and int(text) in self._stop_token_ids:
            return int(text)
        return text or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One of OpenAI's two kinds of answer."""

    id_prefix: str
    kind: str  # the `object` of a whole answer
    chunk_kind: str  # the `object` of a stream's chunk
    has_prompt_in_choice: bool  # where vLLM puts `prompt_token_ids`
    whole: Callable[[Output], JsonObject]
    delta: Callable[[Output], JsonObject]
    logprobs: Callable[[Sequence[common_pb2.Logprobs], TokenBytes, int], JsonObject]

    def choice(self, output: Output, token_bytes: TokenBytes | None, *, is_delta: bool) -> JsonObject:
        """A choice of an answer or chunk; without `token_bytes` it has no log probabilities."""
        logprobs = None if token_bytes is None else self.logprobs(output.logprobs, token_bytes, output.first_char)
        return {
            "index": output.index,
            **(self.delta(output) if is_delta else self.whole(output)),
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }


def _token_text(token_bytes: TokenBytes, token: common_pb2.TokenLogprob) -> str:
    return token_bytes(token.token_id).decode("utf-8", "replace")


def _text(output: Output) -> JsonObject:
    return {"text": output.text}


def _message(output: Output) -> JsonObject:
    return {"message": {"role": "assistant", "content": output.text}}


def _message_delta(output: Output) -> JsonObject:
    return {"delta": {"role": "assistant", "content": output.text} if output.is_first else {"content": output.text}}


def completion_logprobs(logprobs: Sequence[common_pb2.Logprobs], token_bytes: TokenBytes, first_char: int) -> JsonObject:
    """Column by column; a token's offset counts the characters of the tokens before it, each taken alone."""
    tokens = [_token_text(token_bytes, item.sampled) for item in logprobs]
    offsets = [first_char]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "text_offset": offsets[:-1],
        "tokens": tokens,
        "token_logprobs": [_finite(item.sampled.logprob) for item in logprobs],
        "top_logprobs": [
            {_token_text(token_bytes, token): _finite(token.logprob) for token in (item.sampled, *item.top)} for item in logprobs
        ],
    }


def chat_logprobs(logprobs: Sequence[common_pb2.Logprobs], token_bytes: TokenBytes, first_char: int) -> JsonObject:
    """One object per token, with the best candidates inside."""

    def one(token: common_pb2.TokenLogprob) -> JsonObject:
        text = _token_text(token_bytes, token)
        return {"token": text, "logprob": _finite(token.logprob), "bytes": list(token_bytes(token.token_id))}

    return {"content": [{**one(item.sampled), "top_logprobs": [one(token) for token in item.top]} for item in logprobs]}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


COMPLETION = Format(
    id_prefix="cmpl-",
    kind="text_completion",
    chunk_kind="text_completion",
    has_prompt_in_choice=True,
    whole=_text,
    delta=_text,
    logprobs=completion_logprobs,
)
CHAT = Format(
    id_prefix="chatcmpl-",
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    has_prompt_in_choice=False,
    whole=_message,
    delta=_message_delta,
    logprobs=chat_logprobs,
)


def usage_object(*, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> JsonObject:
    """Tokens of a whole answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


_RECEIPT_FIELDS = (
    *("request_id", "queue_s", "dispatch_s", "prefill_s", "ttft_s", "handoff_gap_s", "transfer_s", "decode_s", "e2e_s"),
    *("prompt_tokens", "output_tokens", "cached_tokens", "kv_bytes_shipped", "prefill_replica_id", "decode_replica_id"),
    *("handed_off", "one_worker_reason", "attempts", "router_id"),
)


def receipt_object(receipt: Receipt) -> JsonObject:
    """A receipt's figures by their own names."""
    return {name: getattr(receipt, name) for name in _RECEIPT_FIELDS}


def model_object(model: str, *, context_tokens: int | None, created: int, engine: str | None = None) -> JsonObject:
    """One entry of the list of models; `max_model_len` is vLLM's name for the context. A replica tells it and `engine`, null before."""
    card: JsonObject = {"id": model, "object": "model", "created": created, "owned_by": "tandem", "root": model}
    return {**card, "max_model_len": context_tokens, "engine": engine}
