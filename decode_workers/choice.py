"""One choice of a stream: positions, text, stop strings and the end, whichever worker a token came from."""

from dataclasses import replace

from tandem.domain import Chunk, FinishReason
from tandem.engine.base import EngineOutput, OutputText
from tandem.errors import EngineError


class Choice:
    """Turns engine outputs into chunks. `text` is primed with the prompt and the resumed tokens."""

    def __init__(self, index: int, text: OutputText, *, position: int, max_output_tokens: int) -> None:
        self.index = index
        self.position = position
        self.finish_reason: FinishReason | None = None
        self._text = text
        self._max_output_tokens = max_output_tokens

    def add(self, output: EngineOutput) -> Chunk:
        """The chunk for `output`; once it carries a finish reason, the choice has ended. Raises EngineError on an aborted run."""
        if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise EngineError(f"the engine ended the request with {output.finish_reason}")
        stop_string = self._text.add(output.token_ids, is_stop_token=output.finish_reason is FinishReason.STOP)
        kept = len(output.token_ids) if stop_string is None else self._text.kept_tokens() - self.position
        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        if stop_string is not None:
            finish_reason, stop_reason = FinishReason.STOP, stop_string
        elif finish_reason is None and self.position + kept >= self._max_output_tokens:
            finish_reason = FinishReason.LENGTH
        chunk = Chunk(
            first_position=self.position,
            token_ids=output.token_ids[:kept],
            text=self._text.take(is_finished=finish_reason is not None),
            logprobs=output.logprobs[:kept],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            choice_index=self.index,
        )
        self.position += kept
        self.finish_reason = finish_reason
        return chunk


def first_output(output: EngineOutput) -> EngineOutput:
    """A prefill worker's one token as if this engine had made it: its length limit of one token is no end."""
    return replace(output, finish_reason=None) if output.finish_reason is FinishReason.LENGTH else output
