"""The parts of the load test that call nobody: settings, planning, event streams, the table."""

import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tandem.bench.command import BenchResult
from tandem.bench.event_stream import EventStream
from tandem.bench.openai_target import base_url
from tandem.bench.options import BenchOptions
from tandem.bench.plan import plan_prompts, plan_requests, read_trace, warmup_requests
from tandem.bench.result_table import bench_lines, bench_table
from tandem.bench.target import ServedModel, choose_model
from tandem.domain import Slo
from tandem.errors import ConfigError, ProtocolError
from tandem.report import Outcome, RequestRecord, load_report

MODEL = ServedModel(id="tiny", context_tokens=512)
UNKNOWN = ServedModel(id="other", context_tokens=None)


def write_trace(folder: Path) -> Path:
    path = folder / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1024, "output_length": 16, "hash_ids": [0, 1]}\n' * 3)
    return path


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"endpoint": "a:1", "url": "http://a:1"}, "--endpoint .* and --url"),
        ({"rate_rps": 0.0}, "--rate must be above 0 requests a second, or inf, got 0.0"),
        ({"rate_rps": math.nan}, "--rate"),
        ({"rate_rps": -math.inf}, "--rate"),
        ({"requests": 0}, "--requests must be at least 1, got 0"),
        ({"duration_s": math.inf}, "--duration-s"),
        ({"concurrency": 0}, "--concurrency"),
        ({"slo_ttft_s": 0.0}, "--slo-ttft-s"),
        ({"slo_tpot_s": -1.0}, "--slo-tpot-s"),
        ({"timeout_s": math.nan}, "--timeout-s"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"warmup": -1}, "--warmup"),
        ({"vocabulary_tokens": 3}, "--vocabulary-tokens must be 4 or more"),
        ({"shared_prefix_tokens": -1}, "--shared-prefix-tokens"),
        ({"shared_prefix_tokens": 11, "prompt": "10:20"}, "--shared-prefix-tokens .* 10 tokens, got 11"),
        ({"prompt": "x"}, "--prompt-tokens"),
        ({"output": "0"}, "--output-tokens"),
        ({"trace_scale": 0.5}, "--trace-scale needs --trace"),
        ({"trace_scale": 0.0}, "--trace-scale must be"),
        ({"rate_rps": math.inf, "duration_s": 1.0}, "--rate inf .* needs --requests"),
        ({"trace": Path("t"), "prompt": "5"}, "--prompt-tokens does not go with --trace"),
        ({"trace": Path("t"), "output": "5"}, "--output-tokens does not go with --trace"),
        ({"trace": Path("t"), "shared_prefix_tokens": 5}, "--shared-prefix-tokens does not go with --trace"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BenchOptions(**settings).validate()


def test_good_settings_pass() -> None:
    BenchOptions().validate()
    BenchOptions(rate_rps=math.inf, requests=5, shared_prefix_tokens=256).validate()
    BenchOptions(trace=Path("t"), rate_rps=2.0, duration_s=3.0, trace_scale=0.1).validate()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (BenchOptions(), 100),
        (BenchOptions(requests=7), 7),
        (BenchOptions(rate_rps=2.0, duration_s=10.0), 20),
        (BenchOptions(rate_rps=2.0, duration_s=10.0, requests=5), 5),
        (BenchOptions(rate_rps=2.0, duration_s=1.0, requests=50), 2),
        (BenchOptions(rate_rps=0.001, duration_s=1.0), 1),
        (BenchOptions(rate_rps=math.inf, requests=9, duration_s=1.0), 9),
    ],
)
def test_requests_or_the_duration_say_how_many_there_are(options: BenchOptions, count: int) -> None:
    assert len(plan_requests(options, None, MODEL)[0]) == count


def test_the_described_settings_hold_no_infinity() -> None:
    burst = BenchOptions(rate_rps=math.inf, requests=5).described()
    assert (burst["rate_rps"], burst["arrivals"]) == (None, "burst")
    assert burst["prompt_tokens"] == {"low_tokens": 256, "high_tokens": 256}
    poisson, trace = BenchOptions().described(), BenchOptions(trace=Path("a/t.jsonl")).described()
    assert (poisson["rate_rps"], poisson["arrivals"]) == (1.0, "poisson")
    assert (trace["rate_rps"], trace["arrivals"], trace["trace"], trace["output_tokens"]) == (None, "trace", "t.jsonl", None)


def test_a_synthetic_workload_that_is_too_long_for_the_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="600 tokens together are more than the 512 of tiny"):
        plan_requests(BenchOptions(prompt="500", output="100"), None, MODEL)
    assert plan_requests(BenchOptions(prompt="500", output="100"), None, UNKNOWN)[1] == []


def test_a_trace_is_cut_to_the_model_with_a_warning(tmp_path: Path) -> None:
    options = BenchOptions(trace=write_trace(tmp_path))
    rows = read_trace(options)
    requests, notes = plan_requests(options, rows, MODEL)
    assert [request.prompt_tokens for request in requests] == [496] * 3
    assert notes == ["3 of 3 requests of the trace were cut to the model's context of 512 tokens"]
    assert plan_requests(options, rows, UNKNOWN) == (plan_requests(options, rows, ServedModel(id="x", context_tokens=2048))[0], [])


