"""Text and chat messages to token ids, by the model's own tokenizer and chat template.

Must not block the event loop: files are read and long texts encoded in a thread.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from router.chat_template import ChatMessage, ChatTemplate
from router.token_bytes import token_bytes_of
from tandem.errors import ConfigError, InvalidRequestError, Reason

MAX_TOKENIZERS = 16
_MESSAGE_CHARS = 200  # what a chat message costs the template besides its text, as characters to encode
_LONG_TEXT_CHARS = 2_000  # about 0.4 ms to encode; above, a thread costs less than the loop's delay


class PromptTokenizer:
    """One model's tokenizer; the same ids as vLLM makes of the same prompt.

    `template` may be the error that chats end with: text and token ids need none. `token_bytes` gives one token alone as bytes.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | ConfigError | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.token_bytes = token_bytes_of(tokenizer)

    @classmethod
    def load(cls, model_path: str) -> "PromptTokenizer":
        """Reads a model folder, or the hub's files of that name; blocks.

        Raises ConfigError saying what is missing; a chat template that cannot be read is an error of chats only.
        """
        tokenizer_file = _find(model_path, "tokenizer.json")
        if tokenizer_file is None:
            raise ConfigError(f"model {model_path!r} has no tokenizer.json: send token ids instead of text", reason=Reason.BAD_MODEL)
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigError(f"the tokenizer.json of model {model_path!r} cannot be read ({error})", reason=Reason.BAD_MODEL) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings_file, template_file = _find(model_path, "tokenizer_config.json"), _find(model_path, "chat_template.jinja")
        try:
            template = ChatTemplate.compile(_content(settings_file), _content(template_file))
        except ConfigError as error:
            return cls(tokenizer, error)
        return cls(tokenizer, template)

    async def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the tokenizer's own special tokens."""
        return await self._run(len(text), self._encode, text, True)

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation by the chat template, which writes the special tokens itself.

        Raises InvalidRequestError where there is no template or it refuses the messages, ConfigError where it cannot be read.
        """
        if isinstance(self._template, ConfigError):
            raise ConfigError(self._template.message, reason=self._template.reason)
        if self._template is None:
            raise InvalidRequestError("prompt.chat", "the model has no chat template: send text or token ids")
        size_chars = sum(_MESSAGE_CHARS + len(message["content"]) for message in messages)
        return await self._run(size_chars, self._encode_chat, self._template, messages)

    async def _run(self, size_chars: int, function: Any, *arguments: Any) -> tuple[int, ...]:
        if size_chars > _LONG_TEXT_CHARS:
            ids: tuple[int, ...] = await asyncio.to_thread(function, *arguments)
        else:
            ids = function(*arguments)
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _encode_chat(self, template: ChatTemplate, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        return self._encode(template.render(messages), False)


class Tokenizers:
    """Tokenizers by model path, each loaded once; the one used longest ago goes when there are too many."""

    def __init__(self) -> None:
        self._loads: dict[str, asyncio.Task[PromptTokenizer]] = {}

    async def get(self, model_path: str) -> PromptTokenizer:
        """Raises ConfigError where the model has none; a failed load is tried again by the next call."""
        load = self._loads.pop(model_path, None)
        if load is None or (load.done() and (load.cancelled() or load.exception() is not None)):
            load = asyncio.create_task(asyncio.to_thread(PromptTokenizer.load, model_path), name=f"load tokenizer {model_path}")
        self._loads[model_path] = load
        if len(self._loads) > MAX_TOKENIZERS:
            del self._loads[next(iter(self._loads))]
        return await asyncio.shield(load)


def _content(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file.name} of the model cannot be read ({error})", reason=Reason.BAD_MODEL) from error


def _find(model_path: str, name: str) -> Path | None:
    """The file of a local model folder or of the hub; None where it has no such file. Raises ConfigError."""
    folder = Path(model_path)
    if model_path and folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not model_path or folder.is_absolute():
        raise ConfigError(f"model folder {model_path!r} is not on the router's machine: send token ids instead", reason=Reason.BAD_MODEL)
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    except ImportError as error:
        raise ConfigError(
            f"model {model_path!r} is no local folder; to fetch its tokenizer install huggingface_hub", reason=Reason.MISSING_PACKAGE
        ) from error
    try:
        return Path(hf_hub_download(model_path, name))
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # not in the cache, and the hub does not answer
            raise ConfigError(f"{name} of model {model_path!r} cannot be fetched ({error})", reason=Reason.BAD_MODEL) from error
        return None
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(f"{name} of model {model_path!r} cannot be fetched ({error})", reason=Reason.BAD_MODEL) from error
