"""What OpenAI clients send, as messages; and what is refused by name."""

import json
from typing import Any

import pytest

from router.openai_request import MAX_PROMPTS, Hints, OpenAiRequest, body_param, read_chat, read_completion, read_hints, read_request_id
from tandem.convert import sampling_from_pb
from tandem.domain import Sampling, Slo, StructuredKind, StructuredOutput
from tandem.errors import InvalidRequestError
from tandem.generate_request import MAX_CHAT_MESSAGES

HINTS = Hints(request_id="r")


def _completion(hints: Hints = HINTS, **body: Any) -> OpenAiRequest:
    return read_completion(json.dumps({"prompt": "hello", **body}).encode(), hints)


def _chat(**body: Any) -> OpenAiRequest:
    return read_chat(json.dumps({"messages": [{"role": "user", "content": "hello"}], **body}).encode(), HINTS)


def _sampling(request: OpenAiRequest) -> Sampling:
    return sampling_from_pb(request.messages[0].sampling)


def _refused_chat(**body: Any) -> str | None:
    with pytest.raises(InvalidRequestError) as caught:
        _chat(**body)
    return caught.value.field


def _refused(**body: Any) -> str | None:
    with pytest.raises(InvalidRequestError) as caught:
        _completion(**body)
    return caught.value.field


def test_every_sampling_key_arrives() -> None:
    given: dict[str, Any] = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "n": 2,
        "seed": -3,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": 3,
    }
    request = _completion(**given, logit_bias={"5": 1, "6": -2.5}, priority=-1, model="m", user="u")
    made = _sampling(request)
    assert {name: getattr(made, name) for name in given} == {**given, "stop": ("a", "b"), "stop_token_ids": (4,)}
    assert made.logit_bias == {5: 1.0, 6: -2.5}
    message = request.messages[0]
    assert (message.model, message.priority, message.request_id, message.text) == ("m", -1, "r", "hello")
    assert (request.num_choices, request.wants_logprobs, request.stop_token_ids) == (2, True, frozenset({4}))


def test_null_is_absent_and_unknown_keys_are_ignored() -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream", "stream_options", "response_format", "echo", "best_of")
    nulls: dict[str, Any] = dict.fromkeys(names)
    assert _completion(**nulls, what="ever", metadata={"a": [1]}) == _completion()


def test_a_completion_has_16_tokens_by_default_and_null_lifts_that() -> None:
    assert _sampling(_completion()).max_tokens == 16
    assert _sampling(_completion(max_tokens=None)).max_tokens is None
    assert _sampling(_completion(max_completion_tokens=9)).max_tokens == 9


def test_a_chat_goes_to_the_context_by_default() -> None:
    assert _sampling(_chat()).max_tokens is None
    assert _sampling(_chat(max_tokens=5)).max_tokens == 5
    assert _sampling(_chat(max_tokens=5, max_completion_tokens=6)).max_tokens == 6


def test_top_k_of_minus_one_is_all() -> None:
    assert _sampling(_completion(top_k=-1)).top_k == 0


def test_one_stop_string_may_stand_alone() -> None:
    assert _sampling(_completion(stop="end")).stop == ("end",)


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_token_ids_are_one_prompt(prompt: list[Any]) -> None:
    (message,) = _completion(prompt=prompt).messages
    assert list(message.token_ids.ids) == [1, 2]


@pytest.mark.parametrize("prompt", ["a", ["a"]])
def test_text_is_one_prompt(prompt: Any) -> None:
    (message,) = _completion(prompt=prompt).messages
    assert (message.text, message.request_id) == ("a", "r")


def test_several_prompts_are_requests_with_ids_of_their_own() -> None:
    assert [(message.text, message.request_id) for message in _completion(prompt=["a", "b"]).messages] == [("a", "r-0"), ("b", "r-1")]
    assert [list(message.token_ids.ids) for message in _completion(prompt=[[1], [2, 3]]).messages] == [[1], [2, 3]]


