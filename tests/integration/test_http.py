"""The OpenAI-compatible endpoint on real vLLM, through OpenAI's own client: the same text as by gRPC, in OpenAI's fields."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from tests.integration.conftest import Cluster
from tests.integration.test_handoff import settle

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

TEXT = "The for statement is used to iterate over the elements of a sequence."
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "What is a list?"}]}]
GREEDY: Any = {"temperature": 0.0, "max_tokens": 24}
FREED_S = 1.0


@pytest_asyncio.fixture(loop_scope="session")
async def client(cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"http://{cluster.platform.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60.0) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def model(client: openai.AsyncOpenAI) -> str:
    return (await client.models.list()).data[0].id


async def get(cluster: Cluster, path: str) -> tuple[int, str]:
    """A GET's status and text."""
    url = f"http://{cluster.platform.http_address}{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def post(cluster: Cluster, body: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """A completion's status and object, past what OpenAI's client lets through."""
    url = f"http://{cluster.platform.http_address}/v1/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as response:
        return response.status, await response.json()


async def test_a_completion_has_the_text_and_usage_of_grpc(cluster: Cluster, client: openai.AsyncOpenAI, model: str) -> None:
    ours = await cluster.client.generate(TEXT, **GREEDY)
    answer = await client.completions.create(model=model, prompt=TEXT, **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ours.text, "length")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    assert ours.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (ours.usage.prompt_tokens, 24)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


async def test_a_streamed_completion_has_the_text_of_grpc(cluster: Cluster, client: openai.AsyncOpenAI, model: str) -> None:
    ours = await cluster.client.generate(TEXT, **GREEDY)
    stream = await client.completions.create(model=model, prompt=TEXT, stream=True, stream_options={"include_usage": True}, **GREEDY)
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == ours.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 24


async def test_a_chat_has_the_text_of_grpc(cluster: Cluster, client: openai.AsyncOpenAI, model: str) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
    ours = await cluster.client.generate(plain, **GREEDY)
    answer = await client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
    assert (answer.choices[0].message.content, answer.choices[0].message.role) == (ours.text, "assistant")
    assert (answer.object, answer.id.startswith("chatcmpl-")) == ("chat.completion", True)
    stream = await client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ours.text
    assert [chunk.choices[0].delta.role for chunk in chunks][:2] == ["assistant", None]
    assert last.choices == []
    assert last.usage == answer.usage or last.usage is not None  # what is cached may differ


async def test_a_handed_off_prompt_is_the_same_text_and_its_receipt_says_so(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(700)
    plain = await cluster.plain.run(token_ids, 24)
    body = {"prompt": token_ids, "return_token_ids": True, **GREEDY}
    status, answer = await post(cluster, body, {"x-tandem-receipt": "1", "x-request-id": "handed-off"})
    assert (status, answer["id"]) == (200, "cmpl-handed-off")
    assert answer["choices"][0]["token_ids"] == plain.token_ids
    receipt = answer["tandem"]
    assert (receipt["handed_off"], receipt["prefill_replica_id"], receipt["decode_replica_id"]) == (True, "prefill-0", "decode-0")
    assert receipt["ttft_s"] == pytest.approx(receipt["queue_s"] + receipt["dispatch_s"] + receipt["prefill_s"])
    status, answer = await post(cluster, body)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_several_prompts_are_answered_in_their_order(cluster: Cluster, client: openai.AsyncOpenAI, model: str) -> None:
    prompts = [TEXT, "A list is", "To open a file"]
    alone = [(await cluster.client.generate(prompt, **GREEDY)).text for prompt in prompts]
    answer = await client.completions.create(model=model, prompt=prompts, **GREEDY)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(alone))
    stream = await client.completions.create(model=model, prompt=prompts, stream=True, **GREEDY)
    texts = [""] * len(prompts)
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone


async def test_two_choices_are_the_same_for_the_same_seed(client: openai.AsyncOpenAI, model: str) -> None:
    options: Any = {"model": model, "prompt": TEXT, "n": 2, "seed": 7, "temperature": 1.0, "max_tokens": 16}
    first = await client.completions.create(**options)
    assert [choice.index for choice in first.choices] == [0, 1]
    assert first.usage is not None
    assert first.usage.completion_tokens <= 32
    texts = ["", ""]
    async for chunk in await client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in first.choices]


async def test_a_stop_string_ends_the_text_and_is_told(cluster: Cluster, client: openai.AsyncOpenAI, model: str) -> None:
    whole = (await cluster.client.generate(TEXT, **GREEDY)).text
    stop = whole[len(whole) // 2 :][:3]
    answer = await client.completions.create(model=model, prompt=TEXT, stop=[stop], **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
    assert answer.choices[0].to_dict()["stop_reason"] == stop
    stream = await client.completions.create(model=model, prompt=TEXT, stop=stop, stream=True, **GREEDY)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole[: whole.index(stop)]


async def test_completion_logprobs_spell_the_text(client: openai.AsyncOpenAI, model: str) -> None:
    answer = await client.completions.create(model=model, prompt=TEXT, logprobs=3, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:index])) for index in range(24)]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob == max(top.values()) == top[token]  # greedy
        assert len(top) == 3


async def test_chat_logprobs_are_the_same_streamed_or_not(client: openai.AsyncOpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **GREEDY}
    answer = await client.chat.completions.create(**options)
    assert answer.choices[0].logprobs is not None
    whole = answer.choices[0].logprobs.content or []
    parts: list[Any] = []
    async for chunk in await client.chat.completions.create(**options, stream=True):
        if chunk.choices[0].logprobs is not None:
            parts += chunk.choices[0].logprobs.content or []
    assert [item.token for item in parts] == [item.token for item in whole]
    assert [item.logprob for item in parts] == pytest.approx([item.logprob for item in whole], abs=1e-3)
    assert all(len(item.top_logprobs) == 2 and item.bytes == list(item.token.encode()) for item in whole)


async def test_structured_output_is_what_was_asked_for(client: openai.AsyncOpenAI, model: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = await client.chat.completions.create(
        model=model, messages=MESSAGES, response_format=wanted, temperature=0.0, extra_body={"max_tokens": 200}
    )
    if answer.choices[0].finish_reason == "stop":  # white space is free, and a small model may take all of it
        assert set(json.loads(answer.choices[0].message.content or "")) == {"a"}
    picked = await client.completions.create(model=model, prompt=TEXT, extra_body={"guided_choice": ["red", "blue"]}, **GREEDY)
    assert picked.choices[0].text in ("red", "blue")


async def test_the_model_is_listed_and_found_by_name(cluster: Cluster, client: openai.AsyncOpenAI, model: str) -> None:
    ours = (await cluster.client.models())[0]
    listed = (await client.models.list()).data
    assert [(item.id, item.to_dict()["max_model_len"]) for item in listed] == [(ours.id, ours.context_tokens)]
    assert await client.models.retrieve(model) == listed[0]


async def test_errors_are_those_that_the_client_knows(client: openai.AsyncOpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="nowhere", prompt=TEXT)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model=model, prompt=[5] * 100_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    images: Any = [{"type": "image_url", "image_url": {"url": "http://h/x.png"}}]
    with pytest.raises(openai.BadRequestError) as image:
        await client.chat.completions.create(model=model, messages=[{"role": "user", "content": images}])
    assert (image.value.param, "'image_url'" in str(image.value)) == ("messages[0].content[0]", True)
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError) as tools:
        await client.chat.completions.create(model=model, messages=MESSAGES, tools=[tool])
    assert tools.value.param == "tools"
    with pytest.raises(openai.InternalServerError) as late:
        await client.completions.create(model=model, prompt=TEXT, max_tokens=400, extra_headers={"x-request-timeout-ms": "1"})
    assert (late.value.status_code, late.value.type) == (504, "timeout_error")


async def test_a_client_that_leaves_frees_everything_within_a_second(cluster: Cluster, client: openai.AsyncOpenAI, model: str) -> None:
    token_ids = cluster.prompts.next(700)
    options: Any = {"model": model, "prompt": token_ids, "max_tokens": 1000, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    stream = await client.completions.create(**options, stream=True)
    async for _ in stream:
        break
    await stream.close()
    left_s = time.monotonic()
    await settle(cluster)
    assert time.monotonic() - left_s < FREED_S
    whole = asyncio.create_task(client.completions.create(**options))
    async with asyncio.timeout(20):
        while not (await cluster.client.status()).running_requests:  # noqa: ASYNC110  # another process's state
            await asyncio.sleep(0.01)
    whole.cancel()
    await asyncio.gather(whole, return_exceptions=True)
    left_s = time.monotonic()
    await settle(cluster)
    assert time.monotonic() - left_s < FREED_S


async def test_operators_get_health_metrics_and_targets_that_answer(cluster: Cluster, client: openai.AsyncOpenAI, model: str) -> None:
    await client.completions.create(model=model, prompt=TEXT, **GREEDY)
    assert await get(cluster, "/health") == (200, '{"status":"ok"}')
    status, metrics = await get(cluster, "/metrics")
    assert status == 200
    assert f'tandem_router_requests_total{{model="{model}",outcome="ok"}}' in metrics
    status, found = await get(cluster, "/sd")
    labels = {group["targets"][0]: group["labels"] for group in json.loads(found)}
    assert {label["component"] for label in labels.values()} == {"router", "replica"}
    assert cluster.platform.http_address in labels
    for address in labels:
        async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as response:
            assert response.status == 200
