"""Prompts and options become one message, or an InvalidRequestError that names the field."""

from dataclasses import fields
from typing import Any, cast

import pytest

from tandem.convert import sampling_from_pb
from tandem.domain import Sampling, Slo, StructuredKind, StructuredOutput
from tandem.errors import InvalidRequestError
from tandem.generate_request import MAX_CHAT_MESSAGES, GenerateOptions, Prompt, prepare_request


def prepared(prompt: Any = "x", **options: Any) -> Any:
    return prepare_request(cast("Prompt", prompt), cast("GenerateOptions", options), 600.0)


def refused_field(prompt: Any = "x", **options: Any) -> str | None:
    with pytest.raises(InvalidRequestError) as caught:
        prepared(prompt, **options)
    return caught.value.field


def test_every_sampling_field_is_an_option() -> None:
    assert {field.name for field in fields(Sampling)} <= GenerateOptions.__annotations__.keys()


def test_the_three_kinds_of_prompt() -> None:
    assert prepared("h\u00e9llo").message.text == "h\u00e9llo"
    assert list(prepared((1, 2, 3)).message.token_ids.ids) == [1, 2, 3]
    assert list(prepared(range(3)).message.token_ids.ids) == [0, 1, 2]
    chat = prepared([{"role": "system", "content": "be brief"}, {"role": "user", "content": ""}]).message.chat
    assert [(message.role, message.content) for message in chat.messages] == [("system", "be brief"), ("user", "")]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        ([], "prompt"),
        (None, "prompt"),
        (7, "prompt"),
        (b"bytes", "prompt"),
        ({"role": "user", "content": "x"}, "prompt"),
        ("a\ud800", "prompt.text"),
        ([1, -1], "prompt.token_ids"),
        ([1, 2**32], "prompt.token_ids"),
        ([1, 1.5], "prompt.token_ids"),
        ([1, "a"], "prompt.token_ids"),
        ([1, {"role": "user", "content": "x"}], "prompt.token_ids"),
        ([{"role": "user"}], "prompt.chat"),
        ([{"role": "user", "content": "x", "name": "y"}], "prompt.chat"),
        ([{"role": "user", "content": "x"}, 1], "prompt.chat"),
        ([{"role": "user", "content": 1}], "prompt.chat.content"),
        ([{"role": "user", "content": "\ud800"}], "prompt.chat.content"),
    ],
)
def test_a_prompt_that_is_none_is_refused(prompt: Any, field: str) -> None:
    assert refused_field(prompt) == field


def test_options_reach_their_fields() -> None:
    message = prepared(
        max_tokens=9, stop="END", stop_token_ids=[4], logit_bias={3: -1}, model="m", priority=-2, sheddable=True, session_id="s",
        slo=Slo(ttft_s=0.5), request_id="r", expected_output_tokens=8, resume_token_ids=(1, 2),
    ).message  # fmt: skip
    assert sampling_from_pb(message.sampling) == Sampling(max_tokens=9, stop=("END",), stop_token_ids=(4,), logit_bias={3: -1})
    assert (message.model, message.priority, message.sheddable, message.session_id, message.request_id) == ("m", -2, True, "s", "r")
    assert (message.slo.ttft_s, message.slo.HasField("tpot_s"), message.expected_output_tokens) == (0.5, False, 8)
    assert (list(message.resume_token_ids), message.first_position) == ([1, 2], 2)


def test_nothing_given_is_all_defaults() -> None:
    request = prepared()
    assert sampling_from_pb(request.message.sampling) == Sampling()
    assert not request.message.HasField("slo")
    assert not request.message.HasField("expected_output_tokens")
    assert (request.timeout_s, request.num_choices, request.first_position) == (600.0, 1, 0)


def test_none_is_every_option_s_default() -> None:
    nothing = dict.fromkeys(GenerateOptions.__annotations__)
    assert prepared(**nothing).message == prepared().message


def test_a_timeout_of_none_is_no_deadline() -> None:
    assert prepared(timeout_s=None).timeout_s is None
    assert prepared(timeout_s=2.5).timeout_s == 2.5


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"temperature": -1}, "sampling.temperature"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"temperature": 10**400}, "sampling.temperature"),
        ({"top_p": 0}, "sampling.top_p"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"max_tokens": -1}, "sampling.max_tokens"),
        ({"max_tokens": 1.5}, "sampling.max_tokens"),
        ({"max_tokens": 2**32}, "sampling.max_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "sampling.min_tokens"),
        ({"n": 0}, "sampling.n"),
        ({"n": 17}, "sampling.n"),
        ({"logprobs": 21}, "sampling.logprobs"),
        ({"stop": [""]}, "sampling.stop"),
        ({"stop": ["a"] * 17}, "sampling.stop"),
        ({"stop": "\ud800"}, "sampling.stop"),
        ({"stop": [1]}, "sampling.stop"),
        ({"stop": 1}, "sampling.stop"),
        ({"stop_token_ids": 1}, "sampling.stop_token_ids"),
        ({"logit_bias": {1: float("inf")}}, "sampling.logit_bias"),
        ({"logit_bias": [1]}, "sampling.logit_bias"),
        ({"structured_output": "json"}, "sampling.structured_output"),
        ({"structured_output": StructuredOutput(kind=StructuredKind.REGEX, value=("",))}, "sampling.structured_output"),
        ({"model": "\ud800"}, "model"),
        ({"model": 7}, "model"),
        ({"session_id": "\ud800"}, "session_id"),
        ({"request_id": "r" * 129}, "request_id"),
        ({"priority": 2**31}, "priority"),
        ({"expected_output_tokens": -1}, "expected_output_tokens"),
        ({"resume_token_ids": [-1]}, "resume_token_ids"),
        ({"resume_token_ids": 5}, "resume_token_ids"),
        ({"slo": {"ttft_s": 1}}, "slo"),
        ({"slo": Slo(ttft_s=0.0)}, "slo.ttft_s"),
        ({"slo": Slo(tpot_s=float("nan"))}, "slo.tpot_s"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": "1"}, "timeout_s"),
    ],
)
def test_an_option_that_is_wrong_is_refused_by_name(options: dict[str, Any], field: str) -> None:
    assert refused_field(**options) == field


def test_an_option_that_does_not_exist_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"'max_token'; the options are .*max_tokens"):
        prepared(max_token=3)


def test_a_conversation_has_a_bound() -> None:
    messages = [{"role": "user", "content": ""}] * MAX_CHAT_MESSAGES
    assert len(prepared(messages).message.chat.messages) == MAX_CHAT_MESSAGES
    assert refused_field([*messages, messages[0]]) == "prompt.chat"


def test_a_time_out_of_ages_is_one_that_grpc_can_hold() -> None:
    assert prepared(timeout_s=1e12).timeout_s == 1e8
