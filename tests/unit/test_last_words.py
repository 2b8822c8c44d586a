"""What is quoted of a log."""

from pathlib import Path

import pytest

from tandem.launch import last_words

TRACEBACK = "starting\nTraceback (most recent call last):\n  File x\nKeyError: 'a'\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("\n \n", ""),
        ("one\ntwo\n\n", "two"),
        (TRACEBACK, "KeyError: 'a'"),
        (TRACEBACK + "leaked a semaphore\n", "KeyError: 'a'"),
        ("KeyError: 'a'\nMemoryError\nbye", "MemoryError"),
        ("10:00 ERROR engine out of blocks\nbye\n", "10:00 ERROR engine out of blocks"),
        ("Fatal Python error: Segmentation fault\n", "Fatal Python error: Segmentation fault"),
        ("terrors and errors\nlast\n", "last"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_the_last_line_that_tells_of_an_error_is_quoted_else_the_last(tmp_path: Path, text: str, words: str) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    assert last_words(log) == words


def test_what_an_earlier_life_said_is_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(TRACEBACK)
    start_bytes = log.stat().st_size
    assert last_words(log, start_bytes) == ""
    with log.open("a") as file:
        file.write("second life\n")
    assert last_words(log, start_bytes) == "second life"


def test_only_the_end_of_a_long_log_is_read_and_bytes_do_no_harm(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"KeyError: 1\n" + b"\xff\xfe\n" * 100_000 + b"last\n")
    assert last_words(log) == "last"


def test_of_a_log_that_is_gone_nothing_is_quoted(tmp_path: Path) -> None:
    assert last_words(tmp_path / "none") == ""
    assert last_words(tmp_path) == ""
