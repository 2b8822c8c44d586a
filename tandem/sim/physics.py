"""One engine in simulated time: chunked prefill and decode batches in the same steps. Must not know the router.

A step takes prompts by rank (priority, then arrival) up to the token budget and one token of every running request. Steps with prompt
tokens are single events. Between them the batch only decodes: any number of such steps is one event, by the closed form of
`EngineProfile.decode_s`, cut at the next step's end where somebody arrives.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil, exp, sqrt
from random import Random

from tandem.sim.engine_profile import EngineProfile
from tandem.sim.timeline import Timeline
from tandem.step_sample import StepSample


@dataclass(slots=True, eq=False)
class Job:
    """One attempt at one request on one engine. `output_tokens` are those that this engine makes, the first included if it prefills."""

    number: int
    priority: int
    total_tokens: int  # prompt, and output of before
    output_tokens: int
    on_first_token: Callable[["Job"], None]  # its prompt is computed
    on_end: Callable[["Job"], None]
    match_tokens: Callable[["Job"], int]  # how many of the leading tokens are cached, asked when it is its turn
    computed_tokens: int = 0
    cached_tokens: int = -1  # not asked yet
    finish_step: int = 0
    is_cancelled: bool = False


class Engine:
    """Waiting prompts, running requests, and the step that runs now. Noise: a log-normal factor of mean 1 on every step."""

    def __init__(self, profile: EngineProfile, timeline: Timeline, rng: Random, *, noise_sigma: float = 0.0) -> None:
        self.profile = profile
        self.slow_factor = 1.0
        self.on_step: Callable[[StepSample], None] | None = None
        self.busy_s = 0.0
        self._timeline = timeline
        self._rng = rng
        self._sigma = noise_sigma
        self._waiting: list[tuple[int, int, Job]] = []
        self._joining: deque[Job] = deque()
        self._running: list[tuple[int, int, Job]] = []  # by the step in which each has its last token
        self._steps = 0  # that gave tokens, so far
        self._kv_tokens = 0  # of running requests
        self._run_number = 0  # of the present run of steps; an end planned for an earlier one is void
        self._run_steps = 0  # 0: idle
        self._run_factor = 1.0
        self._run_started_s = 0.0
        self._chunks: list[tuple[Job, int]] = []

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV of the running requests when the present steps began."""
        return self._kv_tokens

    def prefill(self, job: Job) -> None:
        """Computes the prompt in its turn; then decodes the rest of its output, if it has any."""
        heappush(self._waiting, (job.priority, job.number, job))
        self._wake()

    def decode(self, job: Job) -> None:
        """Goes on with a request whose KV is here, from the next step on that has room for it."""
        self._joining.append(job)
        self._wake()

    def cancel(self, job: Job) -> None:
        """The request is gone; it leaves at its next step's end."""
        job.is_cancelled = True
        if job.finish_step <= self._steps:
            return
        last_step = self._steps + (1 if self._chunks else self._steps_until(self._timeline.now_s))
        if last_step < job.finish_step:
            job.output_tokens -= job.finish_step - last_step
            job.finish_step = last_step
            self._running = [(one.finish_step, one.number, one) for _, _, one in self._running]
            heapify(self._running)
            self._wake()

    def made_tokens(self, job: Job) -> int:
        """How many tokens a running request has from here; 0 where it does not run."""
        if job.finish_step <= self._steps or job.is_cancelled:
            return 0
        ended = 0 if self._chunks or not self._run_steps else self._steps_until(self._timeline.now_s) - 1
        return job.output_tokens - (job.finish_step - self._steps - ended)

    def set_slow_factor(self, factor: float) -> None:
        """From the next step on, steps take so many times as long."""
        self.slow_factor = factor
        self._wake()

    def _wake(self) -> None:
        """Has somebody who just came taken up at the end of the step that runs."""
        if not self._run_steps:
            self._start()
        elif not self._chunks and self._run_steps > 1:
            steps = self._steps_until(self._timeline.now_s)
            if steps < self._run_steps:
                self._plan_end(steps)

    def _steps_until(self, now_s: float) -> int:
        """How many of the present decode steps have ended when the one that runs at `now_s` has: the root of decode_s(n) = elapsed."""
        profile, batch = self.profile, len(self._running)
        elapsed = (now_s - self._run_started_s) / self._run_factor
        curve = profile.decode_kv_token_s * batch / 2
        slope = profile.decode_s(1, batch, self._kv_tokens) - curve
        root = 2 * elapsed / (slope + sqrt(slope * slope + 4 * curve * elapsed))
        return max(1, ceil(root - 1e-9))

    def _plan_end(self, steps: int) -> None:
        self._run_steps = steps
        self._run_number += 1
        ends_s = self._run_started_s + self._run_factor * self.profile.decode_s(steps, len(self._running), self._kv_tokens)
        self._timeline.at(ends_s, self._end_decode, self._run_number)

    def _start(self) -> None:
        """Begins the next steps, if there is work."""
        self._admit()
        now_s = self._timeline.now_s
        if self._waiting:
            self._start_mixed(now_s)
        elif self._running:
            steps = self._running[0][0] - self._steps
            self._run_factor = self._factor(steps)
            self._run_started_s = now_s
            self._plan_end(steps)

    def _admit(self) -> None:
        """Requests join in the order they came, while sequences and KV have room; one alone always does."""
        joining, profile = self._joining, self.profile
        while joining:
            job = joining[0]
            has_room = len(self._running) < profile.max_num_seqs and self._kv_tokens + job.total_tokens <= profile.kv_room_tokens
            if self._running and not has_room:
                return
            joining.popleft()
            if job.is_cancelled:
                continue
            job.finish_step = self._steps + job.output_tokens
            self._kv_tokens += job.total_tokens
            heappush(self._running, (job.finish_step, job.number, job))

    def _start_mixed(self, now_s: float) -> None:
        """One step with chunks of prompts, first by rank, and a token for everybody that runs."""
        budget = max(1, self.profile.max_num_batched_tokens - len(self._running))
        waiting, chunks, pairs, tokens = self._waiting, self._chunks, 0.0, 0
        while waiting and budget > 0:
            job = waiting[0][2]
            if job.is_cancelled:
                heappop(waiting)
                continue
            if job.cached_tokens < 0:
                job.cached_tokens = job.computed_tokens = job.match_tokens(job)
            part = min(budget, job.total_tokens - job.computed_tokens)
            pairs += part * (job.computed_tokens + 0.5 * part)
            job.computed_tokens += part
            budget -= part
            tokens += part
            chunks.append((job, part))
            if job.computed_tokens < job.total_tokens:
                break
            heappop(waiting)
        if not chunks:
            self._start()
            return
        batch = len(self._running)
        step_s = self._factor(1) * self.profile.step_s(tokens, pairs, batch, self._kv_tokens)
        self._run_steps = 1
        self._timeline.at(now_s + step_s, self._end_mixed, tokens, pairs, step_s)

    def _end_mixed(self, tokens: int, pairs: float, step_s: float) -> None:
        self._run_steps = 0
        self._note(tokens, pairs, step_s, 1)
        done = [job for job, _ in self._chunks if job.computed_tokens == job.total_tokens]
        self._chunks.clear()
        self._pass_steps(1)
        for job in done:
            if job.is_cancelled:
                continue
            job.on_first_token(job)
            if job.output_tokens > 1:
                job.total_tokens += 1
                job.output_tokens -= 1
                self._joining.appendleft(job)
            else:
                job.on_end(job)
        if not self._run_steps:
            self._start()

    def _end_decode(self, run_number: int) -> None:
        if run_number != self._run_number:
            return
        steps, self._run_steps = self._run_steps, 0
        self._note(0, 0.0, self._timeline.now_s - self._run_started_s, steps)
        self._pass_steps(steps)
        if not self._run_steps:
            self._start()

    def _pass_steps(self, steps: int) -> None:
        """Everybody that runs has `steps` more tokens; who has all leaves."""
        running = self._running
        if not running:
            return
        self._steps += steps
        self._kv_tokens += steps * len(running)
        ended = []
        while running and running[0][0] <= self._steps:
            job = heappop(running)[2]
            self._kv_tokens -= job.total_tokens + job.output_tokens
            ended.append(job)
        for job in ended:
            if not job.is_cancelled:
                job.on_end(job)

    def _note(self, tokens: int, pairs: float, seconds: float, steps: int) -> None:
        self.busy_s += seconds
        if self.on_step is not None:
            batch = len(self._running)
            kv_tokens = self._kv_tokens + batch * (steps - 1) // 2
            self.on_step(
                StepSample(
                    prefill_tokens=tokens,
                    prefill_pairs=int(pairs),
                    decode_requests=batch,
                    kv_tokens=kv_tokens,
                    duration_s=seconds / steps,
                )
            )

    def _factor(self, steps: int) -> float:
        """Slowness times noise; the noise of many steps averages out."""
        if not self._sigma:
            return self.slow_factor
        sigma = self._sigma / sqrt(steps)
        return self.slow_factor * exp(self._rng.gauss(-0.5 * sigma * sigma, sigma))
