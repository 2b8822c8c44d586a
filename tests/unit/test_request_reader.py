"""What is far too long is refused before anything is made of it."""

from dataclasses import replace

import pytest

from router.request_reader import read_request
from router.tokenizer import Tokenizers
from tandem.errors import InvalidRequestError, Reason
from tandem.generate_request import MAX_CHAT_MESSAGES
from tandem.v1 import inference_pb2
from tests.samples import ENGINE, make_lease

UNKNOWN_TOKEN = ENGINE.vocabulary_tokens  # would be refused too, once the ids are looked at


async def refusal(**fields: object) -> InvalidRequestError:
    message = inference_pb2.GenerateRequest(**fields)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError) as caught:
        await read_request(message, make_lease(), Tokenizers())
    return caught.value


async def test_a_prompt_longer_than_the_context_is_refused_by_its_length() -> None:
    error = await refusal(token_ids=inference_pb2.TokenIds(ids=[UNKNOWN_TOKEN] * ENGINE.context_tokens))
    assert (error.field, error.reason) == ("prompt", Reason.PROMPT_TOO_LONG)
    assert str(ENGINE.context_tokens) in error.message


async def test_more_resumed_tokens_than_the_context_are_refused_by_their_number() -> None:
    ids = [UNKNOWN_TOKEN] * ENGINE.context_tokens
    error = await refusal(token_ids=inference_pb2.TokenIds(ids=[1]), resume_token_ids=ids, first_position=len(ids))
    assert error.field == "resume_token_ids"
    assert str(ENGINE.context_tokens) in error.message


async def test_a_long_prompt_is_read_whole() -> None:
    lease = make_lease()
    lease = replace(lease, engine=replace(lease.engine, context_tokens=100_000))
    ids = [number % 90 for number in range(20_000)]
    message = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids))
    assert (await read_request(message, lease, Tokenizers())).prompt_token_ids == tuple(ids)


async def test_a_conversation_of_too_many_messages_is_refused_by_their_number() -> None:
    messages = [inference_pb2.ChatMessage(role="user")] * (MAX_CHAT_MESSAGES + 1)
    error = await refusal(chat=inference_pb2.ChatMessages(messages=messages))
    assert error.field == "prompt.chat"
    assert str(MAX_CHAT_MESSAGES) in error.message
