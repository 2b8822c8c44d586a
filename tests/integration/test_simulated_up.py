"""`tandem up --engine simulated`: eight replicas without vLLM that hand off through real blocks and go on after a death."""

import json
import os
import shutil
import signal
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tandem.cluster_view import ClusterStatus
from tandem.engine.model_files import bundled_model_path
from tandem.engine.simulated_tokens import TokenDraws
from tandem.engine.token_text import load_tokenizer, whole_words
from tests.integration.platform_run import Run, ready, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROFILE = """
base_s = 0.01
prefill_token_s = 3e-4
eos_fraction = 0.0
"""
PROMPT_TOKENS = 600
OUTPUT_TOKENS = 400
OWN_BYTES = 80 << 20


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    user = Path(tempfile.mkdtemp(prefix="td", dir="/tmp"))
    profile = user / "profile.toml"
    profile.write_text(PROFILE)
    arguments = ("--engine=simulated", f"--step-profile={profile}", "--prefill=4", "--decode=4", "--routers=2")
    started = Run(user, "--port=0", "--http-port=0", *arguments)
    yield started.wait_ready()
    started.end()
    shutil.rmtree(user, ignore_errors=True)


def prompt(number: int) -> list[int]:
    """Prompts that share no block."""
    return [3 + (number * 7919 + position * 31) % 2000 for position in range(PROMPT_TOKENS)]


def expected(token_ids: list[int], count: int) -> tuple[int, ...]:
    """What any replica says to that."""
    words = whole_words(load_tokenizer(bundled_model_path()))
    draws = TokenDraws(token_ids, seed=0, words=words, eos_token_id=0, eos_fraction=0.0)
    return tuple(draws.draw() for _ in range(count))


def test_it_says_everywhere_that_it_is_simulated(run: Run) -> None:
    assert "engine    simulated for bundled" in run.words
    assert "zygote" not in run.counts()
    assert run.cli("status").stdout.count("simulated") == 8
    assert "simulated" in run.cli("models").stdout
    with urllib.request.urlopen(f"{run.http()}/v1/models", timeout=10) as answer:
        assert [model["engine"] for model in json.load(answer)["data"]] == ["simulated"]


def test_a_prompt_is_handed_off_through_the_store(run: Run) -> None:
    token_ids = prompt(1)
    with run.client() as client:
        answer = client.generate(token_ids, max_tokens=20)
    assert answer.token_ids == expected(token_ids, 20)
    assert answer.receipt is not None
    assert answer.receipt.handed_off
    assert answer.receipt.prefill_replica_id != answer.receipt.decode_replica_id
    assert answer.receipt.kv_bytes_shipped == PROMPT_TOKENS // 32 * 4096
    assert answer.receipt.decode_recomputed_tokens < 32 + 1


def test_chat_over_http_has_text(run: Run) -> None:
    body = {"model": "bundled", "max_tokens": 12, "messages": [{"role": "user", "content": "Say something"}]}
    request = urllib.request.Request(
        f"{run.http(1)}/v1/chat/completions", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        choice = json.load(answer)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["content"]) > 12


def test_a_replica_is_light_and_has_neither_vllm_nor_torch(run: Run) -> None:
    replicas = run.processes("replica")
    assert len(replicas) == 8
    for replica in replicas:
        process = psutil.Process(replica.pid)
        assert process.memory_full_info().uss < OWN_BYTES
        assert not any("/torch/" in item.path or "/vllm/" in item.path for item in process.memory_maps())


def busy_ids(status: ClusterStatus) -> list[str]:
    return [item.lease.replica_id for item in status.replicas if item.load.running_requests]


def test_output_goes_on_with_the_same_tokens_after_its_worker_is_killed(run: Run) -> None:
    token_ids = prompt(2)
    received: list[int] = []
    is_killed = False
    with run.client() as client, client.stream(token_ids, max_tokens=OUTPUT_TOKENS) as stream:
        for chunk in stream:
            received += chunk.token_ids
            if not is_killed and len(received) >= 20:
                is_killed = True
                wait_for(lambda: len(busy_ids(client.status())) == 1)  # its load is reported five times a second
                (busy_id,) = busy_ids(client.status())
                for process in run.processes("replica"):
                    if f'"{busy_id}"' in " ".join(psutil.Process(process.pid).cmdline()):
                        os.kill(process.pid, signal.SIGKILL)
        receipt = stream.receipt
    assert tuple(received) == expected(token_ids, OUTPUT_TOKENS)
    assert receipt is not None
    assert receipt.attempts == 2
    with run.client() as client:
        wait_for(lambda: len(ready(client.status())) == 8)
