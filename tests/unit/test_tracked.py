"""What follows from one tracked request alone."""

import pytest

from router.tracked import Tracked
from tandem.domain import Sampling
from tandem.errors import DeadlineError, EngineError, PreconditionError, ProtocolError, Reason, TandemError
from tests.samples import make_lease, make_request


def _tracked(sampling: Sampling | None = None, deadline_s: float | None = None, expected: int | None = None) -> Tracked:
    request = make_request(sampling=sampling, expected_output_tokens=expected)
    tracked = Tracked(request=request, block_hashes=(), deadline_s=deadline_s, predicted_queue_s=0.0)
    tracked.attempt = 1
    return tracked


@pytest.mark.parametrize(
    ("max_tokens", "expected", "tokens"), [(None, None, 128), (16, None, 16), (None, 40, 40), (16, 40, 16), (64, 40, 40)]
)
def test_expected_output_is_what_the_request_says_within_its_limit(max_tokens: int | None, expected: int | None, tokens: int) -> None:
    tracked = _tracked(Sampling(max_tokens=max_tokens), expected=expected)
    assert tracked.job(make_lease(), handoff_min_tokens=None, default_output_tokens=128).expected_output_tokens == tokens


def test_a_hand_off_takes_two_blocks_unless_set() -> None:
    tracked = _tracked()
    assert tracked.job(make_lease(), handoff_min_tokens=None, default_output_tokens=1).handoff_min_tokens == 64
    assert tracked.job(make_lease(), handoff_min_tokens=7, default_output_tokens=1).handoff_min_tokens == 7


def test_output_counts_as_tokens_to_hold() -> None:
    tracked = _tracked()
    tracked.output_tokens = 5
    assert tracked.total_tokens == 105


def _final(tracked: Tracked, error: TandemError) -> TandemError | None:
    return tracked.final_error(error, retry_budget=2, now_s=10.0)


def test_a_retryable_failure_is_retried_within_the_budget() -> None:
    error = EngineError("died")
    tracked = _tracked()
    for attempt, final in ((1, None), (2, None), (3, error)):
        tracked.attempt = attempt
        assert _final(tracked, error) is final


def test_a_failure_that_another_worker_would_repeat_is_final() -> None:
    error = ProtocolError("gap")
    assert _final(_tracked(), error) is error


def test_a_restarted_replica_is_worth_another_try() -> None:
    assert _final(_tracked(), PreconditionError("restarted", reason=Reason.STALE_INCARNATION)) is None


def test_several_choices_are_only_retried_before_their_first_token() -> None:
    error = EngineError("died")
    tracked = _tracked(Sampling(n=2))
    assert _final(tracked, error) is None
    tracked.output_tokens = 1
    assert _final(tracked, error) is error


def test_no_retry_begins_after_the_deadline() -> None:
    assert isinstance(_final(_tracked(deadline_s=10.0), EngineError("died")), DeadlineError)
    assert _final(_tracked(deadline_s=10.1), EngineError("died")) is None
