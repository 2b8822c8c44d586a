"""What a caller of the SDK says, as the message that goes to the router: checked here, before any call.

Pure. `GenerateOptions` is the one list of options that both clients take.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypedDict

from tandem.convert import sampling_to_pb, slo_to_pb
from tandem.domain import MAX_REQUEST_ID_CHARS, Sampling, Slo, StructuredOutput
from tandem.errors import InvalidRequestError
from tandem.v1 import common_pb2, inference_pb2
from tandem.wire import build

MAX_CHAT_MESSAGES = 4096  # templates take about 40 us for each, whatever it says
_MAX_TIMEOUT_S = 1e8  # what gRPC's clock cannot hold would be over at once
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class GenerateOptions(TypedDict, total=False):
    """Everything a request may set; what is left out keeps its default. The fields of `Sampling` go by their own names."""

    max_tokens: int | None  # output tokens at most, resumed ones included; None: up to the context
    min_tokens: int
    temperature: float  # 0 is greedy; the default is 1
    top_p: float
    top_k: int  # 0: all
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None  # 0: the sampled token's; k: the k best too
    n: int
    logit_bias: Mapping[int, float]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    structured_output: StructuredOutput | None
    model: str  # default: the only model served
    resume_token_ids: Sequence[int]  # output tokens the caller has already: the stream goes on after them
    priority: int  # lower is more urgent
    sheddable: bool  # may be refused first under load
    session_id: str  # requests of one session prefer one replica
    slo: Slo | None  # objectives in seconds
    expected_output_tokens: int | None  # a hint for placement
    timeout_s: float | None  # seconds for the whole request; None: no deadline
    request_id: str  # default: the router makes one


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A checked request: its message, its deadline in seconds (None: none) and what its stream will look like."""

    message: inference_pb2.GenerateRequest
    timeout_s: float | None
    num_choices: int
    first_position: int


_OPTIONS = frozenset(GenerateOptions.__annotations__)
_SAMPLING = frozenset(field.name for field in fields(Sampling))
_COPIED = ("model", "priority", "sheddable", "session_id", "expected_output_tokens", "request_id")


def prepare_request(prompt: Prompt, options: GenerateOptions, default_timeout_s: float | None) -> PreparedRequest:
    """The message of a request.

    Raises InvalidRequestError naming the field that is empty, out of range, of the wrong type or not valid UTF-8, and TypeError for an
    option that does not exist. Copies the prompt once.
    """
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(_OPTIONS))}")
    given = {name: value for name, value in options.items() if value is not None}  # None is every option's way to say default
    sampling = _sampling({name: value for name, value in given.items() if name in _SAMPLING})
    resumed = _listed("resume_token_ids", given.get("resume_token_ids", ()))
    message = build(
        inference_pb2.GenerateRequest,
        "",
        sampling=sampling_to_pb(sampling),
        slo=_slo_field(given["slo"]) if "slo" in given else None,
        resume_token_ids=resumed,
        first_position=len(resumed),
        **_prompt_field(prompt),
        **{name: given[name] for name in _COPIED if name in given},
    )
    sampling.validate()
    if len(message.request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequestError("request_id", f"must have at most {MAX_REQUEST_ID_CHARS} characters")
    timeout_s = check_timeout_s(options.get("timeout_s", default_timeout_s))
    return PreparedRequest(message=message, timeout_s=timeout_s, num_choices=sampling.n, first_position=len(resumed))


def check_timeout_s(timeout_s: float | None) -> float | None:
    """The time-out in seconds, three years at most; raises InvalidRequestError where it is no finite number above 0."""
    if timeout_s is not None and not (isinstance(timeout_s, int | float) and math.isfinite(timeout_s) and timeout_s > 0):
        raise InvalidRequestError("timeout_s", f"must be a finite number of seconds greater than 0, or None, got {timeout_s!r}")
    return None if timeout_s is None else min(timeout_s, _MAX_TIMEOUT_S)


def check_messages(field: str, messages: int) -> None:
    """Raises InvalidRequestError where a conversation has too many messages."""
    if messages > MAX_CHAT_MESSAGES:
        raise InvalidRequestError(field, f"must have at most {MAX_CHAT_MESSAGES} messages, got {messages}")


def _sampling(given: dict[str, object]) -> Sampling:
    """Sampling with its lists as tuples; one stop string may stand alone."""
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(_listed(f"sampling.{name}", given[name]))
    if not isinstance(given.get("structured_output"), StructuredOutput | None):
        raise InvalidRequestError("sampling.structured_output", "must be a StructuredOutput")
    return Sampling(**given)  # type: ignore[arg-type]  # sampling_to_pb checks every type


def _slo_field(slo: object) -> common_pb2.Slo:
    if not isinstance(slo, Slo):
        raise InvalidRequestError("slo", "must be a Slo")
    message = slo_to_pb(slo)
    for name, value in (("slo.ttft_s", slo.ttft_s), ("slo.tpot_s", slo.tpot_s)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InvalidRequestError(name, f"must be a finite number of seconds greater than 0, got {value}")
    return message


def _listed(field: str, value: object) -> list[object]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequestError(field, f"must be a list, got {type(value).__name__}")
    return list(value)


def _prompt_field(prompt: Prompt) -> dict[str, object]:
    """The member of the message's oneof that holds the prompt."""
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequestError("prompt", "must not be empty")
        try:
            return {"text": prompt.encode()}  # protobuf takes UTF-8 as it is, and would not say which field is not
        except UnicodeEncodeError as error:
            raise InvalidRequestError("prompt.text", f"is not valid UTF-8 ({error})") from error
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise InvalidRequestError("prompt", f"must be text, token ids or chat messages, got {type(prompt).__name__}")
    parts: list[object] = list(prompt)
    if not parts:
        raise InvalidRequestError("prompt", "must not be empty")
    if isinstance(parts[0], Mapping):
        check_messages("prompt.chat", len(parts))
        return {"chat": build(inference_pb2.ChatMessages, "prompt.chat", messages=[_chat_message(part) for part in parts])}
    try:
        return {"token_ids": inference_pb2.TokenIds(ids=parts)}  # type: ignore[arg-type]  # checked by protobuf
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError("prompt.token_ids", f"must be integers from 0 to {2**32 - 1} ({error})") from error


def _chat_message(part: object) -> inference_pb2.ChatMessage:
    if not isinstance(part, Mapping) or set(part) != {"role", "content"}:
        raise InvalidRequestError("prompt.chat", "each message must have exactly the keys role and content")
    return build(inference_pb2.ChatMessage, "prompt.chat", role=part["role"], content=part["content"])
