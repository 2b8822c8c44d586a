"""`tandem bench` against a fake OpenAI server, a fake router and the real platform: what is sent, counted and reported."""

import asyncio
import json
import math
import os
import pty
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tandem.bench.command import BenchResult, run_bench
from tandem.bench.load import LoadRun, Progress
from tandem.bench.options import BenchOptions
from tandem.bench.tandem_target import TandemTarget
from tandem.bench.target import Call
from tandem.errors import AuthenticationError, ConfigError, ProtocolError, TandemError, UnavailableError
from tandem.report import Outcome, RequestRecord
from tandem.tenancy import Tenant, hash_key
from tandem.workload import PlannedRequest
from tests.integration.conftest import Cluster
from tests.integration.fake_inference import FakeInference, serve
from tests.integration.fake_openai import FakeOpenAI, serve_openai
from tests.integration.fake_worker import Faults
from tests.integration.http_router import serve_http

pytestmark = pytest.mark.integration

SPREAD_KEYS = {"count", "mean", "p50", "p90", "p99", "min", "max"}
REPORT_KEYS = {
    *("schema", "workload", "counts", "errors", "error_examples", "ttft", "itl", "tpot", "e2e", "goodput_rps"),
    *("slo_attainment_fraction", "request_rps", "output_tokens_per_s", "duration_s", "send_lag", "loop_lag", "concurrency_wait"),
    *("harness_lag_p99_s", "warnings", "is_interrupted"),
}


@pytest.fixture
async def fake() -> AsyncIterator[FakeOpenAI]:
    made = FakeOpenAI()
    async with serve_openai(made):
        yield made


async def burst(fake: FakeOpenAI, **settings: Any) -> BenchResult:
    """A few short requests at once."""
    defaults: dict[str, Any] = {"url": fake.url, "rate_rps": math.inf, "requests": 3, "prompt": "16", "output": "4", "timeout_s": 10.0}
    return await run_bench(BenchOptions(**(defaults | settings)))


def check_shape(report: dict[str, Any]) -> None:
    """The JSON object as other programs read it."""
    assert set(report) == REPORT_KEYS
    assert report["schema"] == "tandem.bench/1"
    assert set(report["counts"]) == {"sent", "completed", "failed", "cancelled", "prompt_tokens", "output_tokens"}
    assert all(set(report[name]) == SPREAD_KEYS for name in ("ttft", "itl", "tpot", "e2e", "send_lag", "loop_lag", "concurrency_wait"))
    assert {"endpoint_kind", "endpoint", "model", "rate_rps", "arrivals", "requests", "seed"} <= set(report["workload"])
    json.dumps(report, allow_nan=False, default=_no_json)


def _no_json(value: object) -> object:
    raise AssertionError(f"{value!r} is no JSON")


async def test_requests_are_greedy_token_ids_of_exact_length(fake: FakeOpenAI) -> None:
    await burst(fake, prompt="16:32", output="2:6", shared_prefix_tokens=8)
    assert len(fake.requests) == 3
    for body in fake.requests:
        assert 16 <= len(body["prompt"]) <= 32
        assert all(type(token_id) is int for token_id in body["prompt"])
        assert 2 <= body["max_tokens"] <= 6
        assert (body["model"], body["temperature"], body["ignore_eos"], body["stream"]) == ("tiny", 0, True, True)
        assert body["stream_options"] == {"include_usage": True}
    assert len({tuple(body["prompt"][:8]) for body in fake.requests}) == 1
    assert len({tuple(body["prompt"][:16]) for body in fake.requests}) == 3


async def test_the_report_counts_what_was_sent_and_came(fake: FakeOpenAI) -> None:
    result = await burst(fake)
    report = result.as_json()
    check_shape(report)
    assert report["counts"] == {"sent": 3, "completed": 3, "failed": 0, "cancelled": 0, "prompt_tokens": 48, "output_tokens": 12}
    assert (result.report.ttft.count, result.report.itl.count, result.report.tpot.count, result.report.e2e.count) == (3, 9, 3, 3)
    assert result.report.slo_attainment_fraction == 1.0
    assert (result.workload["endpoint_kind"], result.workload["endpoint"], result.workload["model"]) == ("openai", fake.url, "tiny")
    assert not result.is_interrupted


