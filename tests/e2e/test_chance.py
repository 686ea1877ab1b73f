"""A model that knows nothing of what images show ranks captions at chance."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import protoclip
from interrupting import with_changes
from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation import datasets
from protoclip.evaluation.zero_shot import zero_shot_ranks
from protoclip.training import run
from testing import tiny_config, tiny_pairs


def relative_rank(model, transform, tokenizer, pairs: ImageTextPairs) -> float:
    """How far down an image's own caption stands among all captions, in the mean, from 0 to 1."""
    own = list(pairs.column("caption"))
    texts = sorted(set(own))
    images = torch.stack([transform(pairs.image(row)) for row in range(0, len(own), 3)])
    with torch.no_grad():
        found = model.encode_image(images, normalize=True)
        wanted = model.encode_text(tokenizer(texts), normalize=True)
    ranks = zero_shot_ranks(found, wanted, datasets.find_positions(own, texts)[::3])
    return float(ranks.double().mean()) / (len(texts) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [True, False])
def test_shuffled_captions_teach_nothing(shuffled, tmp_path):
    """While the images' own captions teach shapes and colours in as many steps."""
    table = tiny_pairs(300)
    if shuffled:
        captions = np.random.default_rng(0).permutation(table["caption"].to_pylist())
        table = table.set_column(1, "caption", pa.array(captions))
    pq.write_table(table, tmp_path / "pairs.parquet")
    config = tiny_config(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "run"))
    sections = {
        "run": {"evaluate": False},
        "episodes": {"size": 256, "count": 4, "batch_size": 32},
    }
    config = with_changes(config, sections)
    run.train(config)
    new = ImageTextPairs(tiny_pairs(150, seed=1), name="new")
    rank = relative_rank(*protoclip.load(tmp_path / "run"), new)
    assert 0.2 < rank < 0.8 if shuffled else rank < 0.15, rank
