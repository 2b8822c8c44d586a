"""Text from tokens through the tokenizers package alone, for engines that come without vLLM. Equal to vLLM's fast detokeniser.

Must not import an engine; a contract test holds it to `output_text.py`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tandem.domain import Sampling
from tandem.engine.primed_stream import NO_CHARACTER, PrimedStream
from tandem.errors import ConfigError, Reason

_MAX_WORDS = 4096  # looked at, so that a large vocabulary costs no start-up time


def load_tokenizer(folder: Path) -> Tokenizer:
    """The model's tokenizer. Raises ConfigError where there is none or it cannot be read."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"model {folder} has no tokenizer.json, which the simulated engine needs", reason=Reason.BAD_MODEL)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ConfigError(f"the tokenizer.json of model {folder} cannot be read ({error})", reason=Reason.BAD_MODEL) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def whole_words(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that are text by themselves: no special ones and no parts of a character."""
    special = tokenizer.get_added_tokens_decoder().keys()
    candidates = [token_id for token_id in range(min(tokenizer.get_vocab_size(), _MAX_WORDS)) if token_id not in special]
    texts = tokenizer.decode_batch([[token_id] for token_id in candidates], skip_special_tokens=False)
    return tuple(token_id for token_id, text in zip(candidates, texts, strict=True) if text and NO_CHARACTER not in text)


class TokenText:
    """`OutputText` of one choice, primed with its prompt."""

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int], sampling: Sampling) -> None:
        self._tokenizer = tokenizer
        self._skips_special = sampling.skip_special_tokens
        self._stream: PrimedStream | DecodeStream = PrimedStream(tokenizer, token_ids, skip_special_tokens=self._skips_special)
        self._stop = sampling.stop
        self._min_tokens = sampling.min_tokens
        self._includes_stop = sampling.include_stop_str_in_output
        self._held_chars = 0 if self._includes_stop else max(map(len, self._stop), default=1) - 1
        self._text = ""
        self._tokens = 0
        self._taken_chars = 0

    def add(self, token_ids: tuple[int, ...], *, is_stop_token: bool) -> str | None:
        """Takes new tokens; returns the stop string they complete, else None."""
        before, offsets = self._tokens, [len(self._text)]
        for number, token_id in enumerate(token_ids, 1):
            if not (is_stop_token and number == len(token_ids) and not self._includes_stop):
                self._text += self._decode(token_id)
            offsets.append(len(self._text))
        self._tokens += len(token_ids)
        if not self._stop or not token_ids or self._tokens <= self._min_tokens:
            return None
        new_chars = len(self._text) - offsets[max(self._min_tokens - before, 0)]
        found = _first_stop(self._text, new_chars, self._stop)
        if found is None:
            return None
        stop, end = found
        self._tokens = before + bisect_left(offsets, end, lo=1)
        self._text = self._text[: end if self._includes_stop else end - len(stop)]
        return stop

    def kept_tokens(self) -> int:
        """Output tokens up to the one that completed the stop string."""
        return self._tokens

    def take(self, *, is_finished: bool) -> str:
        """Text that was not taken yet."""
        end = max(self._taken_chars, len(self._text) - (0 if is_finished else self._held_chars))
        text, self._taken_chars = self._text[self._taken_chars : end], end
        return text

    def _decode(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except OverflowError:  # no token of this tokenizer
            return ""
        except Exception:  # "Invalid prefix": bytes that are no text; tokenizers raises nothing narrower
            self._stream = DecodeStream(skip_special_tokens=self._skips_special)
            return self._stream.step(self._tokenizer, token_id) or ""


def _first_stop(text: str, new_chars: int, stops: Sequence[str]) -> tuple[str, int] | None:
    """The stop string that ends first in a text of which the last `new_chars` are new, and where it ends."""
    ends: list[tuple[int, int]] = []
    for index, stop in enumerate(stops):
        at = text.find(stop, max(0, len(text) - new_chars - len(stop) + 1)) if new_chars else -1
        if at >= 0:
            ends.append((at + len(stop), index))
    if not ends:
        return None
    end, index = min(ends)
    return stops[index], end