async def test_a_message_of_two_tokens_is_one_gap_and_usage_counts_tokens(fake: FakeOpenAI) -> None:
    fake.models = None
    result = await burst(fake, model="pairs")
    assert result.report.counts.output_tokens == 12
    assert result.report.itl.count == 3
    assert result.report.warnings == () or "usage" not in " ".join(result.report.warnings)


async def test_without_usage_messages_are_counted_and_the_report_says_so(fake: FakeOpenAI) -> None:
    fake.models = None
    result = await burst(fake, model="no-usage")
    assert result.report.counts.output_tokens == 12
    assert "no usage for 3 requests" in result.report.warnings[0]


@pytest.mark.parametrize(
    ("model", "reason", "words"),
    [
        ("full", "http_429", "the queue\\nis full"),
        ("empty", "no_tokens", "without any output"),
        ("damaged", "protocol", "no JSON"),
        ("unfinished", "protocol", "without a finish reason"),
        ("broken", "broken_stream", "not enough data"),
        ("error", "stream_error", "lost"),
    ],
)
async def test_a_failure_is_counted_by_its_reason(fake: FakeOpenAI, model: str, reason: str, words: str) -> None:
    fake.models = None
    report = (await burst(fake, model=model)).report
    assert (report.counts.sent, report.counts.failed, report.counts.completed) == (3, 3, 0)
    assert report.errors == {reason: 3}
    assert words.lower() in report.error_examples[reason].lower()
    assert report.goodput_rps == 0.0


async def test_a_request_that_takes_too_long_fails_with_the_deadline(fake: FakeOpenAI) -> None:
    fake.models = None
    report = (await burst(fake, model="silent", timeout_s=0.2)).report
    assert report.errors == {"deadline": 3}


async def test_slow_answers_do_not_hold_up_later_requests(fake: FakeOpenAI) -> None:
    fake.delay_s = 0.5
    await burst(fake, requests=20, rate_rps=200.0)
    assert fake.most_in_flight == 20


async def test_concurrency_bounds_the_requests_in_flight(fake: FakeOpenAI) -> None:
    fake.delay_s = 0.02
    report = (await burst(fake, requests=6, concurrency=2)).report
    assert (fake.most_in_flight, report.counts.completed) == (2, 6)


async def test_warm_up_requests_do_not_count_and_have_prompts_of_their_own(fake: FakeOpenAI) -> None:
    report = (await burst(fake, warmup=2)).report
    assert (report.counts.sent, len(fake.requests)) == (3, 5)
    assert len({tuple(body["prompt"]) for body in fake.requests}) == 5