@pytest.mark.parametrize(
    "prompt",
    [[], "", [[]], [""], ["a", [1]], [1, "a"], ["a"] * (MAX_PROMPTS + 1), [-1], [2**32], [[2**40]], None, 5, [1.5], [True]],
)
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    field = _refused(prompt=prompt)
    assert field is not None
    assert (body_param(field) or "").split("[")[0] == "prompt"


def test_messages_may_have_text_parts_and_no_content() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = _chat(messages=[{"role": "system", "content": parts}, {"role": "user", "content": None, "name": "ignored"}])
    assert [(item.role, item.content) for item in request.messages[0].chat.messages] == [("system", "a\nb"), ("user", "")]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[1].tool_calls"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
    ],
)
def test_messages_that_cannot_be_served_are_named(messages: list[Any], field: str) -> None:
    assert _refused_chat(messages=messages) == field


def test_a_part_that_is_no_text_is_named_by_its_type() -> None:
    with pytest.raises(InvalidRequestError, match="'image_url'"):
        _chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"n": 2, "temperature": 0}, "sampling.n"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"model": 5}, "model"),
        ({"user": 5}, "user"),
        ({"seed": 2**70}, "sampling.seed"),
        ({"max_tokens": -1}, "sampling.max_tokens"),
        ({"stop_token_ids": [-1]}, "sampling.stop_token_ids"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"guided_choice": []}, "sampling.structured_output"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
def test_a_wrong_type_or_value_names_its_key(body: dict[str, Any], field: str) -> None:
    assert _refused(**body) == field


@pytest.mark.parametrize(
    "body",
    [{"echo": True}, {"best_of": 3}, {"suffix": "x"}, {"use_beam_search": True}, {"prompt_logprobs": 1}, {"bad_words": ["a"]}],
)
def test_what_a_completion_does_not_serve_is_refused_by_name(body: dict[str, Any]) -> None:
    assert _refused(**body) == next(iter(body))


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"modalities": ["text", "audio"]},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"chat_template": "x"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"top_logprobs": 2},
    ],
)
def test_what_a_chat_does_not_serve_is_refused_by_name(body: dict[str, Any]) -> None:
    assert _refused_chat(**body) == next(iter(body))


def test_what_asks_for_nothing_is_no_reason_to_refuse() -> None:
    assert _completion(echo=False, best_of=1, suffix="", bad_words=[]) == _completion()
    assert _chat(tools=[], tool_choice="none", modalities=["text"], add_generation_prompt=True) == _chat()


def test_chat_logprobs_are_of_the_best_candidates() -> None:
    assert _sampling(_chat(logprobs=True, top_logprobs=4)).logprobs == 4
    assert _sampling(_chat(logprobs=True)).logprobs == 0
    assert _sampling(_chat(logprobs=False)).logprobs is None


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SCHEMA_TEXT = '{"type":"object","properties":{"a":{"type":"integer"}}}'


@pytest.mark.parametrize(
    ("body", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, StructuredKind.JSON_OBJECT, ()),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
            StructuredKind.JSON_SCHEMA,
            (SCHEMA_TEXT,),
        ),
        ({"guided_json": SCHEMA}, StructuredKind.JSON_SCHEMA, (SCHEMA_TEXT,)),
        ({"guided_json": SCHEMA_TEXT}, StructuredKind.JSON_SCHEMA, (SCHEMA_TEXT,)),
        ({"guided_regex": "a+"}, StructuredKind.REGEX, ("a+",)),
        ({"guided_grammar": "root ::= x"}, StructuredKind.GRAMMAR, ("root ::= x",)),
        ({"guided_choice": ["a", "b"]}, StructuredKind.CHOICE, ("a", "b")),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredKind.JSON_SCHEMA, (SCHEMA_TEXT,)),
        ({"structured_outputs": {"regex": "a+"}}, StructuredKind.REGEX, ("a+",)),
        ({"structured_outputs": {"choice": ["a"]}}, StructuredKind.CHOICE, ("a",)),
        ({"structured_outputs": {"json_object": True}}, StructuredKind.JSON_OBJECT, ()),
    ],
)
def test_structured_output_is_asked_for_in_three_ways(body: dict[str, Any], kind: StructuredKind, value: tuple[str, ...]) -> None:
    assert _sampling(_completion(**body)).structured_output == StructuredOutput(kind=kind, value=value)


