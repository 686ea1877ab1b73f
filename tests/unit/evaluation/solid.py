"""Images of one colour, and models that know all or nothing of what their colour says."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

import protoclip
from protoclip.data.pairs import BadSample
from protoclip.evaluation.datasets import EvaluationData, Split
from protoclip.files import checksum

CLASSES = 6
PER_CLASS = 10  # image number n is of class n // 10


class Solid:
    """Images by number, which is their red; some cannot be used."""

    def __init__(self, name: str, numbers: Sequence[int], bad: Sequence[int] = ()) -> None:
        self.name, self.numbers, self.bad = name, list(numbers), set(bad)
        self.key = checksum(f"{self.numbers} {self.bad}".encode())

    def __len__(self) -> int:
        return len(self.numbers)

    def sample_id(self, row: int) -> str:
        return f"{self.name}/{self.numbers[row]}"

    def image(self, row: int) -> Image.Image:
        if row in self.bad:
            raise BadSample(self.sample_id(row), self.name, "broken")
        return Image.new("RGB", (8, 8), (self.numbers[row], 0, 0))


def transform(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0))).float().view(3, 1, 1)


def tokenizer(texts: list[str]) -> torch.Tensor:
    """A caption's number, or 100 and a class's, alone or as "class 3"; 99 for other texts."""
    tokens = []
    for *before, last in (text.split() for text in texts):
        is_class = not before or before[-1] == "class"
        tokens.append([int(last) + 100 * is_class if last.isdigit() else 99])
    return torch.tensor(tokens)


class Knowing(nn.Module):
    """Features that say class and number, of any norm; `calls` counts encoded batches."""

    def __init__(self) -> None:
        super().__init__()
        number = torch.arange(100)
        texts = torch.zeros(110, CLASSES + 101)
        texts[number, (number // PER_CLASS).clamp(max=CLASSES - 1)] = 1
        texts[number, CLASSES + number] = 0.5
        classes = torch.arange(CLASSES)
        texts[100 + classes, classes] = 1
        texts[100 + CLASSES :, -1] = 1
        self.table = nn.Parameter(3 * texts)
        self.calls = {"image": 0, "text": 0}

    def encode_image(self, images, normalize=False):
        self.calls["image"] += 1
        return self.table[images[:, 0, 0, 0].long()]

    def encode_text(self, tokens, normalize=False):
        self.calls["text"] += 1
        return self.table[tokens[:, 0]]


class Guessing(Knowing):
    """Random features, a function of the input."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(110, 12, generator=generator))
        self.text_table = nn.Parameter(torch.randn(110, 12, generator=generator))

    def encode_text(self, tokens, normalize=False):
        self.calls["text"] += 1
        return self.text_table[tokens[:, 0]]


def part(name: str, numbers: Sequence[int], bad: Sequence[int] = ()) -> Split:
    labels = torch.tensor(numbers) // PER_CLASS
    captions = [(f"number {number}", f"a picture of {number}") for number in numbers]
    return Split(images=Solid(name, numbers, bad), labels=labels, captions=captions)


def solid_data(name: str = "solid", bad: Sequence[int] = ()) -> EvaluationData:
    """Half of the numbers in train, a fifth in validation, the rest in test, two captions each."""
    numbers = range(CLASSES * PER_CLASS)
    kinds = {"train": (0, 1, 2, 3, 4), "validation": (5, 6), "test": (7, 8, 9)}
    return EvaluationData(
        name=name,
        splits={
            split: part(split, [n for n in numbers if n % 10 in last], bad * (split == "test"))
            for split, last in kinds.items()
        },
        class_names=[f"{number}" for number in range(CLASSES)],
        templates=("a class {c}", "some class {c}"),
    )


def read_records(model, data, tasks=None, **more):
    """The records of `protoclip.evaluate`, by task."""
    given = model, transform, tokenizer, data
    found = protoclip.evaluate(*given, tasks, **{"workers": 0, "model_name": "m", **more})
    return {record["task"]: record for record in found}
