"""`tandem top` in front of a real router: what it shows of predictions, and how it ends."""

import asyncio
import os
import signal
import sys

import pytest

from tests.event_logs import Recording
from tests.integration.fake_worker import Faults, serve_workers
from tests.integration.router_shell import CONFIG, eventually, message, serve_router

pytestmark = pytest.mark.integration


async def test_top_shows_predicted_beside_actual_until_ctrl_c() -> None:
    recording = Recording(CONFIG)
    async with serve_workers(prefill_0=Faults(), decode_0=Faults()) as workers, serve_router(workers, core=recording.core) as router:
        for number in range(5):
            await router.generate(message(prompt_tokens=40 + number))
        environ = {**os.environ, "COLUMNS": "150"}
        command = (sys.executable, "-m", "tandem", "top", "--endpoint", router.address, "--interval-s", "0.1")
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environ)
        await eventually(lambda: sum(b"\xa8replicas" in record for record in recording.kept.records) > 3, timeout_s=60)
        process.send_signal(signal.SIGINT)
        output, _ = await process.communicate()
    assert process.returncode == 130
    rows = [line.split("│")[1:-1] for line in output.decode().splitlines() if "trusted" in line]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [
        ["m", "trusted", what] for what in ("TTFT", "queue wait", "TPOT", "E2E")
    ]
    assert {row[-1].strip() for row in rows} == {"5"}
