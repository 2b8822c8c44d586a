"""`make demo` does what it says: exit 0, and a report whose checks hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def test_the_demo_is_exact_and_hands_off(tmp_path: Path) -> None:
    path = tmp_path / "new" / "demo.json"
    result = subprocess.run([sys.executable, "-m", "tandem.demo", "--json", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(path.read_text())
    assert report["prompts"] == report["token_exact"] >= 20
    assert report["handed_off"] >= 15
    assert report["kv_bytes_shipped"] > 0
    assert report["decode_recomputed_tokens_max"] <= report["block_size_tokens"]
    assert report["first_token_before_kv"] is True
    assert report["sdk_ok"] is True
    assert {"schema", "ready_s", "ttft_p50_s", "plain_ttft_p50_s", "handoff_gap_p50_s"} <= set(report)
