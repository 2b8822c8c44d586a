"""What clients send, to domain requests: model, prompt tokens, limits checked before anything is booked.

Must not route. Raises InvalidRequestError naming the field.
"""

import asyncio
import uuid

from kv_transfer.blocks import block_hashes
from router.tokenizer import Tokenizers
from tandem.convert import sampling_from_pb, slo_from_pb
from tandem.domain import MAX_REQUEST_ID_CHARS, BlockHash, Lease, Request, RequestId
from tandem.errors import InvalidRequestError
from tandem.v1 import inference_pb2

_SLICE_BLOCKS = 64  # about 0.3 ms of hashing between two turns of the event loop


async def read_request(message: inference_pb2.GenerateRequest, lease: Lease, tokenizers: Tokenizers) -> Request:
    """The request as the model of `lease` sees it, validated. Raises InvalidRequestError, ConfigError where text cannot be tokenised."""
    request_id = _read_request_id(message.request_id)
    if message.first_position != len(message.resume_token_ids):
        raise InvalidRequestError(
            "first_position", f"must be the number of resumed tokens, {len(message.resume_token_ids)}, got {message.first_position}"
        )
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
    )
    request.validate(lease.engine)
    if request.sampling.n > 1 and request.resume_token_ids:
        raise InvalidRequestError("resume_token_ids", "a request for several choices cannot be resumed")
    return request


async def hash_prompt(request: Request, block_size_tokens: int) -> list[BlockHash]:
    """Hashes of the prompt's full blocks, in slices that let the event loop turn."""
    hashes: list[BlockHash] = []
    step_tokens = _SLICE_BLOCKS * block_size_tokens
    for start in range(0, len(request.prompt_token_ids), step_tokens):
        token_ids = request.prompt_token_ids[start : start + step_tokens]
        hashes += block_hashes(token_ids, block_size_tokens, request.cache_salt, parent=hashes[-1] if hashes else None)
        if len(token_ids) == step_tokens:
            await asyncio.sleep(0)
    return hashes


def _read_request_id(text: str) -> RequestId:
    if not text:
        return RequestId(uuid.uuid4().hex)
    if len(text) > MAX_REQUEST_ID_CHARS or not (text.isascii() and text.isprintable()):
        raise InvalidRequestError("request_id", f"must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters")
    return RequestId(text)


async def _read_prompt(message: inference_pb2.GenerateRequest, lease: Lease, tokenizers: Tokenizers) -> tuple[int, ...]:
    match message.WhichOneof("prompt"):
        case "token_ids":
            return tuple(message.token_ids.ids)
        case "text" if message.text:
            return await (await tokenizers.get(lease.model_path)).encode_text(message.text)
        case "chat" if message.chat.messages:
            messages = [{"role": item.role, "content": item.content} for item in message.chat.messages]
            return await (await tokenizers.get(lease.model_path)).encode_chat(messages)
        case _:
            raise InvalidRequestError("prompt", "must not be empty")
