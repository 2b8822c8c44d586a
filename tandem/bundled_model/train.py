"""Trains the bundled demonstration model: a 2 M parameter Llama and its byte-level BPE tokenizer.

Must not be imported by the product. Run it to rebuild the files beside it:

    apt-get install python3.11-doc
    python tandem/bundled_model/train.py --out tandem/bundled_model

The corpus is Python's tutorial and FAQ (PSF licence) and three permissive licence texts that Debian installs; the FAQ is read a
second time as chat turns, so that the chat template means something. Every random choice comes from one seed; the same torch build
on the same number of threads gives the same weights.
"""

import argparse
import json
import random
import re
import time
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DOCS = Path("/usr/share/doc/python3.11/html/_sources")
LICENCES = Path("/usr/share/common-licenses")
END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CONTEXT_TOKENS = 4096
VOCABULARY = 2048
TOKENS_PER_STEP = 4096
# Most steps see short rows; one in five sees rows of 1,024 to 4,096 tokens, so that long prompts are in distribution.
ROW_TOKENS = [256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512, 512, 512, 512, 512, 512, 1024, 1024, 2048, 4096]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def read_corpus() -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the documents, and the FAQ's (question, answer) pairs."""
    files = sorted((DOCS / "tutorial").glob("*.txt")) + sorted((DOCS / "faq").glob("*.txt"))
    if not files:
        raise SystemExit(f"no documentation sources in {DOCS}: apt-get install python3.11-doc")
    documents = [plain_text(path.read_text()) for path in files]
    documents += [(LICENCES / name).read_text() for name in ("Apache-2.0", "BSD", "CC0-1.0")]
    turns: list[tuple[str, str]] = []
    for path in sorted((DOCS / "faq").glob("*.txt")):
        sections = re.split(r"\n([^\n]{8,}\?)\n[-=~^]{6,}\n", "\n" + plain_text(path.read_text()))
        turns += [(q.strip(), a.strip()) for q, a in zip(sections[1::2], sections[2::2], strict=True) if 20 < len(a.strip()) < 2500]
    return documents, turns


def plain_text(source: str) -> str:
    """Drops reStructuredText roles and directives that read as noise; keeps headings, prose and examples."""
    source = re.sub(
        r"^\.\. (_[^\n]*|index::[^\n]*(\n[ ]+[^\n]*)*|only::[^\n]*|sectionauthor::[^\n]*|contents::[^\n]*)\n", "", source, flags=re.M
    )
    source = re.sub(r":[a-z:+-]+:`~?([^`<]+?)\s*(?:<[^>`]*>)?`", r"\1", source)
    source = re.sub(r"``([^`]+)``", r"\1", source)
    source = re.sub(r"^\.\. [a-z-]+::\s*", "", source, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", source).strip() + "\n"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE without a merge across a word's start; the three special tokens take ids 0 to 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+[ ]*|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    """Reads the corpus, trains, and writes the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2500, help="optimiser steps of 4,096 tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)

    documents, turns = read_corpus()
    tokenizer = train_tokenizer(documents)
    end, user, assistant = (tokenizer.token_to_id(name) for name in (END, USER, ASSISTANT))
    documents_ids = [[*tokenizer.encode(text).ids, end] for text in documents]
    chats_ids = [[user, *tokenizer.encode(q).ids, end, assistant, *tokenizer.encode(a).ids, end] for q, a in turns]
    stream_tokens = sum(map(len, documents_ids))
    print(f"{len(documents)} documents, {stream_tokens} tokens; {len(turns)} chat turns, {sum(map(len, chats_ids))} tokens", flush=True)

    def epoch() -> torch.Tensor:
        """One shuffled pass over all documents and all chat turns, as one row of token ids."""
        parts = [*documents_ids, list(chain.from_iterable(rng.sample(chats_ids, len(chats_ids))))]
        rng.shuffle(parts)
        return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.long)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
            rope_theta=10_000.0,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    warm_up = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            min(1.0, (step + 1) / warm_up) * (0.5 * (1 + torch.cos(torch.tensor(3.14159265 * step / args.steps))).item() * 0.98 + 0.02)
        ),
    )
    stream, at, started, recent = epoch(), 0, time.monotonic(), []
    row_tokens_seen: dict[int, int] = {}
    for step in range(1, args.steps + 1):
        row_tokens = rng.choice(ROW_TOKENS)
        row_tokens_seen[row_tokens] = row_tokens_seen.get(row_tokens, 0) + TOKENS_PER_STEP // row_tokens
        if at + TOKENS_PER_STEP + 1 > len(stream):
            stream, at = epoch(), rng.randrange(row_tokens)
        batch = stream[at : at + TOKENS_PER_STEP].view(-1, row_tokens)
        at += TOKENS_PER_STEP
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent.append(loss.item())
        if step % 50 == 0:
            elapsed_s = time.monotonic() - started
            print(f"step {step} loss {sum(recent[-50:]) / 50:.3f} {step * TOKENS_PER_STEP / elapsed_s:.0f} tokens/s", flush=True)
        if step % 500 == 0 or step == args.steps:
            write(args.out, model, tokenizer, step, sum(recent[-200:]) / len(recent[-200:]), row_tokens_seen)


def write(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, step: int, loss: float, rows: dict[int, int]) -> None:
    """Writes weights, configuration, tokenizer and the training record."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=CONTEXT_TOKENS, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    record = {
        "steps": step,
        "tokens_per_step": TOKENS_PER_STEP,
        "loss_last_200_steps": round(loss, 4),
        "rows_by_tokens": dict(sorted(rows.items())),
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
