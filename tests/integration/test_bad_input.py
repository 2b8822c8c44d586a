"""Bad input on the real platform: a typed error that names field and limit, from the client and from the server, and nothing leaked."""

import math
import time

import pytest

import tandem
from tandem.rpc import open_channel, open_stream
from tandem.v1 import common_pb2, inference_pb2
from tests.integration.conftest import Cluster
from tests.integration.test_handoff import settle

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

INVALID = tandem.InvalidRequestError


async def send(cluster: Cluster, message: inference_pb2.GenerateRequest | bytes, timeout_s: float | None = 20.0) -> None:
    """Straight to the router, past the client's own checks."""
    channel = open_channel(cluster.platform.router_address)
    try:
        async with open_stream(channel, "tandem.v1.Inference/Generate", message, timeout_s=timeout_s) as stream:
            async for _ in stream:
                pass
    finally:
        await channel.close(None)


def ids(*token_ids: int) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=token_ids)


def request(**fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**{"token_ids": ids(5, 6, 7), **fields})  # type: ignore[arg-type]


def sampling(**fields: object) -> inference_pb2.GenerateRequest:
    return request(sampling=common_pb2.Sampling(**fields))  # type: ignore[arg-type]


SERVER_CASES = [
    ("unknown model", request(model="nothing"), tandem.NotFoundError, ["nothing", "bundled"]),
    ("no prompt", inference_pb2.GenerateRequest(), INVALID, ["prompt"]),
    ("empty text", inference_pb2.GenerateRequest(text=""), INVALID, ["prompt", "empty"]),
    ("empty ids", request(token_ids=ids()), INVALID, ["prompt", "empty"]),
    ("no messages", inference_pb2.GenerateRequest(chat=inference_pb2.ChatMessages()), INVALID, ["prompt"]),
    ("prompt over the context", request(token_ids=ids(*[7] * 4096)), INVALID, ["prompt", "4096"]),
    ("wrong token id", request(token_ids=ids(5, 2048)), INVALID, ["token_ids", "2048"]),
    ("huge token id", request(token_ids=ids(2**32 - 1)), INVALID, ["token_ids", "2048"]),
    ("no output tokens", sampling(max_tokens=0), INVALID, ["max_tokens", "1"]),
    ("huge max_tokens", sampling(max_tokens=2**32 - 1), INVALID, ["max_tokens", "4096"]),
    ("NaN temperature", sampling(temperature=math.nan), INVALID, ["temperature", "100"]),
    ("infinite temperature", sampling(temperature=math.inf), INVALID, ["temperature", "100"]),
    ("negative temperature", sampling(temperature=-1.0), INVALID, ["temperature", "0"]),
    ("top_p above 1", sampling(top_p=1.5), INVALID, ["top_p", "1"]),
    ("min_tokens over max_tokens", sampling(max_tokens=4, min_tokens=5), INVALID, ["min_tokens"]),
    ("too many logprobs", sampling(logprobs=21), INVALID, ["logprobs", "20"]),
    ("an empty stop string", sampling(stop=[""]), INVALID, ["stop"]),
    ("a wrong stop token", sampling(stop_token_ids=[4000]), INVALID, ["stop_token_ids", "2048"]),
    ("a broken grammar", sampling(regex="("), INVALID, []),
    (
        "resume as long as max_tokens",
        request(sampling=common_pb2.Sampling(max_tokens=2), resume_token_ids=[5, 6], first_position=2),
        INVALID,
        ["resume", "2"],
    ),
    ("resume at a wrong position", request(resume_token_ids=[5, 6], first_position=1), INVALID, ["first_position"]),
    ("a wrong resumed token", request(resume_token_ids=[9999], first_position=1), INVALID, ["resume_token_ids", "2048"]),
    ("a request id without end", request(request_id="x" * 10_000), INVALID, ["request_id", "128"]),
    ("text that is not UTF-8", b"\x1a\x02\xff\xfe", INVALID, ["UTF-8"]),
    ("bytes that are no message", b"\xff" * 64, INVALID, []),
    ("a message of 100 MB", b"\x1a\x80\x84\xaf\x5f" + b"x" * 200_000_000, tandem.MessageTooLargeError, ["16777216"]),
]


@pytest.mark.parametrize(("message", "error", "words"), [case[1:] for case in SERVER_CASES], ids=[case[0] for case in SERVER_CASES])
async def test_the_server_refuses(
    cluster: Cluster, message: inference_pb2.GenerateRequest | bytes, error: type[tandem.TandemError], words: list[str]
) -> None:
    with pytest.raises(error) as raised:
        await send(cluster, message)
    assert all(word in raised.value.message for word in words), raised.value.message
    assert not raised.value.retryable
    await settle(cluster)


async def test_a_deadline_that_is_over_is_told_at_once(cluster: Cluster) -> None:
    started_s = time.monotonic()
    with pytest.raises(tandem.DeadlineError):
        await send(cluster, request(sampling=common_pb2.Sampling(max_tokens=4000)), timeout_s=1e-6)
    assert time.monotonic() - started_s < 2.0
    await settle(cluster)


async def test_a_deadline_that_passes_mid_stream_frees_everything(cluster: Cluster) -> None:
    with pytest.raises(tandem.DeadlineError):
        await send(cluster, request(sampling=common_pb2.Sampling(max_tokens=4000, ignore_eos=True)), timeout_s=0.4)
    await settle(cluster)


async def test_the_client_refuses_before_it_sends(cluster: Cluster) -> None:
    for prompt, options, word in (
        ("", {}, "prompt"),
        ([], {}, "prompt"),
        ("\ud800", {}, "prompt"),
        ("x", {"temperature": math.nan}, "temperature"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ([-1], {}, "token"),
    ):
        with pytest.raises(INVALID, match=word):
            await cluster.client.generate(prompt, **options)
