"""Tokenizers of text towers: captions to tokens of one length, which are remembered."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import open_clip
import torch
from jaxtyping import Int
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer
from torch import Tensor

from protoclip.data.captions import legible

Tokenizer = Callable[[list[str]], Tensor]
# A text in which tokenizers differ: capitals, accents, digits, punctuation, and other scripts.
TELLING = "It's a DOG, 3.14% Naïve-É; 狗 собака كلب"


class RememberingTokenizer:
    """Remembers the tokens of up to `capacity` captions, which training tokenizes repeatedly."""

    def __init__(self, tokenizer: Tokenizer, *, capacity: int = 100_000) -> None:
        self.tokenizer = tokenizer
        self.capacity = capacity
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str] | str) -> Int[Tensor, "b c"]:
        if isinstance(texts, str):  # open_clip's tokenizers take a single caption too
            texts = [texts]
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        tokens: dict[str, Tensor] = {}
        if new:
            rows = self.tokenizer([legible(text) for text in new])
            tokens = dict(zip(new, rows, strict=True))
        batch = torch.stack([self._known[t] if t in self._known else tokens[t] for t in texts])
        if len(self._known) + len(tokens) <= self.capacity:
            self._known |= tokens
        return batch


def open_clip_tokenizer(
    text: Mapping[str, Any], *, context_length: int | None = None, source: str | None = None
) -> Tokenizer:
    """The tokenizer of an open_clip model, by its `text_cfg`; CLIP's if that names none.

    A Hugging Face tokenizer is read from `source`, if given, and otherwise by its name.
    """
    length = context_length or text.get("context_length") or DEFAULT_CONTEXT_LENGTH
    settings = text.get("tokenizer_kwargs") or {}
    tokenizer: Tokenizer
    if text.get("hf_tokenizer_name"):
        tokenizer = HFTokenizer(
            source or text["hf_tokenizer_name"],
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            trust_remote_code=False,
            **settings,
        )
    elif settings:
        tokenizer = open_clip.SimpleTokenizer(context_length=length, **settings)
    else:
        tokenizer = clip_tokenizer(length)
    return RememberingTokenizer(tokenizer)


@cache
def clip_tokenizer(context_length: int) -> Tokenizer:
    """CLIP's tokenizer, built once: reading its merges takes a tenth of a second."""
    tokenizer: Tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
    return tokenizer


class TokenCounter:
    """Counts the tokens of captions before they are cut, start and end included."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)

    def __call__(self, texts: list[str]) -> list[int]:
        texts = [legible(text) for text in texts]
        if hasattr(self.tokenizer, "encode"):
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        return [len(ids) for ids in self.tokenizer.tokenizer(texts)["input_ids"]]
