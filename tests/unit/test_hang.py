"""What counts as a hang, look by look."""

from tandem.hang import HangJudge


def test_a_process_that_is_stopped_at_three_looks_in_a_row_hangs() -> None:
    judge = HangJudge(silent_looks=99)
    looks = [True, True, False, True, True, True]
    words = [judge.judge(is_stopped=is_stopped, is_silent=False) for is_stopped in looks]
    assert words == [""] * 5 + ["was stopped by a signal"]


def test_a_process_that_is_silent_for_as_many_looks_as_allowed_hangs() -> None:
    judge = HangJudge(silent_looks=2)
    looks = [True, False, True, True]
    words = [judge.judge(is_stopped=False, is_silent=is_silent) for is_silent in looks]
    assert words == ["", "", "", "did not answer 2 times in a row"]


def test_a_stop_is_told_before_a_silence() -> None:
    judge = HangJudge(stopped_looks=1, silent_looks=1)
    assert judge.judge(is_stopped=True, is_silent=True) == "was stopped by a signal"
