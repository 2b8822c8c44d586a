"""Output as OpenAI's objects."""

import json
import math

import pytest

from router.openai_response import CHAT, COMPLETION, Choice, Output, model_object, receipt_object, usage_object
from tandem.convert import chunk_to_pb
from tandem.domain import Chunk, FinishReason, Logprobs, Receipt, RequestId, TokenLogprob
from tandem.v1 import common_pb2, inference_pb2


def _name(token_id: int) -> bytes:
    return b"<%d>" % token_id


def _logprobs(sampled: int, *top: int) -> Logprobs:
    tokens = [TokenLogprob(token_id=token, logprob=-float(token), rank=1) for token in (sampled, *top)]
    return Logprobs(sampled=tokens[0], top=tuple(tokens[1:]))


def _chunk(text: str = "", *token_ids: int, finish_reason: FinishReason | None = None, stop: str = "") -> inference_pb2.GenerateResponse:
    logprobs = tuple(_logprobs(token, token, 9) for token in token_ids)
    return chunk_to_pb(
        Chunk(first_position=0, text=text, token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason, stop_reason=stop)
    )


def test_a_choice_gives_each_chunk_once() -> None:
    choice = Choice(3, frozenset())
    choice.add(_chunk("a", 1))
    first = choice.take(None)
    choice.add(_chunk("b", 2, 3))
    choice.add(_chunk("c", finish_reason=FinishReason.LENGTH))
    rest = choice.take(None)
    assert (first.index, first.text, first.token_ids, first.is_first, first.finish_reason) == (3, "a", [1], True, None)
    assert (rest.text, rest.token_ids, rest.is_first, rest.finish_reason) == ("bc", [2, 3], False, "length")
    assert choice.output_tokens == 3


@pytest.mark.parametrize(("told", "expected"), [("7", 7), ("8", "8"), ("end", "end"), ("", None)])
def test_a_stop_token_is_a_number_and_a_stop_string_is_a_string(told: str, expected: str | int | None) -> None:
    choice = Choice(0, frozenset({7}))
    choice.add(_chunk(finish_reason=FinishReason.STOP, stop=told))
    output = choice.take(None)
    assert (output.finish_reason, output.stop_reason) == ("stop", expected)


def test_a_completion_has_its_text_in_the_choice() -> None:
    output = Output(index=1, text="hi", finish_reason="stop", stop_reason="end")
    expected = {"index": 1, "text": "hi", "logprobs": None, "finish_reason": "stop", "stop_reason": "end"}
    assert COMPLETION.choice(output, None, is_delta=True) == COMPLETION.choice(output, None, is_delta=False) == expected


def test_a_chat_has_a_message_and_its_stream_a_role_once() -> None:
    assert CHAT.choice(Output(index=0, text="hi"), None, is_delta=False)["message"] == {"role": "assistant", "content": "hi"}
    assert CHAT.choice(Output(index=0, text="hi"), None, is_delta=True)["delta"] == {"role": "assistant", "content": "hi"}
    assert CHAT.choice(Output(index=0, text="hi", is_first=False), None, is_delta=True)["delta"] == {"content": "hi"}


def test_completion_logprobs_are_columns_whose_offsets_go_on_over_chunks() -> None:
    choice = Choice(0, frozenset())
    seen = []
    for tokens in ((1, 22), (3,)):
        choice.add(_chunk("", *tokens))
        seen.append(COMPLETION.choice(choice.take(_name), _name, is_delta=True)["logprobs"])
    assert seen[0] == {
        "text_offset": [0, 3],
        "tokens": ["<1>", "<22>"],
        "token_logprobs": [-1.0, -22.0],
        "top_logprobs": [{"<1>": -1.0, "<9>": -9.0}, {"<22>": -22.0, "<9>": -9.0}],
    }
    assert seen[1]["text_offset"] == [7]


def test_chat_logprobs_are_objects_with_bytes() -> None:
    message = common_pb2.Logprobs(sampled=common_pb2.TokenLogprob(token_id=5, logprob=-math.inf))
    made = CHAT.choice(Output(index=0, logprobs=[message]), lambda _: b"\xc3\xa9", is_delta=False)["logprobs"]
    assert made == {"content": [{"token": "\u00e9", "logprob": -9999.0, "bytes": [0xC3, 0xA9], "top_logprobs": []}]}
    assert json.loads(json.dumps(made)) == made


def test_a_token_that_is_part_of_a_character_has_its_own_bytes() -> None:
    message = common_pb2.Logprobs(sampled=common_pb2.TokenLogprob(token_id=5))
    made = CHAT.choice(Output(index=0, logprobs=[message]), lambda _: b"\xc3", is_delta=False)["logprobs"]
    assert (made["content"][0]["token"], made["content"][0]["bytes"]) == ("\ufffd", [0xC3])


def test_usage_adds_up() -> None:
    assert usage_object(prompt_tokens=5, output_tokens=7, cached_tokens=3) == {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_a_receipt_has_its_main_figures_by_their_own_names() -> None:
    made = receipt_object(Receipt(request_id=RequestId("r"), ttft_s=0.5, handed_off=True, prefill_replica_id="p", handoff_gap_s=0.1))
    assert (made["ttft_s"], made["handed_off"], made["prefill_replica_id"], made["handoff_gap_s"]) == (0.5, True, "p", 0.1)
    assert json.loads(json.dumps(made)) == made


def test_a_model_says_how_long_its_context_is() -> None:
    made = model_object("m", context_tokens=128, created=5)
    assert (made["id"], made["object"], made["created"], made["max_model_len"]) == ("m", "model", 5, 128)
