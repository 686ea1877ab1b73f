"""The same model over the same data, or some of them, is encoded once, whoever asks first."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from worded import distinct_pairs

from interrupting import with_changes
from protoclip.cli import main
from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.encode import features
from protoclip.encode.features import Encoder
from protoclip.encode.store import Store
from protoclip.explore.explorer import open_explorer
from protoclip.explore.pairs import explore_pairs
from protoclip.models import layers, loading
from protoclip.training.run import train
from testing import tiny_config, tiny_pairs

CPU = torch.device("cpu")
PAIRS = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one checkpoint; and beside it pairs of which no two images are equal, by which it
    was evaluated, and the cache that it had."""
    folder = tmp_path_factory.mktemp("once")
    pq.write_table(tiny_pairs(seed=1), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(distinct_pairs(PAIRS)), folder / "pairs.parquet")
    config = tiny_config(str(folder / "train.parquet"), out=str(folder / "run"))
    data = {"validation": str(folder / "pairs.parquet")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", str(folder / "cache"))
        train(with_changes(config, {"episodes": {"count": 2}, "data": data}))
    return folder / "run"


def evaluate(run: Path, data: str) -> None:
    main(["evaluate", str(run), "--data", data, "--workers", "0"])


def analyze(run: Path, _: str) -> None:
    main(["analyze", str(run), "--json"])


def explore(run: Path, data: str) -> None:
    pairs = explore_pairs(sources.open_samples(Config(data=DataConfig(train=data))))
    assert open_explorer(str(run), pairs, device=CPU, workers=0).positives == "pair"


@pytest.mark.parametrize("first", [evaluate, explore])
def test_whoever_asks_first(first, run, tmp_path, monkeypatch):
    """Others encode nothing, also of some of the pairs."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    encoded = list[int]()
    check = features.encode_numbers

    def watched(store: Store, tower: Any, *given: Any, **more: Any) -> Any:
        before = len(store)
        bad = check(store, tower, *given, **more)
        encoded.append((len(store) - before) * (tower.reads == "image"))
        return bad

    monkeypatch.setattr(features, "encode_numbers", watched)
    data = str(run.parent / "pairs.parquet")
    first(run, data)
    assert sum(encoded) == PAIRS
    for other in (evaluate, analyze, explore):
        if other is not first:
            other(run, data)
    some = pq.read_table(data).take([3, 5, 8])
    pq.write_table(some, tmp_path / "some.parquet")
    evaluate(run, str(tmp_path / "some.parquet"))
    assert sum(encoded) == PAIRS


def test_what_evaluated_a_run_in_the_end_is_not_encoded_again(run, monkeypatch):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(run.parent / "cache"))
    monkeypatch.setattr(features, "encode_numbers", Mock(side_effect=AssertionError))
    evaluate(run, str(run.parent / "pairs.parquet"))


def test_a_model_in_training_has_the_key_of_the_one_that_is_opened(run):
    """Also with BatchNorm over ranks."""
    model, transform, tokenizer = loading.load(run)
    given = {"transform": transform, "tokenizer": tokenizer}
    opened = Encoder(model=model, **given).key
    assert layers.synchronise(model, CPU) > 0
    assert Encoder(model=model, **given).key == opened
