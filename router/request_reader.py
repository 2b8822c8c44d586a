"""What clients send, to domain requests: model, prompt tokens, limits checked before anything is booked.

Must not route. Raises InvalidRequestError naming the field.
"""

import asyncio
import uuid
from collections.abc import Sequence

from router.tokenizer import Tokenizers
from tandem.convert import sampling_from_pb, slo_from_pb
from tandem.domain import DEFAULT_TENANT, MAX_REQUEST_ID_CHARS, EngineInfo, Lease, Request, RequestId, check_prompt_tokens
from tandem.errors import InvalidRequestError
from tandem.generate_request import check_messages
from tandem.v1 import inference_pb2

_SLICE_TOKENS = 8192  # about 0.3 ms


async def read_request(
    message: inference_pb2.GenerateRequest, lease: Lease, tokenizers: Tokenizers, tenant: str = DEFAULT_TENANT
) -> Request:
    """The tenant's request as the model of `lease` sees it, validated.

    Raises InvalidRequestError, ConfigError where text cannot be tokenised.
    """
    request_id = _read_request_id(message.request_id)
    if message.first_position != len(message.resume_token_ids):
        raise InvalidRequestError(
            "first_position", f"must be the number of resumed tokens, {len(message.resume_token_ids)}, got {message.first_position}"
        )
    _check_lengths(message, lease.engine)
    request = Request(
        request_id=request_id,
        model=lease.model,
        prompt_token_ids=await _read_prompt(message, lease, tokenizers),
        sampling=sampling_from_pb(message.sampling),
        resume_token_ids=tuple(message.resume_token_ids),
        priority=message.priority,
        sheddable=message.sheddable,
        slo=slo_from_pb(message.slo),
        session_id=message.session_id,
        expected_output_tokens=message.expected_output_tokens if message.HasField("expected_output_tokens") else None,
        tenant=tenant,
    )
    request.validate(lease.engine)
    if request.sampling.n > 1 and request.resume_token_ids:
        raise InvalidRequestError("resume_token_ids", "a request for several choices cannot be resumed")
    return request


def _check_lengths(message: inference_pb2.GenerateRequest, engine: EngineInfo) -> None:
    """Refuses what is far too long before anything is made of it."""
    check_messages("prompt.chat", len(message.chat.messages))
    check_prompt_tokens(len(message.token_ids.ids), engine.context_tokens)
    if len(message.resume_token_ids) >= engine.context_tokens:
        raise InvalidRequestError(
            "resume_token_ids", f"{len(message.resume_token_ids)} tokens are no output in a context of {engine.context_tokens} tokens"
        )


def _read_request_id(text: str) -> RequestId:
    if not text:
        return RequestId(uuid.uuid4().hex)
    if len(text) > MAX_REQUEST_ID_CHARS or not (text.isascii() and text.isprintable()):
        raise InvalidRequestError("request_id", f"must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters")
    return RequestId(text)


async def _read_in_slices(ids: Sequence[int]) -> tuple[int, ...]:
    """Token ids out of their message, with a turn of the event loop between slices: 100,000 take some milliseconds."""
    if len(ids) <= _SLICE_TOKENS:
        return tuple(ids)
    token_ids: list[int] = []
    for start in range(0, len(ids), _SLICE_TOKENS):
        token_ids += ids[start : start + _SLICE_TOKENS]
        await asyncio.sleep(0)
    return tuple(token_ids)


async def _read_prompt(message: inference_pb2.GenerateRequest, lease: Lease, tokenizers: Tokenizers) -> tuple[int, ...]:
    match message.WhichOneof("prompt"):
        case "token_ids":
            return await _read_in_slices(message.token_ids.ids)
        case "text" if message.text:
            return await (await tokenizers.get(lease.model_path)).encode_text(message.text)
        case "chat" if message.chat.messages:
            messages = [{"role": item.role, "content": item.content} for item in message.chat.messages]
            return await (await tokenizers.get(lease.model_path)).encode_chat(messages)
        case _:
            raise InvalidRequestError("prompt", "must not be empty")
