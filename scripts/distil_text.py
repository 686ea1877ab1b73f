"""Teach a small text encoder, of two languages, the vectors of an encoder that reads only one.

For a language that no text encoder at hand reads, from sentences and their translations: a small
BERT learns from scratch that both have the vector which the teacher gives the first one, by mean
squared error (Reimers and Gurevych 2020, arXiv 2004.09813):

    python scripts/distil_text.py sentences.jsonl czech --known en --new cs
    protoclip align --model.text.name czech --data.train english_captions.jsonl ...

`align` on captions in English, or in both languages, then gives a model that is asked in Czech.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import BertWordPieceTokenizer
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from protoclip.encode.encoder import open_encoder

BATCH, MAX_TOKENS, WARM_UP = 128, 64, 0.05
SPECIAL = {
    f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")
}


def train_tokenizer(sentences: list[str], size: int) -> PreTrainedTokenizerFast:
    """WordPieces of these sentences in lower case, with their accents."""
    pieces = BertWordPieceTokenizer(lowercase=True, strip_accents=False)
    pieces.train_from_iterator(sentences, vocab_size=size, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, model_max_length=MAX_TOKENS, **SPECIAL
    )


def batches(lengths: list[int], generator: torch.Generator) -> Iterator[list[int]]:
    """The rows of a pass in batches of about equal lengths, in random order."""
    noise = torch.rand(len(lengths), generator=generator)
    order = torch.argsort(torch.tensor(lengths) + 2 * noise).split(BATCH)
    for number in torch.randperm(len(order), generator=generator).tolist():
        yield order[number].tolist()


def distil(
    sentences: list[str],
    targets: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int,
    layers: int,
    passes: int,
    learning_rate: float,
    seed: int,
) -> BertModel:
    """A BERT whose mean over tokens leads, by a linear map, to the targets (of unit norm).

    The map is not kept: `align` fits its own.
    """
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
    model = BertModel(config, add_pooling_layer=False).train()
    head = nn.Linear(width, targets.shape[1])
    rows = tokenizer(sentences, truncation=True)["input_ids"]
    lengths = [len(row) for row in rows]
    steps = passes * math.ceil(len(rows) / BATCH)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=WARM_UP
    )
    generator = torch.Generator().manual_seed(seed)
    for number in range(passes):
        total = 0.0
        for chosen in batches(lengths, generator):
            batch = tokenizer.pad({"input_ids": [rows[row] for row in chosen]}, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(2)
            with torch.autocast("cpu", torch.bfloat16):
                tokens = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            vectors = head((tokens.float() * mask).sum(dim=1) / mask.sum(dim=1))
            loss = (F.normalize(vectors, dim=1) - targets[chosen]).square().sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        print(f"pass {number + 1}: squared error {total / len(rows):.3f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentences", type=Path, help="JSON Lines with a column for each language")
    parser.add_argument("out", type=Path, help="folder to write the encoder to")
    parser.add_argument("--known", default="en", help="column in the language of the teacher")
    parser.add_argument("--new", required=True, help="column in the language to learn")
    parser.add_argument("--teacher", default="minilm", help="as `protoclip embed-teacher` takes it")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    lines = args.sentences.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    known, new = [row[args.known] for row in rows], [row[args.new] for row in rows]
    teacher = open_encoder(
        args.teacher, modality="text", pooling="mean", device=torch.device("cpu")
    )
    parts = [teacher.encode(known[begin : begin + BATCH]) for begin in range(0, len(known), BATCH)]
    targets = torch.cat(parts)
    tokenizer = train_tokenizer(known + new, args.vocabulary)
    settings = {
        name: getattr(args, name)
        for name in ("width", "layers", "passes", "learning_rate", "seed")
    }
    model = distil(known + new, targets.repeat(2, 1), tokenizer, **settings)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
