"""An engine of a few lines: the next token follows from the tokens so far, and each token is one word."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from tandem.domain import EngineInfo, FinishReason, Logprobs, Sampling, TokenLogprob
from tandem.engine.base import EngineLoad, EngineOutput, EngineRequest, KvLoaded, KvTotals
from tandem.errors import TandemError

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
            stop_string = next((stop for stop in self._sampling.stop if stop in self._text), None)
            if stop_string is not None and len(self._words) > self._sampling.min_tokens:
                self._text = self._text[: self._text.index(stop_string)]
                return stop_string
        return None

    def kept_tokens(self) -> int:
        return len(self._words)

    def take(self, *, is_finished: bool) -> str:
        held_chars = 0 if is_finished or not self._sampling.stop else max(map(len, self._sampling.stop)) - 1
        taken_chars = max(self._taken_chars, len(self._text) - held_chars)
        text = self._text[self._taken_chars : taken_chars]
        self._taken_chars = taken_chars
        return text


@dataclass(slots=True)
class _Run:
    request: EngineRequest
    is_published: asyncio.Event = field(default_factory=asyncio.Event)


class FakeEngine:
    """Runs requests one token at a time.

    `gate` is waited for before each token; clear it to stop all runs where they are. `requests` keeps what was asked. `eos_after` gives
    the number of tokens so far at which the engine wants to stop; as in the real one, it may not before `min_tokens`.
    """

    def __init__(self) -> None:
        self.info = INFO
        self.gate = asyncio.Event()
        self.gate.set()
        self.publishes = asyncio.Event()
        self.publishes.set()
        self.requests: list[EngineRequest] = []
        self.runs: dict[str, _Run] = {}
        self.generating: set[str] = set()
        self.eos_after: int | None = None
        self.error: TandemError | None = None
        self.abort_reason: FinishReason | None = None
        self.choose: Callable[[tuple[int, ...]], int] = next_token
        self.cached_tokens = 0
        self.loaded: KvLoaded | None = None
        self.tokens_per_output = 1
        self.has_run = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is kept of any run."""
        return not self.runs and not self.generating

    def start(self) -> None:
        """Nothing to attach."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        self.requests.append(request)
        self.runs[request.run_id] = _Run(request)
        self.generating.add(request.run_id)
        self.has_run.set()
        try:
            if self.error is not None:
                raise self.error
            tokens: tuple[int, ...] = ()
            while True:
                await self.gate.wait()
                if self.abort_reason is not None:
                    yield EngineOutput(choice_index=0, token_ids=(), finish_reason=self.abort_reason)
                    return
                new, finish_reason = self._step(request, tokens)
                tokens += new
                output = EngineOutput(
                    choice_index=0,
                    token_ids=new,
                    logprobs=() if request.sampling.logprobs is None else tuple(map(logprobs_of, new)),
                    finish_reason=finish_reason,
                    cached_tokens=self.cached_tokens,
                )
                for choice_index in range(request.sampling.n):
                    yield EngineOutput(
                        choice_index=choice_index,
                        token_ids=output.token_ids,
                        logprobs=output.logprobs,
                        finish_reason=finish_reason,
                        cached_tokens=output.cached_tokens,
                    )
                if finish_reason is not None:
                    return
        finally:
            self.generating.discard(request.run_id)

    def _step(self, request: EngineRequest, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        new: tuple[int, ...] = ()
        while len(new) < self.tokens_per_output:
            so_far = (*request.token_ids, *tokens, *new)
            may_stop = len(tokens) + len(new) >= request.sampling.min_tokens
            if self.eos_after is not None and len(so_far) >= self.eos_after and may_stop and not request.sampling.ignore_eos:
                return (*new, EOS), FinishReason.STOP
            new = (*new, self.choose(so_far))
            if len(tokens) + len(new) == request.max_new_tokens:
                return new, FinishReason.LENGTH
        return new, None

    def output_text(self, token_ids: tuple[int, ...], sampling: Sampling) -> WordText:
        return WordText(sampling)

    async def published(self, run_id: str, timeout_s: float) -> int:
        run = self.runs[run_id]
        try:
            async with asyncio.timeout(timeout_s):
                await self.publishes.wait()
        except TimeoutError:
            return 0
        return len(run.request.token_ids) // self.info.block_size_tokens

    def take_loaded(self, run_id: str) -> KvLoaded | None:
        assert run_id in self.runs
        loaded, self.loaded = self.loaded, None
        return loaded

    def forget(self, run_id: str) -> None:
        self.runs.pop(run_id, None)

    def load(self) -> EngineLoad:
        return EngineLoad(running_requests=len(self.generating), waiting_requests=0, kv_used_fraction=0.25)

    def kv_totals(self) -> KvTotals:
        return KvTotals(corrupt_blocks=1, missing_blocks=2, loaded_bytes=3, published_bytes=4)

    async def check_health(self) -> None:
        """Always well."""

    def close(self) -> None:
        """Nothing to end."""
