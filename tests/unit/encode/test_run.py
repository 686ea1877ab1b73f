"""The loop in which frozen models encode."""

import threading

import numpy as np
import torch
from torch import Tensor

from protoclip.data.pairs import Sample
from protoclip.encode.encoder import Encoder
from protoclip.encode.run import encode_missing
from protoclip.encode.store import Store, hash_ids


def test_images_are_read_while_the_model_is_at_those_before(tmp_path):
    """One batch ahead, and no more of them. Equal ids are encoded once."""
    number, size = 12, 4
    read = [threading.Event() for _ in range(number)]
    seen: list[int] = []

    def prepare(sample: Sample) -> int:
        row = int(sample.sample_id)
        read[row].set()
        return row

    def forward(rows: list[int]) -> Tensor:
        assert all(event.wait(10) for event in read[: rows[-1] + 1 + size]), (
            "it waits for the model"
        )
        seen.append(sum(event.is_set() for event in read))
        return torch.tensor(rows)[:, None].float()

    encoder = Encoder(
        module=torch.nn.Identity(),
        device=torch.device("cpu"),
        reads="image",
        prepare=prepare,
        collate=lambda rows: rows,
        forward=forward,
        examples=[0],
        facts=str,
        unit_norm=False,
    )
    hashes = hash_ids(str(row) for row in [*range(number), 3, 3])
    store = Store(tmp_path / "store")

    def sample(row: int) -> Sample:
        return Sample(sample_id=str(row), image=b"", captions=(), where="")

    assert encode_missing(store, encoder, hashes, sample, batch_size=size, threads=2) == {}
    assert seen == [8, 12, 12]
    assert store.read(store.find(hashes))[:, 0].tolist() == [*range(number), 3, 3]
    assert len(store) == number
    assert np.array_equal(Store(tmp_path / "store").find(hashes), store.find(hashes))
