"""One token alone as the bytes that it adds to a text: a leading space and part of a character are kept.

A tokenizer's own `decode` of one token loses both. Must not join tokens.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

from tokenizers import Tokenizer

_CACHED_TOKENS = 16_384
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes_of(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """The bytes of a token by its id, special tokens by their names, none for an id that is not known; the last ones used are kept."""
    added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    steps = {step["type"]: step for step in _steps(tokenizer)}

    def token_bytes(token_id: int) -> bytes:
        token = added.get(token_id)
        if token is not None:
            return token.encode()
        token = tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if "ByteLevel" in steps:
            return bytes(_BYTE_LEVEL[char] for char in token) if _BYTE_LEVEL.keys() >= set(token) else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if "ByteFallback" in steps else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        mark = _space_mark(steps)
        if mark is not None:
            return token.replace(mark, " ").encode()
        return tokenizer.decode([token_id], skip_special_tokens=False).encode()

    return lru_cache(_CACHED_TOKENS)(token_bytes)


def _steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What the decoder does, step by step."""
    if tokenizer.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(cast("bytes", tokenizer.decoder.__getstate__()))
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _space_mark(steps: Mapping[str, dict[str, Any]]) -> str | None:
    """SentencePiece's mark for a space; None where the decoder knows none."""
    if "Metaspace" in steps:
        return cast("str", steps["Metaspace"]["replacement"])
    replaced = steps.get("Replace", {})
    return cast("str | None", replaced["pattern"].get("String")) if replaced.get("content") == " " else None


def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + index): byte for index, byte in enumerate(others)}}


_BYTE_LEVEL = _byte_level()
