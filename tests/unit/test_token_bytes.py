"""One token alone as bytes, for each kind of tokenizer."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel

from router.token_bytes import token_bytes_of

SENTENCE_PIECE = {"<unk>": 0, "<0xC3>": 1, "\u2581the": 2, "\u2581": 3, "\u00e9": 4}
LLAMA_DECODER = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def tokenizer(vocabulary: dict[str, int], decoder: decoders.Decoder | None) -> Tokenizer:
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    if decoder is not None:
        made.decoder = decoder
    made.add_special_tokens([AddedToken("<\u00fcber>", special=True)])
    return made


def test_sentence_piece_keeps_the_leading_space_and_single_bytes() -> None:
    token_bytes = token_bytes_of(tokenizer(SENTENCE_PIECE, LLAMA_DECODER))
    assert [token_bytes(token) for token in range(1, 6)] == [b"\xc3", b" the", b" ", b"\xc3\xa9", "<\u00fcber>".encode()]


def test_metaspace_keeps_the_leading_space() -> None:
    token_bytes = token_bytes_of(tokenizer(SENTENCE_PIECE, decoders.Metaspace()))
    assert [token_bytes(token) for token in (1, 2)] == [b"<0xC3>", b" the"]


def test_byte_level_tokens_are_their_bytes() -> None:
    vocabulary = {"\u0120the": 0, "\u00c3": 1, "\u00a9": 2, "\u010a": 3, "\u2581": 4}
    token_bytes = token_bytes_of(tokenizer(vocabulary, decoders.ByteLevel()))
    expected = [b" the", b"\xc3", b"\xa9", b"\n", "\u2581".encode(), "<\u00fcber>".encode()]
    assert [token_bytes(token) for token in range(6)] == expected


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Replace("_", "-")])
def test_other_tokenizers_decode_the_token_themselves(decoder: decoders.Decoder | None) -> None:
    made = Tokenizer(WordLevel({"hello": 0, "?": 1}, unk_token="?"))
    if decoder is not None:
        made.decoder = decoder
    assert token_bytes_of(made)(0) == b"hello"


def test_an_id_that_no_token_has_is_nothing() -> None:
    assert token_bytes_of(tokenizer(SENTENCE_PIECE, LLAMA_DECODER))(99) == b""


def test_tokens_are_kept_and_as_many_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.token_bytes._CACHED_TOKENS", 2)
    asked: list[int] = []

    class Counting:
        decoder = None

        def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
            return {}

        def id_to_token(self, token_id: int) -> str:
            asked.append(token_id)
            return "x"

        def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
            return "x"

    token_bytes = token_bytes_of(Counting())  # type: ignore[arg-type]
    for token_id in (1, 2, 1, 3, 1, 2):
        assert token_bytes(token_id) == b"x"
    assert asked == [1, 2, 3, 2]