def test_a_scaled_trace_shares_scaled_blocks(tmp_path: Path) -> None:
    options = BenchOptions(trace=write_trace(tmp_path), trace_scale=0.125)
    (first, second, _), notes = plan_requests(options, read_trace(options), MODEL)
    prompts = plan_prompts(options)
    assert (notes, prompts.block_tokens, len(prompts.token_ids(first))) == ([], 64, 128)
    assert prompts.token_ids(first) == prompts.token_ids(second)


def test_a_trace_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--trace: cannot read"):
        read_trace(BenchOptions(trace=tmp_path / "none"))
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="--trace: cannot read"):
        read_trace(BenchOptions(trace=tmp_path / "bytes"))
    assert read_trace(BenchOptions()) is None


def test_warm_up_requests_have_the_lengths_of_the_workload_and_prompts_of_their_own() -> None:
    options = BenchOptions(requests=2, prompt="64:128", shared_prefix_tokens=32)
    requests, _ = plan_requests(options, None, MODEL)
    extra = warmup_requests(requests, 3)
    assert [request.prompt_tokens for request in extra] == [requests[number].prompt_tokens for number in (0, 1, 0)]
    prompts = plan_prompts(options)
    heads = {tuple(prompts.token_ids(request)[:16]) for request in (*extra, requests[0])}
    assert len(heads) == 4
    assert warmup_requests(requests, 0) == []


def test_the_only_model_is_the_default() -> None:
    assert choose_model([MODEL], None) == MODEL
    assert choose_model([MODEL, UNKNOWN], "other") == UNKNOWN
    assert choose_model([], "any") == ServedModel(id="any", context_tokens=None)


@pytest.mark.parametrize(
    ("served", "wanted", "words"),
    [
        ([], None, "lists no model: give --model"),
        ([MODEL, UNKNOWN], None, "--model: the endpoint serves tiny, other"),
        ([MODEL], "x", "no model named x: the endpoint serves tiny"),
    ],
)
def test_a_model_that_cannot_be_chosen_is_an_error(served: list[ServedModel], wanted: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_model(served, wanted)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/completions"])
def test_a_url_may_name_the_api(url: str) -> None:
    assert base_url(url) == "http://h:1"
    assert base_url("https://h/prefix/v1") == "https://h/prefix"


@pytest.mark.parametrize("url", ["h:1", "ftp://h", "http://", "http://h:99999", "http://h?x=1", "http://[h", ""])
def test_a_url_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="--url must be"):
        base_url(url)


def test_events_come_whole_however_the_bytes_are_cut() -> None:
    payload = b': ping\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata: one\ndata:two\n\n\ndata: [DONE]\n\n'
    whole = [b'{"a": 1}', b"one\ntwo", b"[DONE]"]
    assert EventStream().feed(payload) == whole
    by_byte = EventStream()
    assert [event for byte in payload for event in by_byte.feed(bytes([byte]))] == whole


def test_an_event_that_does_not_end_is_an_error() -> None:
    stream = EventStream()
    assert stream.feed(b"data: " + b"x" * 4_000_000) == []
    with pytest.raises(ProtocolError, match="an event is larger than"):
        stream.feed(b"x" * 1_000_000)


def result(is_interrupted: bool = False) -> BenchResult:
    good = RequestRecord(scheduled_s=0.0, prompt_tokens=5, asked_tokens=2, turn_s=0.0, sent_s=0.0)
    bad = RequestRecord(scheduled_s=0.0, prompt_tokens=5, asked_tokens=2, turn_s=0.0, sent_s=0.0)
    gone = RequestRecord(scheduled_s=0.0, prompt_tokens=5, asked_tokens=2, sent_s=0.0, outcome=Outcome.CANCELLED)
    for now_s in (0.25, 0.75):
        good.take_tokens(now_s, 1)
    good.end()
    bad.fail("queue_full", "try later")
    report = load_report([good, bad, gone], duration_s=2.0, loop_lags_s=[0.001], slo=Slo(), notes=["a note"])
    workload: dict[str, object] = {"model": "tiny[red]", "endpoint": "h:1", "endpoint_kind": "grpc"}
    return BenchResult(workload=workload, report=report, is_interrupted=is_interrupted)


def test_the_table_shows_milliseconds() -> None:
    console = Console(width=160, markup=False)
    with console.capture() as capture:
        console.print(bench_table(result()))
    text = capture.get()
    assert all(cell in text for cell in ("tiny[red] at h:1 (grpc)", "TTFT", "250.00", "500.00", "750.00"))


def test_the_lines_name_counts_rates_errors_and_warnings() -> None:
    lines = list(bench_lines(result(is_interrupted=True)))
    assert lines[0] == "requests: 3 sent, 1 completed, 1 failed, 1 cancelled, in 2.00 s"
    assert "rates: 0.500 requests/s, goodput 0.500 requests/s, 1.0 output tokens/s" in lines
    assert "failed: 1 x queue_full: try later" in lines
    assert "warning: a note" in lines
    assert lines[-1].startswith("interrupted")
