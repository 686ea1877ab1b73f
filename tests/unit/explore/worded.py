"""A model that was not trained: its features are the words of captions, also those of images."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.data.pairs import BadSample, Pairs
from protoclip.explore.explorer import Explorer, open_explorer
from protoclip.explore.pairs import explore_pairs
from protoclip.models import loading
from protoclip.models.protoclip import TowerPair
from testing import save_to_bytes, tiny_pairs

# Captions that would be markup, or break it, by row.
HOSTILE = {
    2: "<script>document.title='x'</script> <img src=x onerror=alert(1)> a red square",
    3: "\u202egnirts\u202c \u2066a\u2069 {{ 7*7 }} a green square",
    4: "long " * 200_000,
    5: "\"'></p></article><h1>no heading</h1>\x1b[31m a blue square",
}


def distinct_pairs(number: int) -> list[dict[str, Any]]:
    """Pairs of which no two images are equal."""
    rows: list[dict[str, Any]] = tiny_pairs(number).to_pylist()
    for place, row in enumerate(rows):
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        image.putpixel((23, 23), (place, 0, 0))
        row["image"] = save_to_bytes(image)
    return rows


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())[:50]


class Small:
    """Images as 24 x 24 pixels."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = np.asarray(image.convert("RGB").resize((24, 24)), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def __repr__(self) -> str:
        return "Small()"


class WordModel(TowerPair):
    """Knows the images of some pairs, and gives them the words of their captions."""

    def __init__(self, pairs: Pairs, *, swapped: dict[int, int] | None = None) -> None:
        super().__init__(nn.Identity())
        given = swapped or {}
        texts = []
        for row in range(len(pairs)):
            try:
                texts.append(pairs.sample_captions(row)[0])
            except BadSample:
                texts.append("")
        self.place = {
            w: n for n, w in enumerate(sorted({w for text in texts for w in words(text)}))
        }
        self.weights = nn.Parameter(torch.eye(len(self.place)))
        self.transform = Small()
        # Models with other swaps have other weights, as the cache of features expects.
        self.register_buffer("swapped", torch.tensor(sorted(given.items())).flatten())
        self.known: dict[bytes, Tensor] = {}
        for row in range(len(pairs)):
            with contextlib.suppress(ValueError, OSError):
                image = Image.open(io.BytesIO(pairs.sample(row).image))
                tokens = self.tokenizer([texts[given.get(row, row)]])[0]
                self.known[self.transform(image).byte().numpy().tobytes()] = tokens

    def tokenizer(self, texts: list[str]) -> Tensor:
        tokens = torch.zeros(len(texts), len(self.place), dtype=torch.long)
        for row, text in enumerate(texts):
            for word in words(text):
                if word in self.place:
                    tokens[row, self.place[word]] += 1
        return tokens

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return (tokens.float() + 1e-3) @ self.weights

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        none = torch.zeros(len(self.place), dtype=torch.long)
        keys = [image.byte().numpy().tobytes() for image in images]
        return self.encode_text(torch.stack([self.known.get(key, none) for key in keys]))


@contextlib.contextmanager
def loaded(*models: WordModel) -> Iterator[list[str]]:
    """References under which `protoclip.load` gives the models."""
    by_name = {f"words-{number}": model for number, model in enumerate(models, 1)}

    def load(reference: str | Path) -> Any:
        model = by_name[str(reference)]
        return model, model.transform, model.tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", load)
        patch.setattr("protoclip.rules.require_model", lambda setting, reference: None)
        yield list(by_name)


def explorers(
    data: DataConfig, *swaps: dict[int, int], class_column: str | None = None, **settings: Any
) -> list[Explorer]:
    """Word models over pairs, one for each dict of swapped captions."""
    samples = sources.open_samples(Config(data=data))
    assert isinstance(samples, Pairs)
    pairs = explore_pairs(samples, class_column=class_column)
    models = [WordModel(samples, swapped=swap) for swap in swaps or ({},)]
    with loaded(*models) as names:
        return [
            open_explorer(name, pairs, device=torch.device("cpu"), **settings) for name in names
        ]
