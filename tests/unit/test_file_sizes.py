"""A file has one idea: 300 lines is where to look for the second one, 500 is the end."""

import pytest

from tests.layers import ROOT, project_files

SOFT_LINES, HARD_LINES = 300, 500


def test_no_file_is_longer_than_the_hard_limit(capsys: pytest.CaptureFixture[str]) -> None:
    files = [*project_files(ROOT), *sorted((ROOT / "tests").rglob("*.py"))]
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    with capsys.disabled():
        for path, count in lines.items():
            if count > SOFT_LINES:
                print(f"\n{path}: {count} lines, over the soft limit of {SOFT_LINES}", end="")
    assert {path: count for path, count in lines.items() if count > HARD_LINES} == {}
