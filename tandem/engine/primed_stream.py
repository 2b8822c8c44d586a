"""Incremental decoding of output that begins where its prompt ends, within a character too."""

from collections.abc import Sequence
from itertools import takewhile
from operator import eq

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

NO_CHARACTER = "�"  # what tokenizers writes for bytes that are no character, or not yet one
PRIMER_TOKENS = 16  # of the prompt's end: what its first output needs to get its spaces right


class PrimedStream:
    """A `DecodeStream` that gives the output's text and nothing of the prompt's.

    After a prompt whose text ends with `NO_CHARACTER`, DecodeStream of tokenizers 0.23 gives the whole of the prompt with the first
    output. Here the output has the character that it completes; bytes that it leaves incomplete are the prompt's.
    """

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        primer = list(token_ids[-PRIMER_TOKENS:])
        self._stream = DecodeStream(ids=primer, skip_special_tokens=skip_special_tokens)
        text = tokenizer.decode(primer, skip_special_tokens=skip_special_tokens)
        self._repeated = text if text.endswith(NO_CHARACTER) else ""

    def step(self, tokenizer: Tokenizer, token_id: int) -> str | None:
        """The text that is whole with this token, else None. Raises what DecodeStream does."""
        text: str | None = self._stream.step(tokenizer, token_id)
        if not text or not self._repeated:
            return text
        prompt, self._repeated = self._repeated, ""
        same = takewhile(bool, map(eq, prompt, text))
        return text[sum(same) :]
