"""Requests of a trial and what came of each. Must not judge them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Unpack

from tandem.client import AsyncClient
from tandem.domain import Receipt
from tandem.errors import OverloadedError, TandemError
from tandem.generate_request import GenerateOptions

_TOKEN_IDS = range(10, 2000)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request; times in seconds of time.monotonic. `error` is its reason, empty where it went well."""

    sent_s: float
    prompt_tokens: int
    first_s: float | None = None
    ended_s: float = 0.0
    output_tokens: int = 0
    receipt: Receipt | None = None
    error: str = ""
    retry_after_s: float | None = None


def fresh_prompt(rng: Random, tokens: int) -> list[int]:
    """Nobody has it cached."""
    return rng.choices(_TOKEN_IDS, k=tokens)


async def send(client: AsyncClient, prompt: list[int], **options: Unpack[GenerateOptions]) -> Outcome:
    """One request to its end."""
    outcome = Outcome(sent_s=time.monotonic(), prompt_tokens=len(prompt))
    try:
        async with client.stream(prompt, **options) as stream:
            async for chunk in stream:
                if chunk.token_ids and outcome.first_s is None:
                    outcome.first_s = time.monotonic()
                outcome.output_tokens += len(chunk.token_ids)
            outcome.receipt = stream.receipt
    except TandemError as error:
        outcome.error = error.reason.value
        outcome.retry_after_s = error.retry_after_s if isinstance(error, OverloadedError) else None
    outcome.ended_s = time.monotonic()
    return outcome


async def keep_busy(make: Callable[[], asyncio.Task[Outcome]], in_flight: int, duration_s: float) -> list[Outcome]:
    """So many requests in flight for so long; those that are in flight at the end are cancelled and do not count."""
    outcomes: list[Outcome] = []
    ends_s = time.monotonic() + duration_s
    running = {make() for _ in range(in_flight)}
    while (left_s := ends_s - time.monotonic()) > 0.0:
        done, running = await asyncio.wait(running, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        outcomes += [task.result() for task in done]
        if done and all(task.result().error for task in done):
            await asyncio.sleep(0.01)  # refused at once, all of them: no spinning
        running |= {make() for _ in done}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return outcomes


async def poisson(make: Callable[[], asyncio.Task[Outcome]], rate_rps: float, duration_s: float, rng: Random) -> list[Outcome]:
    """An open loop: requests at their times, whatever becomes of them; all to their ends."""
    tasks, at_s = list[asyncio.Task[Outcome]](), 0.0
    started_s = time.monotonic()
    while (at_s := at_s + rng.expovariate(rate_rps)) < duration_s:
        await asyncio.sleep(max(0.0, started_s + at_s - time.monotonic()))
        tasks.append(make())
    return list(await asyncio.gather(*tasks))
