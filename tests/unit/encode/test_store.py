"""Where features are encoded to, also when others write there; and the loop that encodes."""

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from protoclip.data.pairs import Sample
from protoclip.distributed.collectives import rank
from protoclip.encode.encoder import Encoder
from protoclip.encode.run import encode_missing
from protoclip.encode.store import FEATURES_END, FULL, RowFile, Store, StoredRows, hash_ids
from protoclip.files import lock_path
from testing import run_distributed

HASHES = hash_ids("abc")
FEATURES = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.mark.parametrize("what", ["a file in its place", "another process that adds to it"])
def test_an_optional_store_holds_in_memory_what_cannot_be_written(tmp_path, what, capsys):
    folder = tmp_path / "store"
    if what.startswith("a file"):
        folder.write_text("")
        store = Store(folder, dtype=FULL, is_optional=True)
        store.add(HASHES, FEATURES)
        assert "warning: features are not kept" in capsys.readouterr().err
    else:
        store = Store(folder, dtype=FULL, is_optional=True)
        with lock_path(folder):
            store.add(HASHES, FEATURES)
        assert not capsys.readouterr().err
    store.open()  # as at the end of each encoding
    store.add(hash_ids("d"), FEATURES[:1])
    store.open()
    assert np.array_equal(store.read(store.find(hash_ids("cad"))), FEATURES[[2, 0, 0]])
    assert len(store) == 4
    assert folder.is_file() or not len(Store(folder, dtype=FULL))


def test_an_optional_store_passes_over_ids_that_it_has(tmp_path):
    store = Store(tmp_path / "store", dtype=FULL, is_optional=True)
    store.add(hash_ids("aab"), FEATURES)
    store.add(HASHES, 10 + FEATURES)
    for opened in (store, Store(tmp_path / "store", dtype=FULL)):
        assert len(opened) == 3
        found = opened.read(opened.find(HASHES))
        assert np.array_equal(found, [FEATURES[0], FEATURES[2], 10 + FEATURES[2]])


def add_unseen(folder: Path) -> list[list[float]]:
    """A store of which each rank sees another folder, as hosts do that have a cache each."""
    store = Store(folder / str(rank()), dtype=FULL, is_optional=True)
    store.add(HASHES, FEATURES)
    store.open()
    return store.read(store.find(HASHES)).tolist()


def test_hosts_with_a_cache_each_hold_what_they_add(tmp_path):
    assert run_distributed(add_unseen, 2, tmp_path) == 2 * [FEATURES.tolist()]


def test_a_store_reads_on_in_the_one_before(tmp_path):
    before = Store(tmp_path / "before", setting="x")
    before.add(hash_ids("ab"), FEATURES[:2])
    before.open()
    store = Store(tmp_path / "store", dtype=FULL, setting="x", before=before)
    store.add(hash_ids("c"), FEATURES[2:])
    store.open()
    assert np.array_equal(store.read(store.find(HASHES)), FEATURES)
    assert len(Store(tmp_path / "store", dtype=FULL)) == 1


def test_rows_of_a_file_are_those_of_its_array(tmp_path, monkeypatch):
    monkeypatch.setattr("protoclip.encode.store.BLOCK_ROWS", 4)
    array = np.random.default_rng(0).random((20, 3)).astype(np.float16)
    (tmp_path / "rows").write_bytes(b"head" + array.tobytes())
    file = RowFile(tmp_path / "rows", array.dtype, array.shape, 4)
    for rows in ([], [7], [3, 3, 2, 19, 0, 1, 2], range(20), range(19, -1, -1)):
        numbers = np.array(rows, np.int32)
        assert np.array_equal(file[numbers], array[numbers])
        assert np.array_equal(pickle.loads(pickle.dumps(file))[numbers], array[numbers])


@pytest.mark.parametrize("most", [0, 2**20])
def test_rows_of_a_store_are_read_once_if_memory_can_keep_them(tmp_path, monkeypatch, most):
    monkeypatch.setattr("protoclip.encode.store.KEPT_BYTES", most)
    store = Store(tmp_path)
    hashes, features = hash_ids("abc"), np.arange(12, dtype=np.float16).reshape(3, 4)
    store.add(hashes, features)
    store.open()
    rows = StoredRows(store, np.array([2, -1, 0], np.int32))
    assert rows.width == 4
    assert rows[np.array([2, 0, 0])].tolist() == features[[0, 2, 2]].tolist()
    (file,) = tmp_path.glob(f"*{FEATURES_END}")
    file.write_bytes(b"\xff" * file.stat().st_size)
    if most:
        assert rows[np.array([0])].tolist() == features[[2]].tolist()
        return
    with pytest.raises(ValueError, match="damaged"):
        rows[np.array([0])]


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
