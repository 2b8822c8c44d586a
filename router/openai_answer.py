"""One HTTP request's answer: a call of the frontend for each prompt, and the objects made of what they bring.

Must not write to the client: who is told of new output does.
"""

from collections.abc import Awaitable, Callable, Sequence

from router.openai_request import OpenAiRequest
from router.openai_response import Choice, Format, JsonObject, TokenBytes, receipt_object, usage_object
from router.tokenizer import Tokenizers
from tandem.deadline import Deadline
from tandem.domain import Lease, Receipt, Request
from tandem.rpc import parse_answer
from tandem.v1 import inference_pb2


class PromptCall:
    """One prompt of an HTTP request, as a call of the frontend. `changed` is told of the choice that has new output."""

    def __init__(
        self,
        wanted: OpenAiRequest,
        number: int,
        deadline: Deadline,
        tokenizers: Tokenizers,
        tenant: str,
        changed: "Changed | None" = None,
    ) -> None:
        self.tenant = tenant
        self._wanted = wanted
        self._deadline = deadline
        self._tokenizers = tokenizers
        self._changed = changed
        first = number * wanted.num_choices
        self.choices = [Choice(first + index, wanted.stop_token_ids) for index in range(wanted.num_choices)]
        self.model = ""
        self.prompt_token_ids: Sequence[int] = ()
        self.cached_tokens = 0
        self.token_bytes: TokenBytes | None = None
        self.receipt: Receipt | None = None

    def time_remaining_s(self) -> float | None:
        """The deadline that the headers gave."""
        return self._deadline.remaining_s("arrival")

    async def accept(self, request: Request, lease: Lease) -> None:
        """Notes what the answer repeats."""
        self.model = lease.model
        self.prompt_token_ids = request.prompt_token_ids
        if self._wanted.wants_logprobs:
            if self._wanted.names_tokens_by_id:
                self.token_bytes = _by_id
            else:
                self.token_bytes = (await self._tokenizers.get(lease.model_path)).token_bytes

    async def write(self, payload: bytes, /) -> None:
        """Takes one chunk."""
        chunk = parse_answer(inference_pb2.GenerateResponse, payload)
        choice = self.choices[chunk.choice_index]
        choice.add(chunk)
        if chunk.HasField("usage"):
            self.cached_tokens = chunk.usage.cached_tokens
        if self._changed is not None:
            await self._changed(self, choice)

    @property
    def output_tokens(self) -> int:
        """Of all choices so far."""
        return sum(choice.output_tokens for choice in self.choices)


Changed = Callable[[PromptCall, Choice], Awaitable[None]]


class Answer:
    """One HTTP request's answer: its frame and the calls that fill it."""

    def __init__(self, form: Format, wanted: OpenAiRequest, calls: Sequence[PromptCall], *, request_id: str, created: int) -> None:
        self.calls = calls
        self._form = form
        self._wanted = wanted
        self._id = f"{form.id_prefix}{request_id}"
        self._created = created

    def _frame(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.calls[0].model, "choices": choices}

    def _choice(self, call: PromptCall, choice: Choice, *, is_delta: bool) -> JsonObject:
        output = choice.take(call.token_bytes)
        made = self._form.choice(output, call.token_bytes, is_delta=is_delta)
        if self._wanted.wants_token_ids:
            made["token_ids"] = output.token_ids
            if output.is_first and self._form.has_prompt_in_choice:
                made["prompt_token_ids"] = call.prompt_token_ids
        return made

    def chunk(self, call: PromptCall, choice: Choice) -> JsonObject:
        """One event of the stream."""
        made = self._frame(self._form.chunk_kind, [self._choice(call, choice, is_delta=True)])
        if self._wanted.wants_running_usage:
            made["usage"] = self._usage()
        return made

    def last_chunk(self) -> JsonObject:
        """The event after all choices: usage alone."""
        return {**self._frame(self._form.chunk_kind, []), "usage": self._usage()}

    def whole(self) -> JsonObject:
        """The answer in one object."""
        choices = [self._choice(call, choice, is_delta=False) for call in self.calls for choice in call.choices]
        made = {**self._frame(self._form.kind, choices), "usage": self._usage()}
        if self._wanted.wants_token_ids and not self._form.has_prompt_in_choice:
            made["prompt_token_ids"] = self.calls[0].prompt_token_ids
        return made

    def _usage(self) -> JsonObject:
        return usage_object(
            prompt_tokens=sum(len(call.prompt_token_ids) for call in self.calls),
            output_tokens=sum(call.output_tokens for call in self.calls),
            cached_tokens=sum(call.cached_tokens for call in self.calls),
        )

    def receipts(self) -> JsonObject | list[JsonObject]:
        """The receipt; of several prompts a list of them."""
        made = [receipt_object(call.receipt) for call in self.calls if call.receipt is not None]
        return made[0] if len(self.calls) == 1 else made


def _by_id(token_id: int) -> bytes:
    return b"token_id:%d" % token_id
