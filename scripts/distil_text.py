"""Teach a small text encoder, of two languages, the vectors of an encoder that reads one of them.

For a language that no text encoder at hand reads, from sentences and their translations: a small
BERT learns from scratch that both have the vector which the teacher gives the first one, by mean
squared error (Reimers and Gurevych 2020, arXiv 2004.09813):

    python scripts/distil_text.py sentences.jsonl czech --new cs
    protoclip align --model.text.name czech --data.train english_captions.jsonl ...

`align` on captions in English then gives a model that is asked in both languages. Choose settings
by the sentences that are held out: each pass prints how near they come.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from protoclip.data.access import cache_folder
from protoclip.data.pairs import Sample
from protoclip.encode.encoder import open_encoder
from protoclip.encode.run import encode_missing
from protoclip.encode.store import FULL, Store, hash_ids

BATCH, MAX_TOKENS, WARM_UP = 128, 64, 0.05
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}


def encode_sentences(teacher: str, sentences: list[str]) -> Float[Tensor, "n q"]:
    """The teacher's vectors, of unit norm; they are kept in the cache folder."""
    cpu = torch.device("cpu")
    encoder = open_encoder(teacher, modality="text", pooling="mean", device=cpu)
    hashes = hash_ids(sentences)
    store = Store(cache_folder() / "features" / encoder.key(), dtype=FULL, is_optional=True)

    def read(row: int) -> Sample:
        return Sample(sample_id=str(row), image=b"", captions=(sentences[row],), where=teacher)

    encode_missing(store, encoder, hashes, read, batch_size=BATCH)
    return torch.from_numpy(store.read(store.find(hashes)))


def train_tokenizer(sentences: list[str], size: int) -> PreTrainedTokenizerFast:
    """WordPieces of these sentences in lower case, with their accents."""
    pieces = BertWordPieceTokenizer(lowercase=True, strip_accents=False)
    pieces.train_from_iterator(sentences, vocab_size=size, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, model_max_length=MAX_TOKENS, **SPECIAL
    )


def make_student(
    tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, seed: int
) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=2 * width,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertModel(config, add_pooling_layer=False)


def encode_tokens(
    model: BertModel, tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]
) -> Float[Tensor, "b q"]:
    """The mean over tokens, of unit norm."""
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        states = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(2)
    return F.normalize((states.float() * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


def draw_batches(rows: list[list[int]], generator: torch.Generator) -> Iterator[list[int]]:
    """The numbers of all rows in batches of about equal lengths, in random order."""
    lengths = torch.tensor([len(row) for row in rows])
    order = torch.argsort(lengths + 2 * torch.rand(len(rows), generator=generator)).split(BATCH)
    for number in torch.randperm(len(order), generator=generator).tolist():
        yield order[number].tolist()


def train(
    model: BertModel,
    tokenizer: PreTrainedTokenizerFast,
    sentences: list[str],
    targets: Float[Tensor, "n q"],
    *,
    passes: int,
    learning_rate: float,
    seed: int,
) -> Iterator[float]:
    """Train by mean squared error to the targets; yields that of each pass."""
    rows = tokenizer(sentences, truncation=True)["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    steps = passes * math.ceil(len(rows) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=WARM_UP
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        model.train()
        total = 0.0
        for numbers in draw_batches(rows, generator):
            vectors = encode_tokens(model, tokenizer, [rows[number] for number in numbers])
            loss = (vectors - targets[numbers]).square().sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(numbers)
        model.eval()
        yield total / len(rows)


@torch.no_grad()
def compare_held_out(
    model: BertModel,
    tokenizer: PreTrainedTokenizerFast,
    sentences: list[str],
    targets: Float[Tensor, "n q"],
) -> str:
    """Squared error, and how many sentences are closest to the vector of their translation."""
    vectors = encode_tokens(model, tokenizer, tokenizer(sentences, truncation=True)["input_ids"])
    error = float((vectors - targets).square().sum(dim=1).mean())
    found = (vectors @ targets.T).argmax(dim=1) == torch.arange(len(targets))
    return f"; held out {error:.3f}, {int(found.sum())} of {len(found)} find their translation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentences", type=Path, help="JSON Lines with a column for each language")
    parser.add_argument("out", type=Path, help="folder to write the encoder to")
    parser.add_argument("--known", default="en", help="column in the language of the teacher")
    parser.add_argument("--new", required=True, help="column in the language to learn")
    parser.add_argument("--teacher", default="minilm", help="as `protoclip embed-teacher` takes it")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--held_out", type=int, default=500, help="the last sentences of the file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    lines = args.sentences.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    known, new = [row[args.known] for row in rows], [row[args.new] for row in rows]
    targets = encode_sentences(args.teacher, known)
    end = len(rows) - args.held_out
    sentences = known[:end] + new[:end]
    tokenizer = train_tokenizer(sentences, args.vocabulary)
    model = make_student(tokenizer, width=targets.shape[1], layers=args.layers, seed=args.seed)
    errors = train(
        model,
        tokenizer,
        sentences,
        targets[:end].repeat(2, 1),
        passes=args.passes,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    for number, error in enumerate(errors, 1):
        line = f"pass {number}: squared error {error:.3f}"
        if args.held_out:
            line += compare_held_out(model, tokenizer, new[end:], targets[end:])
        print(line, flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
