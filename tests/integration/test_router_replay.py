"""The real shell in front of fake workers, recorded: a fresh core decides as it did."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from router.core_events import Failed, Finished, Report, Submit, Tick, Tokens
from router.event_log import LogReader
from tests.event_logs import Recording
from tests.integration.fake_worker import Faults, serve_workers
from tests.integration.router_shell import CONFIG, message, serve_router

pytestmark = pytest.mark.integration


async def test_what_the_shell_did_replays_to_the_same_decisions(tmp_path: Path) -> None:
    faults = {"prefill_0": Faults(), "prefill_1": Faults(), "decode_0": Faults(error_at=5), "decode_1": Faults(), "decode_2": Faults()}
    config = replace(CONFIG, max_running_requests=8)
    recording = Recording(config)
    async with serve_workers(**faults) as workers, serve_router(workers, config, core=recording.core) as router:
        calls = [asyncio.create_task(router.generate(message(prompt_tokens=20 + 3 * number))) for number in range(60)]
        await asyncio.sleep(0.05)
        for call in calls[::7]:
            call.cancel()
        await workers["decode_2"].stop()
        await asyncio.gather(*calls, return_exceptions=True)
        await router.becomes_idle()
    found = recording.replayed(tmp_path)
    assert found.difference is None
    with (tmp_path / "router.events").open("rb") as file:
        reader = LogReader(file)
        reader.read_header()
        kinds = {type(entry.event) for entry in reader.entries()}
    assert {Submit, Tokens, Failed, Finished, Report, Tick} <= kinds
