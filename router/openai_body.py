"""The JSON bodies of the OpenAI API as types: what they may hold, and what is refused because it is not served.

Must not interpret: `openai_request.py` makes requests of them. Keys that are not here are ignored, as OpenAI's clients expect; null is
the same as absent, but for `max_tokens` of a completion, whose null lifts the default of 16.
"""

import re
from typing import Literal, TypeVar

import msgspec

from tandem.errors import InvalidRequestError, Reason

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides tokens."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """The `json_schema` of a response format; its name and strictness change nothing."""

    schema: dict[str, object] | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """OpenAI's way to ask for structured output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's way to ask for structured output."""

    json: dict[str, object] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Body(msgspec.Struct, kw_only=True):
    """What both kinds of request may set."""

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[int, float] | None = None
    priority: int | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, object] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # Refused unless they ask for nothing.
    use_beam_search: object = None
    prompt_logprobs: object = None
    allowed_token_ids: object = None
    bad_words: object = None
    truncate_prompt_tokens: object = None


class CompletionBody(Body, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    max_tokens: int | None = DEFAULT_COMPLETION_TOKENS
    logprobs: int | None = None
    echo: object = None
    best_of: object = None
    suffix: object = None
    prompt_embeds: object = None


class ContentPart(msgspec.Struct, kw_only=True):
    """One part of a message; only text is served."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: object = None


class ChatBody(Body, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: object = None
    tool_choice: object = None
    functions: object = None
    function_call: object = None
    modalities: object = None
    audio: object = None
    echo: object = None
    add_generation_prompt: bool | None = None
    continue_final_message: object = None
    chat_template: object = None
    chat_template_kwargs: object = None
    documents: object = None


# What else than an empty value (null, false, 0, "", [], {}) asks for nothing.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
_REFUSED = (
    *("echo", "best_of", "suffix", "prompt_embeds", "tools", "tool_choice", "functions", "function_call", "modalities", "audio"),
    *("continue_final_message", "chat_template", "chat_template_kwargs", "documents"),
    *("use_beam_search", "prompt_logprobs", "allowed_token_ids", "bad_words", "truncate_prompt_tokens"),
)
_WHERE = re.compile(r"^(?P<what>.*?)(?: - at (?P<in_key>`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(\w+)`")
B = TypeVar("B", bound=Body)


def read_body(kind: type[B], payload: bytes) -> B:
    """The body; raises InvalidRequestError naming the key that has the wrong type or asks for what is not served."""
    try:
        body = msgspec.json.decode(payload, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError("body", f"is not JSON ({error})", reason=Reason.BAD_BYTES) from error
    except RecursionError as error:
        raise InvalidRequestError("body", "is nested too deeply", reason=Reason.BAD_BYTES) from error
    for name in _REFUSED:
        value = getattr(body, name, None)
        if value and value not in _HARMLESS.get(name, ()):
            raise InvalidRequestError(name, "is not supported")
    return body


def _wrong_type(text: str) -> InvalidRequestError:
    """msgspec's words as an error that names the key: "Expected `int`, got `str` - at `$.n`"."""
    found = _WHERE.match(text)
    what, path = (text, "") if found is None else (found["what"], found["path"] or "")
    missing = _MISSING.search(what)
    if missing is not None:
        path = f"{path}.{missing[1]}" if path else missing[1]
        what = "is required"
    return InvalidRequestError(path or "body", what[:1].lower() + what[1:])
