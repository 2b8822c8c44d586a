"""Prompts become the ids that the engine's own tokenizer makes of them; what cannot is refused by name."""

import json
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from router import tokenizer as router_tokenizer
from router.tokenizer import PromptTokenizer, Tokenizers
from tandem.errors import ConfigError, InvalidRequestError, Reason

pytestmark = pytest.mark.integration

BUNDLED = Path(__file__).resolve().parents[2] / "tandem" / "bundled_model"
WORDS = {"<s>": 0, "hello": 1, "world": 2, "user:": 3, "assistant:": 4, "?": 5}
TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _model(folder: Path, *, template: str | None = None, template_in_config: object = None) -> str:
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {"bos_token": {"content": "<s>"}, "eos_token": None}
    if template_in_config is not None:
        settings["chat_template"] = template_in_config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


async def test_text_gets_the_special_tokens_and_is_neither_cut_nor_padded(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.load(_model(tmp_path))
    assert await tokenizer.encode_text("hello") == (0, 1)
    assert await tokenizer.encode_text("hello world hello world hello") == (0, 1, 2, 1, 2, 1)


async def test_a_long_text_is_encoded_in_a_thread_to_the_same_ids(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.load(_model(tmp_path))
    assert await tokenizer.encode_text("hello " * 1000) == (0, *[1] * 1000)


@pytest.mark.parametrize("place", ["file", "config", "named in config"])
async def test_chat_is_written_by_the_template_with_its_own_special_tokens(tmp_path: Path, place: str) -> None:
    in_config = {
        "file": None,
        "config": TEMPLATE,
        "named in config": [{"name": "x", "template": "?"}, {"name": "default", "template": TEMPLATE}],
    }
    path = _model(tmp_path, template=TEMPLATE if place == "file" else None, template_in_config=in_config[place])
    tokenizer = PromptTokenizer.load(path)
    assert await tokenizer.encode_chat([{"role": "user", "content": "hello world"}]) == (0, 3, 1, 2, 4)


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"chat_template": "{% nonsense %}"}'])
async def test_a_damaged_template_is_an_error_of_chats_only(tmp_path: Path, content: bytes) -> None:
    path = _model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    tokenizer = PromptTokenizer.load(path)
    assert await tokenizer.encode_text("hello") == (0, 1)
    for _ in range(2):
        with pytest.raises(ConfigError, match="chat template cannot be read") as caught:
            await tokenizer.encode_chat([{"role": "user", "content": "hello"}])
        assert caught.value.reason is Reason.BAD_MODEL


@pytest.mark.parametrize(("messages", "is_in_thread"), [(1, False), (100, True)])
async def test_many_empty_messages_are_work_for_a_thread(tmp_path: Path, messages: int, is_in_thread: bool) -> None:
    tokenizer, threads = PromptTokenizer.load(_model(tmp_path, template=TEMPLATE)), []

    def encode(*arguments: object) -> tuple[int, ...]:
        threads.append(threading.current_thread())
        return (1,)

    tokenizer._encode_chat = encode  # type: ignore[assignment]
    assert await tokenizer.encode_chat([{"role": "user", "content": ""}] * messages) == (1,)
    assert (threads[0] is not threading.main_thread()) is is_in_thread


async def test_a_model_without_template_refuses_chat(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.load(_model(tmp_path))
    with pytest.raises(InvalidRequestError, match="no chat template"):
        await tokenizer.encode_chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ missing.field }}", "{{ messages + 1 }}", "{{ ''.__class__.__mro__ }}"],
)
async def test_a_template_that_refuses_or_misbehaves_is_the_requests_error(tmp_path: Path, template: str) -> None:
    tokenizer = PromptTokenizer.load(_model(tmp_path, template=template))
    with pytest.raises(InvalidRequestError, match="chat template refuses"):
        await tokenizer.encode_chat([{"role": "user", "content": "hello"}])


async def test_what_templates_expect_of_their_environment_is_there(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'stop' %}{% break %}{% endif %}{{ m.content }} {% endfor %}{{ {'a': 'é'}|tojson }}"
    )
    tokenizer = PromptTokenizer.load(_model(tmp_path, template=template + "{{ strftime_now('') }}"))
    ids = await tokenizer.encode_chat([{"role": "user", "content": text} for text in ("hello", "stop", "world")])
    assert ids == (1, 5, 5)


async def test_the_bundled_models_tokenizer_reads_text_and_chat() -> None:
    tokenizer = await Tokenizers().get(str(BUNDLED))
    raw = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    assert await tokenizer.encode_text("You may reproduce") == tuple(raw.encode("You may reproduce").ids)
    ids = await tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert raw.decode(list(ids), skip_special_tokens=False) == "<|user|>Hi<|end|><|assistant|>"


async def test_a_tokenizer_is_loaded_once_and_a_failure_is_tried_again(tmp_path: Path) -> None:
    tokenizers = Tokenizers()
    with pytest.raises(ConfigError) as caught:
        await tokenizers.get(str(tmp_path))
    assert caught.value.reason is Reason.BAD_MODEL
    path = _model(tmp_path)
    first = await tokenizers.get(path)
    assert await tokenizers.get(path) is first


async def test_tokenizers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_tokenizer, "MAX_TOKENIZERS", 2)
    paths = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        paths.append(_model(tmp_path / name))
    tokenizers = Tokenizers()
    loaded = [await tokenizers.get(path) for path in paths]
    assert await tokenizers.get(paths[2]) is loaded[2]
    assert await tokenizers.get(paths[0]) is not loaded[0]


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json .* cannot be read"):
        PromptTokenizer.load(str(tmp_path))


def test_a_folder_that_is_not_here_is_named_and_never_asked_of_the_hub() -> None:
    with pytest.raises(ConfigError, match="not on the router's machine"):
        PromptTokenizer.load("/no/such/folder")
    with pytest.raises(ConfigError, match="not on the router's machine"):
        PromptTokenizer.load("")
