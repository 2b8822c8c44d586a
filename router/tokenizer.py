"""Text and chat messages to token ids, by the model's own tokenizer and chat template.

Must not block the event loop: files are read and long texts encoded in a thread.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tandem.errors import ConfigError, InvalidRequestError, Reason

MAX_TOKENIZERS = 16
_LONG_TEXT_CHARS = 2_000  # about 0.4 ms to encode; above, a thread costs less than the loop's delay

ChatMessage = Mapping[str, str]  # role and content


class PromptTokenizer:
    """One model's tokenizer; the same ids as vLLM makes of the same prompt."""

    def __init__(self, tokenizer: Tokenizer, template: Template | None, special_tokens: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, model_path: str) -> "PromptTokenizer":
        """Reads a model folder, or the hub's files of that name; blocks. Raises ConfigError saying what is missing."""
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
        settings = {} if settings_file is None else json.loads(settings_file.read_text("utf-8"))
        source = template_file.read_text("utf-8") if template_file is not None else _template_in(settings)
        template = None if source is None else _environment().from_string(source)
        return cls(tokenizer, template, _special_tokens(settings))

    async def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the tokenizer's own special tokens."""
        return await self._run(len(text), self._encode, text, True)

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation by the chat template, which writes the special tokens itself.

        Raises InvalidRequestError where there is no template or it refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError("prompt.chat", "the model has no chat template: send text or token ids")
        return await self._run(sum(len(message["content"]) for message in messages), self._encode_chat, messages)

    def token_text(self, token_id: int) -> str:
        """One token alone as text, special tokens by their names; U+FFFD where it is part of a character."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    async def _run(self, size_chars: int, function: Any, *arguments: Any) -> tuple[int, ...]:
        if size_chars > _LONG_TEXT_CHARS:
            ids: tuple[int, ...] = await asyncio.to_thread(function, *arguments)
        else:
            ids = function(*arguments)
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        assert self._template is not None
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequestError("prompt.chat", f"the model's chat template refuses the messages ({error})") from error
        return self._encode(text, False)


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


def _template_in(settings: Mapping[str, Any]) -> str | None:
    """The template in tokenizer_config.json: a string, or a list of named ones of which "default" is meant."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((str(item["template"]) for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates written for transformers expect, and no more."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = time.strftime
    return environment


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
