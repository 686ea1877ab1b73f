"""Several ranks make the teacher folder that one makes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from protoclip.data.pairs import ImageTextPairs
from protoclip.teachers import encode
from protoclip.testing import run_distributed

SAMPLES, WIDTH, CPU = 47, 12, torch.device("cpu")


def letters(captions: list[str]) -> torch.Tensor:
    """The feature of the model that is made up: counts of letters."""
    counts = [np.bincount([ord(c) % WIDTH for c in own], minlength=WIDTH) for own in captions]
    return torch.from_numpy(1 + np.stack(counts))


def make(out: Path, width: int | None) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    captions = ["".join(generator.choice(list("abcdefghijklm"), 9)) for _ in range(SAMPLES)]
    captions[13] = ""  # a bad sample
    table = pa.table({"caption": captions, "path": ["nowhere.png"] * SAMPLES})
    encoder = encode.Encoder(nn.Identity(), CPU, letters, lambda counts: counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "open_encoder", lambda *_, **__: encoder)
        patch.setattr(encode, "PART_ROWS", {"text": 5})
        return encode.embed_teacher(
            "letters",
            ImageTextPairs(table, name="made"),
            out,
            width=width,
            batch_size=4,
            device=CPU,
        )


@pytest.mark.parametrize("width", [None, 3])
def test_the_folder_is_that_of_one_process(width, tmp_path):
    """Byte for byte, with ten parts over two ranks, and the facts on the first."""
    one = run_distributed(make, 1, tmp_path / "one", width)[0]
    many = run_distributed(make, 2, tmp_path / "many", width)
    assert many == [one, {}]
    assert (one["rows"], one["bad"]) == (SAMPLES - 1, 1)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert expected.keys() >= {"facts.json", "features.npy", "index.npy", "skipped.jsonl"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()} == expected
