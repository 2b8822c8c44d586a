"""The router's own benchmark: a small run says what a large one does."""

import json
from pathlib import Path

from router.bench import SCHEMA, main


def test_it_reports_memory_matches_updates_and_hashing_and_tokenising_apart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    assert main(["--replicas=30", "--indexed-blocks=4000", "--prompt-blocks=100", "--rounds=3", f"--json={path}"]) == 0
    report = json.loads(path.read_text())
    assert report["schema"] == SCHEMA
    assert report["conditions"] == {"replicas": 30, "indexed_blocks": 4000, "prompt_blocks": 100}
    names = [row["name"] for row in report["rows"]]
    assert names[:2] == ["memory", "match, every block known to 40"]
    assert names[-2:] == ["hash a prompt of 131072 tokens", "tokenise a prompt of 131072 tokens"]
    assert [report["hash_us"], report["tokenise_us"]] == [1e6 * row["total_s"] for row in report["rows"][-2:]]
    assert 3900 <= report["rows"][0]["blocks"] <= 4200
    assert all(row["p50_s"] <= row["p99_s"] for row in report["rows"][1:])