async def test_a_warm_up_that_fails_ends_the_test(fake: FakeOpenAI) -> None:
    fake.models = None
    with pytest.raises(UnavailableError, match=r"a warm-up request failed \(http_429\): .*is full"):
        await burst(fake, model="full", warmup=1)
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("environ", "api_key", "sent"),
    [
        ({}, None, None),
        ({"OPENAI_API_KEY": "abc"}, None, "Bearer abc"),
        ({"OPENAI_API_KEY": "abc", "TANDEM_API_KEY": "sk-a"}, None, "Bearer sk-a"),
        ({"OPENAI_API_KEY": "abc", "TANDEM_API_KEY": "sk-a"}, "sk-b", "Bearer sk-b"),
    ],
)
async def test_the_key_is_sent_and_is_in_no_report(
    fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], api_key: str | None, sent: str | None
) -> None:
    for name in ("OPENAI_API_KEY", "TANDEM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    options = BenchOptions(url=fake.url, rate_rps=math.inf, requests=1, prompt="8", output="2")
    result = await run_bench(options, api_key)
    assert fake.headers[0].get("Authorization") == sent
    assert not any(key in json.dumps(result.as_json()) for key in ("sk-a", "sk-b", "api_key"))


async def test_a_router_with_tenants_is_loaded_over_http_with_the_tenants_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_API_KEY", raising=False)
    tenant = Tenant(name="alice", key_sha256=(hash_key("sk-alice"),))
    async with serve_http(tenants=(tenant,), decode_0=Faults()) as router:
        options = BenchOptions(url=f"http://{router.server.address}", rate_rps=math.inf, requests=2, prompt="8", output="2")
        with pytest.raises(AuthenticationError, match="give TANDEM_API_KEY or --api-key"):
            await run_bench(options, "sk-bob")
        monkeypatch.setenv("TANDEM_API_KEY", "sk-alice")
        assert (await run_bench(options)).report.counts.completed == 2


@pytest.mark.parametrize(
    ("models", "error", "words"),
    [
        (None, ConfigError, "give --model"),
        ([], ConfigError, "give --model"),
        ([{"id": "a"}, {"id": "b"}, {"no": "id"}], ConfigError, "the endpoint serves a, b"),
        ("text", ProtocolError, "does not list models"),
    ],
)
async def test_a_model_that_is_not_clear_is_an_error(fake: FakeOpenAI, models: Any, error: type[TandemError], words: str) -> None:
    fake.models = models
    with pytest.raises(error, match=words):
        await burst(fake)
    assert fake.requests == []


async def test_a_server_that_is_not_there_is_an_error(fake: FakeOpenAI) -> None:
    with pytest.raises(UnavailableError, match=r"cannot reach http://127\.0\.0\.1:9"):
        await burst(fake, url="http://127.0.0.1:9")


async def test_a_trace_is_replayed(fake: FakeOpenAI, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 640, "output_length": 48, "hash_ids": [0, 1]}\n' * 3)
    report: dict[str, Any] = (
        await burst(fake, prompt=None, output=None, trace=trace, trace_scale=0.0625, rate_rps=None, requests=2)
    ).as_json()
    assert [(len(body["prompt"]), body["max_tokens"]) for body in fake.requests] == [(40, 3)] * 2
    assert fake.requests[0]["prompt"] == fake.requests[1]["prompt"]
    assert report["workload"]["trace"] == "t.jsonl"
    check_shape(report)


async def test_stopping_cancels_what_is_in_flight_and_reports_the_rest(fake: FakeOpenAI) -> None:
    fake.models = None

    stops = list[asyncio.Task[None]]()

    async def stop_in_flight(run: LoadRun) -> None:
        await fake.has_request.wait()
        run.stop()

    options = BenchOptions(url=fake.url, model="endless", rate_rps=10.0, requests=1000)
    result = await run_bench(options, on_start=lambda run: stops.append(asyncio.create_task(stop_in_flight(run))))
    await stops[0]
    assert result.is_interrupted
    assert result.report.counts.cancelled == result.report.counts.sent < 1000
    check_shape(result.as_json())
    await asyncio.wait_for(fake.is_idle.wait(), 10)


async def test_a_run_that_is_stopped_before_it_starts_sends_nothing(fake: FakeOpenAI) -> None:
    result = await run_bench(BenchOptions(url=fake.url, requests=2), on_start=LoadRun.stop)
    assert (result.report.counts.sent, result.is_interrupted, fake.requests) == (0, True, [])


async def test_progress_is_told() -> None:
    seen: list[tuple[int, int, int]] = []

    def prepare(request: PlannedRequest) -> Call:
        async def call(record: RequestRecord) -> None:
            record.fail("no", "no")

        return call

    def show(progress: Progress) -> None:
        seen.append((progress.total, progress.completed, progress.failed))

    run = LoadRun([PlannedRequest(index=0, send_at_s=0.0, prompt_tokens=1, output_tokens=1)], prepare, on_tick=show)
    await run.run()
    assert seen[0] == (1, 0, 0)
    assert (run.progress.failed, run.progress.in_flight, run.records[0].outcome) == (1, 0, Outcome.FAILED)


async def test_a_router_is_loaded_through_the_sdk() -> None:
    fake = FakeInference()
    async with serve(fake) as server:
        options = BenchOptions(endpoint=server.address, rate_rps=math.inf, requests=3, prompt="16", output="4")
        result = await run_bench(options)
    assert {(len(request.token_ids.ids), request.sampling.max_tokens, request.sampling.ignore_eos) for request in fake.requests} == {
        (16, 4, True)
    }
    report = result.as_json()
    check_shape(report)
    assert report["counts"] == {"sent": 3, "completed": 3, "failed": 0, "cancelled": 0, "prompt_tokens": 48, "output_tokens": 12}
    assert (result.report.itl.count, result.workload["endpoint_kind"]) == (9, "grpc")


async def test_a_routers_refusal_is_counted_by_its_reason() -> None:
    request = PlannedRequest(index=0, send_at_s=0.0, prompt_tokens=2, output_tokens=4)
    async with serve(FakeInference()) as server:
        target = TandemTarget(server.address, timeout_s=10.0)
        run = LoadRun([request], lambda planned: target.prepare(planned, [5, 6], "full"))
        await run.run()
        await target.close()
    assert (run.records[0].outcome, run.records[0].reason) == (Outcome.FAILED, "queue_full")


@pytest.mark.asyncio(loop_scope="session")
async def test_the_platform_is_loaded_and_answers_every_request_in_full(cluster: Cluster) -> None:
    options = BenchOptions(
        endpoint=cluster.platform.router_address,
        rate_rps=20.0,
        requests=12,
        prompt="32:200",
        output="4:16",
        shared_prefix_tokens=32,
        warmup=1,
    )
    result = await run_bench(options)
    check_shape(result.as_json())
    assert (result.report.counts.completed, result.report.errors) == (12, {})
    assert result.report.counts.output_tokens == result.workload["mean_output_tokens"] * 12  # type: ignore[operator]
    assert result.report.counts.prompt_tokens == result.workload["mean_prompt_tokens"] * 12  # type: ignore[operator]


async def start(*arguments: str, stderr: int = PIPE) -> Process:
    program = "from tandem.cli import main; main()"
    environ = {**os.environ, "TERM": "xterm"}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, "bench", *arguments, env=environ, stdin=DEVNULL, stdout=PIPE, stderr=stderr
    )


