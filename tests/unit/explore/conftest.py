"""Explorers that several files look at."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worded import HOSTILE, distinct_pairs, explorers

from protoclip.config import DataConfig
from protoclip.explore.explorer import Explorer


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Explorer]:
    """Two models over 60 pairs with hostile captions and ids."""
    rows = distinct_pairs(60)
    for row, caption in HOSTILE.items():
        rows[row]["caption"] = caption
    rows[6]["sample_id"] = '<b>id</b>,"quoted"/../\u202ex'
    path = tmp_path_factory.mktemp("pages") / "<i>pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return explorers(DataConfig(train=str(path)), {}, {8: 20, 9: 21})