def test_the_text_format_asks_for_nothing() -> None:
    assert _sampling(_completion(response_format={"type": "text"}, structured_outputs={})).structured_output is None


def test_streams_say_what_they_carry() -> None:
    request = _completion(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}, return_token_ids=True)
    assert (request.is_stream, request.wants_usage, request.wants_running_usage, request.wants_token_ids) == (True, True, True, True)
    assert not _completion(stream=True, stream_options={"continuous_usage_stats": True}).wants_running_usage


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"null", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "echo": ' + b"[" * 100_000]
)
def test_what_is_no_body_is_refused_as_such(payload: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_completion(payload, HINTS)
    assert caught.value.field == "body"


def test_headers_give_deadline_objectives_session_and_receipt() -> None:
    headers = {
        "x-request-timeout-ms": "1500",
        "x-slo-ttft-ms": "200",
        "x-slo-tpot-ms": "25.5",
        "x-session-id": "s",
        "x-tandem-receipt": "1",
    }
    hints = read_hints(headers, "r")
    assert hints == Hints(request_id="r", timeout_s=1.5, slo=Slo(ttft_s=0.2, tpot_s=0.0255), session_id="s", wants_receipt=True)
    message = _completion(hints).messages[0]
    assert (message.session_id, message.slo.ttft_s, message.slo.tpot_s) == ("s", 0.2, 0.0255)
    assert read_hints({"x-slo-tpot-ms": "5"}, "r").slo == Slo(tpot_s=0.005)
    assert read_hints({}, "r") == HINTS


@pytest.mark.parametrize("name", ["x-request-timeout-ms", "x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("value", ["", "x", "0", "-5", "nan", "inf"])
def test_a_header_that_is_no_time_is_named(name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_hints({name: value}, "r")
    assert caught.value.field == name


def test_requests_under_one_header_have_ids_of_their_own() -> None:
    headers = {"x-request-id": "x" * 124}
    made = [_completion(read_hints(headers, "x" * 124), prompt=["a"] * 128).messages[-1].request_id for _ in range(2)]
    assert made[0] != made[1]
    assert all(len(f"{request_id}#15") == 128 and request_id.startswith("xxx") and request_id.endswith("-127") for request_id in made)
    assert _completion(read_hints({}, "made")).messages[0].request_id == "made"


def test_a_conversation_of_too_many_messages_is_refused_with_the_limit() -> None:
    messages = [{"role": "user", "content": ""}] * (MAX_CHAT_MESSAGES + 1)
    with pytest.raises(InvalidRequestError, match=f"messages: must have at most {MAX_CHAT_MESSAGES} messages, got {len(messages)}"):
        _chat(messages=messages)


def test_only_a_valid_request_id_is_taken() -> None:
    assert read_request_id({"x-request-id": "a-1"}) == "a-1"
    for bad in ("", "a\nb", "\u00e9", "x" * 125):
        made = read_request_id({"x-request-id": bad})
        assert len(made) == 32
        assert made != read_request_id({})


def test_fields_have_the_names_that_clients_gave() -> None:
    names = ("sampling.top_p", "prompt.token_ids", "prompt.chat", "request_id", "slo.ttft_s", "model", "body")
    assert [body_param(name) for name in names] == ["top_p", "prompt", "messages", "x-request-id", "x-slo-ttft-ms", "model", None]
