"""What the command line says where nobody is called: help, version, errors, tables and reports."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tandem import __version__
from tandem.cli import main
from tandem.cli_report import generate_report, models_table, predictions_table, receipt_line, status_report, status_table, write_report
from tandem.cluster_view import ClusterStatus, ModelCard, ModelPredictions, PredictionScore, ReplicaStatus
from tandem.completion import Choice, Completion
from tandem.domain import FinishReason, ModelId, PredictedTerm, Receipt, RequestId, Usage, WorkerLoad
from tandem.errors import ConfigError
from tests.unit.test_convert import LEASE

RECEIPT = Receipt(
    request_id=RequestId("r-1"),
    queue_s=0.001,
    dispatch_s=0.002,
    prefill_s=0.03,
    ttft_s=0.033,
    handoff_gap_s=0.004,
    e2e_s=0.5,
    prompt_tokens=100,
    output_tokens=20,
    cached_tokens=64,
    kv_bytes_shipped=4096,
    prefill_replica_id="prefill-0",
    decode_replica_id="decode-1",
    handed_off=True,
    predicted=(PredictedTerm(name="prefill_s", predicted=0.02),),
)
LOAD = WorkerLoad(running_requests=2, waiting_requests=1, kv_used_fraction=0.375)
REPLICA = ReplicaStatus(lease=LEASE, load=LOAD, is_reachable=False, predicted_work_s=1.25)
STATUS = ClusterStatus(cluster="test", router_id="r-0", queued_requests=3, running_requests=4, replicas=(REPLICA,), targets=())


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def shown(table: Table) -> str:
    console = Console(width=160, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"tandem {__version__}\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("up", "generate", "models", "status"))


def test_help_imports_neither_grpc_nor_an_engine() -> None:
    program = (
        "import sys, tandem.cli as c\ntry: c.main(['generate', '--help'])\nexcept SystemExit: print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.replace("'", "").strip("[]\n").split(", "))
    assert "typer" in loaded
    assert not loaded & {"grpc", "vllm", "torch", "ray", "redis", "rich.table"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "hi", "--endpoint", "nowhere"), "endpoint must be host:port"),
        (("status", "--endpoint", "http://x:1"), "endpoint must be host:port"),
        (("generate", "", "--endpoint", "x:1"), "prompt: must not be empty"),
        (("generate", "hi", "--endpoint", "x:1", "--temperature", "nan"), "sampling.temperature"),
        (("generate", "hi", "--endpoint", "x:1", "--max-tokens", "0"), "sampling.max_tokens"),
        (("generate", "hi", "--endpoint", "x:1", "--timeout-s", "-1"), "timeout_s"),
        (("generate", "a\udcff", "--endpoint", "x:1"), "prompt.text: is not valid UTF-8"),
        (("up", "--prefill", "0", "--decode", "0"), "at least one replica"),
        (("up", "--engine", "vlm"), "engine 'vlm' is not known; valid are vllm, simulated"),
        (("up", "--slowdown", "x=2"), "step_profile and slowdowns are for engine = 'simulated'"),
        (("up", "--engine", "simulated", "--slowdown", "x"), "--slowdown 'x' is not REPLICA=FACTOR"),
        (("up", "--engine", "simulated", "--step-profile", "none.toml"), "cannot read none.toml"),
    ],
)
def test_an_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tandem: error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_no_cluster_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TANDEM_ENDPOINT", raising=False)
    assert run("models") == 2
    assert "start one with `tandem up`" in capsys.readouterr().err


def test_a_wrong_argument_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate") == 2
    assert run("nonsense") == 2
    assert run("up", "--port", "70000") == 2


def test_the_receipt_line_names_times_tokens_and_workers() -> None:
    line = receipt_line(RECEIPT)
    assert "ttft 0.033 s (queue 0.001, dispatch 0.002, prefill 0.030)" in line
    assert "prompt 100 tokens (64 cached), output 20 tokens" in line
    assert "workers prefill-0 -> decode-1" in line
    assert "\n" not in line


def test_the_receipt_line_of_one_worker_says_why() -> None:
    line = receipt_line(Receipt(request_id=RequestId("r"), decode_replica_id="d-0", one_worker_reason="short"))
    assert "workers d-0 (short)" in line


def test_the_status_table_has_a_row_for_each_replica() -> None:
    text = shown(status_table(STATUS))
    assert "cluster test: 4 running, 3 queued" in text
    assert all(cell in text for cell in ("d-0", "decode", "ready, unreachable", "37.5%", "1.25 s"))


def test_the_status_table_names_stragglers() -> None:
    text = shown(status_table(replace(STATUS, replicas=(replace(REPLICA, is_reachable=True, is_straggler=True),))))
    assert "ready, straggler" in text


def test_predictions_are_shown_beside_what_happened_and_whether_they_are_used() -> None:
    ttft = PredictionScore(
        kind="ttft",
        outcomes_total=900,
        window_outcomes=200,
        predicted_p50=0.25,
        actual_p50=0.5,
        mean_error_fraction=0.41,
        q90_coverage_fraction=0.88,
    )
    length = PredictionScore(kind="output_tokens", window_outcomes=200, predicted_p50=64.0, actual_p50=60.0)
    good = ModelPredictions(model=ModelId("m"), is_trusted=True, scores=(ttft, length, replace(ttft, kind="tpot", actual_p50=0.0625)))
    bad = ModelPredictions(model=ModelId("n"), is_trusted=False, scores=(replace(ttft, kind="queue"),))
    table = predictions_table(replace(STATUS, predictions=(good, bad)))
    assert table is not None
    rows = [line.split("│")[1:-1] for line in shown(table).splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["m", "trusted", "TTFT", "0.250 s", "0.500 s", "41%", "88%", "200"],
        ["m", "trusted", "TPOT", "0.250 s", "0.062 s", "41%", "88%", "200"],
        ["n", "not trusted, decides without", "queue wait", "0.250 s", "0.500 s", "41%", "88%", "200"],
    ]


def test_before_anything_was_predicted_there_is_no_table_of_it() -> None:
    assert predictions_table(STATUS) is None
    assert predictions_table(replace(STATUS, predictions=(ModelPredictions(model=ModelId("m"), is_trusted=True),))) is None


def test_the_models_table_has_a_row_for_each_model() -> None:
    model = ModelCard(
        id=ModelId("tiny[red]"), context_tokens=512, block_size_tokens=16, prefill_replicas=1, decode_replicas=2, namespace="ab"
    )
    text = shown(models_table([model]))
    assert "tiny[red]" in text
    assert "512" in text


def test_reports_are_json_with_a_schema(tmp_path: Path) -> None:
    choice = Choice(index=0, text="a", token_ids=(1,), logprobs=(), finish_reason=FinishReason.STOP, stop_reason=None)
    usage = Usage(prompt_tokens=1, output_tokens=1, cached_tokens=0)
    path = tmp_path / "new" / "folder" / "report.json"
    write_report(path, generate_report(Completion(choices=(choice,), usage=usage, receipt=RECEIPT)))
    report = json.loads(path.read_text())
    assert (report["schema"], report["text"], report["token_ids"], report["finish_reason"]) == ("tandem.generate/1", "a", [1], "stop")
    assert report["receipt"]["predicted"] == [{"name": "prefill_s", "predicted": 0.02, "actual": None}]
    write_report(path, status_report(STATUS))
    assert json.loads(path.read_text())["replicas"][0]["lease"]["role"] == "decode"


def test_a_report_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_report(tmp_path / "file" / "x.json", {})
