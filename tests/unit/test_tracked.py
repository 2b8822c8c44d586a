"""What follows from one tracked request alone."""

from router.output_length import LengthKey
from router.placement import CONTINUATION
from router.tracked import Tracked
from tandem.domain import Sampling
from tandem.errors import DeadlineError, EngineError, PreconditionError, ProtocolError, Reason, TandemError
from tests.samples import make_request


def _tracked(sampling: Sampling | None = None, deadline_s: float | None = None, resumed: int = 0) -> Tracked:
    request = make_request(sampling=sampling, resume_token_ids=(7,) * resumed, tenant="t", session_id="s")
    tracked = Tracked(request=request, block_hashes=(), deadline_s=deadline_s, arrived_s=0.0, arrival=1, first_token_due_s=10.0)
    tracked.attempt = 1
    return tracked


def test_a_request_that_has_begun_is_a_continuation_whoever_sent_its_output() -> None:
    tracked, resumed = _tracked(), _tracked(resumed=3)
    assert (tracked.has_output, tracked.one_worker_reason) == (False, "")
    tracked.output_tokens = 1
    assert (tracked.has_output, tracked.one_worker_reason) == (True, CONTINUATION)
    assert (resumed.has_output, resumed.one_worker_reason) == (True, CONTINUATION)


def test_what_its_sampling_says_goes_before() -> None:
    assert _tracked(Sampling(n=2), resumed=1).one_worker_reason == "n"


def test_its_output_is_predicted_by_what_is_known_before_it_runs() -> None:
    assert _tracked(resumed=3).length_key == LengthKey("m", "t", "s", 100)


def test_attempts_that_were_moved_or_came_before_are_no_tries() -> None:
    tracked = _tracked()
    tracked.attempts_before, tracked.attempt, tracked.moves = 2, 5, 1
    assert tracked.tries == 2
    assert tracked.key == ("r1", 5)


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
