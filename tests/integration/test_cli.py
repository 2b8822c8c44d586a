"""The command line as its user has it: processes, pipes and Ctrl-C, against a fake cluster."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem.endpoint import write_endpoint_file
from tests.integration.fake_inference import FakeInference, serve

pytestmark = pytest.mark.integration


@pytest.fixture
async def fake() -> FakeInference:
    return FakeInference()


@pytest.fixture
async def environ(fake: FakeInference, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """An environment whose newest endpoint file names the fake."""
    environ = {name: value for name, value in os.environ.items() if name != "TANDEM_ENDPOINT"}
    environ |= {"XDG_RUNTIME_DIR": str(tmp_path)}
    async with serve(fake) as server:
        write_endpoint_file("fake", {"grpc": server.address}, environ)
        yield environ


async def start(environ: dict[str, str], *arguments: str, stdin: int = DEVNULL) -> Process:
    program = "from tandem.cli import main; main()"
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, env=environ, stdin=stdin, stdout=PIPE, stderr=PIPE
    )


async def run(environ: dict[str, str], *arguments: str, stdin: bytes | None = None) -> tuple[int | None, str, str]:
    """Exit status, stdout, stderr."""
    process = await start(environ, *arguments, stdin=DEVNULL if stdin is None else PIPE)
    output, errors = await process.communicate(stdin)
    return process.returncode, output.decode(), errors.decode()


async def test_generate_prints_the_text_and_on_request_the_receipt(environ: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "a" / "b.json"
    status, output, errors = await run(environ, "generate", "hello", "--max-tokens", "2", "--receipt", "--json", str(report))
    assert (status, output) == (0, "t100 t101 \n")
    assert errors.startswith("receipt ")
    assert "ttft 0.250 s" in errors
    assert errors.count("\n") == 1
    assert json.loads(report.read_text())["token_ids"] == [100, 101]


async def test_generate_prints_nothing_else(environ: dict[str, str]) -> None:
    assert await run(environ, "generate", "hello", "--max-tokens", "1") == (0, "t100 \n", "")


async def test_a_dash_reads_the_prompt_from_standard_input(environ: dict[str, str], fake: FakeInference) -> None:
    await run(environ, "generate", "-", stdin="h\u00e9llo\nthere".encode())
    assert fake.requests[0].text == "h\u00e9llo\nthere"


async def test_standard_input_that_is_no_text_is_an_error(environ: dict[str, str], fake: FakeInference) -> None:
    status, _, errors = await run(environ, "generate", "-", stdin=b"\xff")
    assert (status, fake.requests) == (2, [])
    assert errors == "tandem: error: prompt: standard input is not UTF-8 (invalid start byte at byte 0)\n"


async def test_chat_and_options_arrive(environ: dict[str, str], fake: FakeInference) -> None:
    await run(environ, "generate", "hi", "--chat", "--model", "m", "--stop", "A", "--stop", "B", "--seed", "7", "--temperature", "0.5")
    request = fake.requests[0]
    assert [(message.role, message.content) for message in request.chat.messages] == [("user", "hi")]
    assert (request.model, list(request.sampling.stop), request.sampling.seed, request.sampling.temperature) == ("m", ["A", "B"], 7, 0.5)


async def test_models_and_status_print_tables(environ: dict[str, str], tmp_path: Path) -> None:
    status, output, _ = await run(environ, "models")
    assert status == 0
    assert "tiny" in output
    report = tmp_path / "status.json"
    status, output, _ = await run(environ, "status", "--json", str(report))
    assert status == 0
    assert all(word in output for word in ("d-0", "d-1", "p-0", "unreachable", "37.5%"))
    assert [replica["lease"]["replica_id"] for replica in json.loads(report.read_text())["replicas"]] == ["d-0", "d-1", "p-0"]


async def test_an_error_of_the_server_is_one_line(environ: dict[str, str]) -> None:
    assert await run(environ, "generate", "hi", "--model", "unknown") == (2, "", "tandem: error: no model named unknown\n")


async def test_an_error_in_mid_stream_comes_after_the_text(environ: dict[str, str]) -> None:
    status, output, errors = await run(environ, "generate", "hi", "--model", "endless", "--timeout-s", "1")
    assert status == 2
    assert set(output) == {"x", "\n"}
    assert errors == "tandem: error: the deadline passed before the answer was complete\n"


async def test_no_server_is_one_line(environ: dict[str, str]) -> None:
    status, output, errors = await run({**environ, "TANDEM_ENDPOINT": "127.0.0.1:9"}, "generate", "hi")
    assert (status, output) == (2, "")
    assert errors.startswith("tandem: error: failed to connect")
    assert errors.count("\n") == 1


async def test_ctrl_c_is_quiet_and_frees_the_request(environ: dict[str, str], fake: FakeInference) -> None:
    process = await start(environ, "generate", "hi", "--model", "endless")
    assert process.stdout is not None
    assert await process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (130, b"")
    await asyncio.wait_for(fake.was_cancelled.wait(), 10)


async def test_text_appears_while_it_is_generated_and_a_closed_pipe_ends_it(environ: dict[str, str], fake: FakeInference) -> None:
    process = await start(environ, "generate", "hi", "--model", "endless")
    assert process.stdout is not None
    assert await process.stdout.read(3) in (b"x", b"xx", b"xxx")
    assert not fake.was_cancelled.is_set()
    process.stdout._transport.close()  # type: ignore[attr-defined]
    await asyncio.wait_for(fake.was_cancelled.wait(), 10)
    await process.communicate()
    assert process.returncode == 1
