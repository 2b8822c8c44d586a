"""Conversations to prompt text, by the template that a model brings with it.

Must not read files or tokenise. Templates are foreign programs: they run in a sandbox, and whatever they do wrong is a typed error.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import ConfigError, InvalidRequestError, Reason

ChatMessage = Mapping[str, str]  # role and content
_FOREIGN_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """One model's template."""

    def __init__(self, template: Template, special_tokens: Mapping[str, str]) -> None:
        self._template = template
        self._special_tokens = special_tokens

    @classmethod
    def compile(cls, settings_json: bytes | None, source: bytes | None) -> "ChatTemplate | None":
        """Of tokenizer_config.json and chat_template.jinja, None where there is no such file; None where there is no template.

        Raises ConfigError where a file is damaged.
        """
        try:
            settings = {} if settings_json is None else json.loads(settings_json)
            text = _template_in(settings) if source is None else source.decode()
            return None if text is None else cls(_environment().from_string(text), _special_tokens(settings))
        except _FOREIGN_ERRORS as error:
            raise ConfigError(
                f"the model's chat template cannot be read ({error}): send text or token ids", reason=Reason.BAD_MODEL
            ) from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt, special tokens included, up to where the assistant speaks. Raises InvalidRequestError where the template refuses."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except _FOREIGN_ERRORS as error:
            raise InvalidRequestError("prompt.chat", f"the model's chat template refuses the messages ({error})") from error


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


class _Generation(Extension):
    """transformers' `{% generation %}`, which marks what the assistant said for training: here its body is as good as any."""

    tags = {"generation"}  # noqa: RUF012  # the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates written for transformers expect, and no more."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = time.strftime
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