async def test_the_command_prints_the_result_and_writes_the_report(fake: FakeOpenAI, tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    sizes = ("--rate", "inf", "--requests", "2", "--prompt-tokens", "8", "--output-tokens", "2")
    process = await start("--url", fake.url, *sizes, "--slo-ttft-s", "60", "--json", str(path))
    output, errors = await process.communicate()
    assert (process.returncode, errors.decode()) == (0, "")
    assert all(words in output.decode() for words in ("TTFT", "ITL", "TPOT", "E2E", "2 sent, 2 completed, 0 failed", "goodput"))
    report = json.loads(path.read_text())
    check_shape(report)
    assert report["workload"]["arrivals"] == "burst"


async def test_the_command_ends_with_status_1_where_requests_failed(fake: FakeOpenAI) -> None:
    fake.models = None
    process = await start("--url", fake.url, "--model", "full", "--rate", "inf", "--requests", "2")
    output, _ = await process.communicate()
    assert process.returncode == 1
    assert "failed: 2 x http_429" in output.decode()


async def test_a_terminal_shows_the_progress(fake: FakeOpenAI) -> None:
    terminal, its_end = pty.openpty()
    try:
        process = await start("--url", fake.url, "--rate", "inf", "--requests", "2", "--output-tokens", "2", stderr=its_end)
        os.close(its_end)
        output, _ = await process.communicate()
        shown = os.read(terminal, 65_536).decode()
    finally:
        os.close(terminal)
    assert (process.returncode, "2 sent, 2 completed" in output.decode()) == (0, True)
    assert "0 in flight, 0 failed" in shown


async def test_ctrl_c_prints_what_there_is(fake: FakeOpenAI, tmp_path: Path) -> None:
    fake.models = None
    path = tmp_path / "bench.json"
    process = await start("--url", fake.url, "--model", "endless", "--rate", "50", "--json", str(path))
    await asyncio.wait_for(fake.has_request.wait(), 30)
    process.send_signal(signal.SIGINT)
    output, errors = await process.communicate()
    assert (process.returncode, errors.decode()) == (130, "")
    assert "interrupted" in output.decode()
    assert json.loads(path.read_text())["is_interrupted"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--url", "http://127.0.0.1:9"), "cannot reach http://127.0.0.1:9"),
        (("--endpoint", "127.0.0.1:9"), "failed to connect"),
        (("--url", "nowhere"), "--url must be http://HOST:PORT"),
        (("--rate", "0"), "--rate must be above 0"),
    ],
)
async def test_an_error_before_the_run_is_one_line_and_status_2(arguments: tuple[str, ...], words: str) -> None:
    process = await start(*arguments)
    output, errors = await process.communicate()
    assert (process.returncode, output) == (2, b"")
    assert errors.decode().startswith("tandem: error: ")
    assert words in errors.decode()
    assert errors.count(b"\n") == 1
