"""OpenAI requests to GenerateRequest messages: one message per prompt, and how the answer is to look.

Must not do I/O. Raises InvalidRequestError naming the body key or header. Headers that count:

x-request-id           the answer's id (up to 124 printable ASCII characters, else one is made); the id that workers and receipts have
                       begins with its first 112, then a suffix of its own, then -0, -1, ... where there are several prompts
x-request-timeout-ms   the deadline of the whole request, from its arrival
x-slo-ttft-ms, x-slo-tpot-ms   objectives
x-session-id           requests of one session prefer one replica
x-tandem-receipt: 1    the answer tells what the request cost and where it ran
"""

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import msgspec

from router.openai_body import Body, ChatBody, CompletionBody, Message, StructuredOutputs, read_body
from tandem.domain import MAX_CHOICES, MAX_REQUEST_ID_CHARS, Slo, StructuredKind, StructuredOutput
from tandem.errors import InvalidRequestError
from tandem.generate_request import GenerateOptions, Prompt, check_messages, prepare_request
from tandem.v1 import inference_pb2

MAX_PROMPTS = 128  # each is a request of its own
_PROMPT_NUMBER_CHARS = len(f"-{MAX_PROMPTS - 1}")
_SUFFIX_CHARS = 9
_CHOICE_NUMBER_CHARS = len(f"#{MAX_CHOICES - 1}")  # choices.py adds it
_MAX_OWN_CHARS = MAX_REQUEST_ID_CHARS - _PROMPT_NUMBER_CHARS - _SUFFIX_CHARS - _CHOICE_NUMBER_CHARS


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What the headers say."""

    request_id: str
    id_suffix: str = ""  # makes the router's own id unique: clients may give one id to several requests
    timeout_s: float | None = None
    slo: Slo | None = None
    session_id: str = ""
    wants_receipt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAiRequest:
    """One HTTP request: its messages, and the form of its answer."""

    messages: tuple[inference_pb2.GenerateRequest, ...]  # one per prompt
    num_choices: int  # of each prompt
    is_stream: bool = False
    wants_usage: bool = False  # in a last chunk of a stream
    wants_running_usage: bool = False  # in every chunk of a stream
    wants_logprobs: bool = False
    wants_token_ids: bool = False
    names_tokens_by_id: bool = False  # "token_id:5" instead of text in logprobs
    stop_token_ids: frozenset[int] = frozenset()


# Where a field of ours is not `sampling.x`, what HTTP clients call it.
_PARAMS: Mapping[str, str | None] = {
    "body": None,  # of no key
    "prompt.text": "prompt",
    "prompt.token_ids": "prompt",
    "prompt.chat": "messages",
    "request_id": "x-request-id",
    "session_id": "x-session-id",
    "slo.ttft_s": "x-slo-ttft-ms",
    "slo.tpot_s": "x-slo-tpot-ms",
    "sampling.structured_output": "response_format",
}


def body_param(field: str) -> str | None:
    """A request's field by the name that HTTP clients know; None: the body as a whole."""
    return _PARAMS.get(field, field.removeprefix("sampling."))


def read_request_id(headers: Mapping[str, str]) -> str:
    """The client's id where it is valid, else a new one."""
    request_id = headers.get("x-request-id", "")
    is_valid = 0 < len(request_id) <= MAX_REQUEST_ID_CHARS - _PROMPT_NUMBER_CHARS and request_id.isascii() and request_id.isprintable()
    return request_id if is_valid else uuid.uuid4().hex


def read_hints(headers: Mapping[str, str], request_id: str) -> Hints:
    """The hints in the headers; `headers` must not care about case. Raises InvalidRequestError naming the header."""
    ttft_s, tpot_s = _read_ms(headers, "x-slo-ttft-ms"), _read_ms(headers, "x-slo-tpot-ms")
    return Hints(
        request_id=request_id,
        id_suffix=f"-{uuid.uuid4().hex[: _SUFFIX_CHARS - 1]}" if headers.get("x-request-id") == request_id else "",
        timeout_s=_read_ms(headers, "x-request-timeout-ms"),
        slo=None if ttft_s is None and tpot_s is None else Slo(ttft_s=ttft_s, tpot_s=tpot_s),
        session_id=headers.get("x-session-id", ""),
        wants_receipt=headers.get("x-tandem-receipt") == "1",
    )


