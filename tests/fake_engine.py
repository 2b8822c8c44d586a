"""An engine of a few lines: the next token follows from the tokens so far, and each token is one word."""

import asyncio
from collections.abc import AsyncGenerator

from tandem.domain import EngineInfo, FinishReason, Logprobs, Sampling, TokenLogprob
from tandem.engine.base import EngineLoad, EngineOutput, EngineRequest, KvLoaded, KvTotals
from tandem.engine_watch import EnginePulse
from tandem.errors import TandemError
from tandem.held_blocks import HeldBlocks
from tandem.step_sample import StepSample

EOS = 0
VOCABULARY_TOKENS = 100

INFO = EngineInfo(
    block_size_tokens=4,
    context_tokens=64,
    vocabulary_tokens=VOCABULARY_TOKENS,
    kv_blocks=100,
    kv_block_bytes=1000,
    dtype="float32",
    engine="fake",
    engine_version="1",
    eos_token_ids=(EOS,),
    max_num_seqs=8,
    max_num_batched_tokens=64,
)


def next_token(token_ids: tuple[int, ...]) -> int:
    """The token after the last one; never EOS."""
    return token_ids[-1] % (VOCABULARY_TOKENS - 1) + 1


def logprobs_of(token_id: int) -> Logprobs:
    """What the engine says of a token."""
    return Logprobs(sampled=TokenLogprob(token_id=token_id, logprob=-token_id / 8, rank=1))


class WordText:
    """`OutputText` in which token 7 is "w7 ". Like the real one it holds back what may become a stop string."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._words: list[str] = []
        self._text = ""
        self._taken_chars = 0

    def add(self, token_ids: tuple[int, ...], *, is_stop_token: bool) -> str | None:
        for number, token_id in enumerate(token_ids, 1):
            word = "" if is_stop_token and number == len(token_ids) else f"w{token_id} "
            self._words.append(word)
            self._text += word
            for stop in self._sampling.stop if len(self._words) > self._sampling.min_tokens else ():
                found = self._text.find(stop, max(0, len(self._text) - len(word) - len(stop) + 1))
                if found >= 0:
                    self._text = self._text[:found]
                    return stop
        return None

    def kept_tokens(self) -> int:
        return len(self._words)

    def take(self, *, is_finished: bool) -> str:
        held_chars = 0 if is_finished or not self._sampling.stop else max(map(len, self._sampling.stop)) - 1
        taken_chars = max(self._taken_chars, len(self._text) - held_chars)
        text = self._text[self._taken_chars : taken_chars]
        self._taken_chars = taken_chars
        return text


class FakeEngine:
    """Runs requests one token at a time; tests set what it does next.

    `gate` is waited for before each token, `publishes` before a run's blocks are published: clear them to stop runs where they are.
    `eos_after` is the number of tokens so far at which the engine wants to stop; as in a real one, it may not before `min_tokens`.
    """

    def __init__(self) -> None:
        self.info = INFO
        self.blocks = HeldBlocks()
        self.gate = asyncio.Event()
        self.gate.set()
        self.publishes = asyncio.Event()
        self.publishes.set()
        self.has_run = asyncio.Event()
        self.requests: list[EngineRequest] = []
        self.eos_after: int | None = None
        self.tokens_per_output = 1
        self.cached_tokens = 0
        self.loaded: KvLoaded | None = None
        self.error: TandemError | None = None
        self.publish_error: TandemError | None = None
        self.abort_reason: FinishReason | None = None
        self.breaks_off_after: int | None = None
        self.steps = 0
        self.measured: tuple[StepSample, ...] = ()
        self._kept: dict[str, EngineRequest] = {}
        self._generating: set[str] = set()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is kept of any run."""
        return not self._kept and not self._generating

    @property
    def pulse(self) -> EnginePulse:
        return EnginePulse(pids=(), is_busy=bool(self._generating), steps=self.steps)

    def start(self) -> None:
        """Nothing to attach."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        assert request.run_id not in self._kept, "a run id came twice"
        self.requests.append(request)
        self._kept[request.run_id] = request
        self._generating.add(request.run_id)
        self.has_run.set()
        try:
            if self.error is not None:
                raise self.error
            tokens: tuple[int, ...] = ()
            finish_reason: FinishReason | None = None
            while finish_reason is None and (self.breaks_off_after is None or len(tokens) < self.breaks_off_after):
                await self.gate.wait()
                self.steps += 1
                new, finish_reason, stop_reason = ((), self.abort_reason, None) if self.abort_reason else self._step(request, tokens)
                tokens += new
                for choice_index in range(request.sampling.n):
                    yield EngineOutput(
                        choice_index=choice_index,
                        token_ids=new,
                        logprobs=() if request.sampling.logprobs is None else tuple(map(logprobs_of, new)),
                        finish_reason=finish_reason,
                        stop_reason=stop_reason,
                        cached_tokens=self.cached_tokens,
                    )
        finally:
            self._generating.discard(request.run_id)

    def _step(self, request: EngineRequest, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None, str | None]:
        sampling, new = request.sampling, tuple[int, ...]()
        while len(new) < self.tokens_per_output:
            so_far = (*request.token_ids, *tokens, *new)
            may_stop = len(tokens) + len(new) >= sampling.min_tokens
            if self.eos_after is not None and len(so_far) >= self.eos_after and may_stop and not sampling.ignore_eos:
                return (*new, EOS), FinishReason.STOP, None
            new = (*new, next_token(so_far))
            if new[-1] in sampling.stop_token_ids and may_stop:
                return new, FinishReason.STOP, str(new[-1])
            if len(tokens) + len(new) == request.max_new_tokens:
                return new, FinishReason.LENGTH, None
        return new, None, None

    def output_text(self, token_ids: tuple[int, ...], sampling: Sampling) -> WordText:
        return WordText(sampling)

    async def published(self, run_id: str, timeout_s: float) -> int:
        if self.publish_error is not None:
            raise self.publish_error
        request = self._kept[run_id]
        try:
            async with asyncio.timeout(timeout_s):
                await self.publishes.wait()
        except TimeoutError:
            return 0
        return len(request.token_ids) // self.info.block_size_tokens

    def take_loaded(self, run_id: str) -> KvLoaded | None:
        assert run_id in self._kept
        loaded, self.loaded = self.loaded, None
        return loaded

    def forget(self, run_id: str) -> None:
        self._kept.pop(run_id, None)

    def load(self) -> EngineLoad:
        return EngineLoad(running_requests=len(self._generating), waiting_requests=0, kv_used_fraction=0.25)

    def take_steps(self) -> tuple[StepSample, ...]:
        steps, self.measured = self.measured, ()
        return steps

    def kv_totals(self) -> KvTotals:
        return KvTotals(corrupt_blocks=1, missing_blocks=2, loaded_bytes=3, published_bytes=4)

    async def check_health(self) -> None:
        """Always well."""

    def close(self) -> None:
        """Nothing to end."""