def _read_ms(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        value_ms = float(text)
    except ValueError:
        value_ms = math.nan
    if not (math.isfinite(value_ms) and value_ms > 0.0):
        raise InvalidRequestError(name, "must be a finite number of milliseconds greater than 0")
    return value_ms / 1000.0


def read_completion(payload: bytes, hints: Hints) -> OpenAiRequest:
    """The request in the body of POST /v1/completions."""
    body = read_body(CompletionBody, payload)
    return _make_request(body, _prompts(body.prompt), body.logprobs, hints)


def read_chat(payload: bytes, hints: Hints) -> OpenAiRequest:
    """The request in the body of POST /v1/chat/completions."""
    body = read_body(ChatBody, payload)
    if body.add_generation_prompt is False:
        raise InvalidRequestError("add_generation_prompt", "false is not supported")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs", "needs logprobs: true")
    if not body.messages:
        raise InvalidRequestError("messages", "must not be empty")
    check_messages("messages", len(body.messages))
    chat: Prompt = [_chat_message(f"messages[{index}]", message) for index, message in enumerate(body.messages)]
    return _make_request(body, [chat], (body.top_logprobs or 0) if body.logprobs else None, hints)


def _prompts(prompt: str | list[int | str | list[int]]) -> Sequence[Prompt]:
    """Text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if not prompt or len(prompt) > MAX_PROMPTS:
        raise InvalidRequestError("prompt", f"must hold from 1 to {MAX_PROMPTS} prompts, got {len(prompt)}")
    if len(kinds) > 1:
        raise InvalidRequestError("prompt", "must be one string, one list of token ids, or a list of either")
    return cast("list[str] | list[list[int]]", prompt)


def _chat_message(path: str, message: Message) -> Mapping[str, str]:
    if message.tool_calls:
        raise InvalidRequestError(f"{path}.tool_calls", "is not supported")
    content = message.content or ""
    if not isinstance(content, str):
        for index, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise InvalidRequestError(
                    f"{path}.content[{index}]", f"parts of type {part.type!r} are not supported: give text parts with a text"
                )
        content = "\n".join(part.text or "" for part in content)
    return {"role": message.role, "content": content}


def _make_request(body: Body, prompts: Sequence[Prompt], logprobs: int | None, hints: Hints) -> OpenAiRequest:
    streaming = body.stream_options
    if streaming is not None and not body.stream:
        raise InvalidRequestError("stream_options", "needs stream: true")
    options: GenerateOptions = {
        "max_tokens": body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        "logprobs": logprobs,
        "seed": body.seed,
        "structured_output": _structured_output(body),
        "model": body.model or "",
        "session_id": hints.session_id,
        "slo": hints.slo,
    }
    for name in _PASSED_ON:
        value = getattr(body, name)
        if value is not None:
            options[name] = value  # type: ignore[literal-required]  # the names are GenerateOptions' own
    if body.top_k == -1:  # vLLM's other word for all
        options["top_k"] = 0
    messages = []
    own_id = f"{hints.request_id[:_MAX_OWN_CHARS]}{hints.id_suffix}"
    for index, prompt in enumerate(prompts):
        options["request_id"] = f"{own_id}-{index}" if len(prompts) > 1 else own_id
        messages.append(prepare_request(prompt, options, None).message)
    return OpenAiRequest(
        messages=tuple(messages),
        num_choices=1 if body.n is None else body.n,
        is_stream=bool(body.stream),
        wants_usage=bool(streaming and streaming.include_usage),
        wants_running_usage=bool(streaming and streaming.include_usage and streaming.continuous_usage_stats),
        wants_logprobs=logprobs is not None,
        wants_token_ids=bool(body.return_token_ids),
        names_tokens_by_id=bool(body.return_tokens_as_token_ids),
        stop_token_ids=frozenset(body.stop_token_ids or ()),
    )


_PASSED_ON = (
    *("min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "n", "stop"),
    *("stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "logit_bias", "priority"),
)


def _structured_output(body: Body) -> StructuredOutput | None:
    """OpenAI's response format, or vLLM's keys, of today and of before; one of them."""
    given = body.structured_outputs or StructuredOutputs()
    found = [
        *_response_format(body),
        *_constraint("guided_json", StructuredKind.JSON_SCHEMA, _json_text(body.guided_json)),
        *_constraint("guided_regex", StructuredKind.REGEX, body.guided_regex),
        *_constraint("guided_grammar", StructuredKind.GRAMMAR, body.guided_grammar),
        *_constraint("guided_choice", StructuredKind.CHOICE, body.guided_choice),
        *_constraint("structured_outputs.json", StructuredKind.JSON_SCHEMA, _json_text(given.json)),
        *_constraint("structured_outputs.regex", StructuredKind.REGEX, given.regex),
        *_constraint("structured_outputs.grammar", StructuredKind.GRAMMAR, given.grammar),
        *_constraint("structured_outputs.choice", StructuredKind.CHOICE, given.choice),
        *_constraint("structured_outputs.json_object", StructuredKind.JSON_OBJECT, [] if given.json_object else None),
    ]
    if len(found) > 1:
        raise InvalidRequestError(found[1][0], f"cannot be combined with {found[0][0]}")
    return found[0][1] if found else None


def _response_format(body: Body) -> list[tuple[str, StructuredOutput]]:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return _constraint("response_format", StructuredKind.JSON_OBJECT, [])
    schema = None if wanted.json_schema is None else wanted.json_schema.schema
    if schema is None:
        raise InvalidRequestError("response_format.json_schema.schema", "is required")
    return _constraint("response_format", StructuredKind.JSON_SCHEMA, _json_text(schema))


def _constraint(name: str, kind: StructuredKind, value: str | list[str] | None) -> list[tuple[str, StructuredOutput]]:
    if value is None:
        return []
    return [(name, StructuredOutput(kind=kind, value=(value,) if isinstance(value, str) else tuple(value)))]


def _json_text(schema: Mapping[str, object] | str | None) -> str | None:
    return schema if schema is None or isinstance(schema, str) else msgspec.json.encode(schema).decode()
