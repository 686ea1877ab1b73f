"""A model that knows nothing of what images show ranks captions at chance."""

from functools import partial

import pyarrow.parquet as pq
import pytest
import torch

import protoclip
from interrupting import with_changes
from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation import datasets, suite
from protoclip.evaluation.retrieval import zero_shot_ranks
from protoclip.models import loading
from protoclip.testing import tiny_config, tiny_model, tiny_pairs
from protoclip.training import run


def relative_rank(model, transform, tokenizer, pairs: ImageTextPairs, column: str) -> float:
    """How far down an image's own text stands among all texts of a column, in the mean: from 0,
    always first, to 1, always last."""
    own = list(pairs.column(column))
    texts = sorted(set(own))

    def encode(forward, inputs, items):
        settings = {"stage": "test", "batch_size": 256, "device": "cpu"}
        forward = partial(forward, normalize=True)
        return suite.encode(forward, inputs, items, **settings)

    def images(rows):
        return torch.stack([transform(pairs.image(row)) for row in rows])

    ranks = zero_shot_ranks(
        encode(model.encode_image, images, range(0, len(own), 3)),
        encode(model.encode_text, lambda batch: tokenizer(list(batch)), texts),
        datasets.positions(own, texts)[::3],
    )
    return float(ranks.double().mean()) / (len(texts) - 1)


def test_an_untrained_model_ranks_at_chance():
    """On the emoji's unseen concepts, within four standard deviations."""
    config = tiny_model()
    model = loading.model(config, seed=0).eval()
    given = model, loading.evaluation_transform(model), loading.tokenizer(config)
    assert abs(relative_rank(*given, datasets.emoji().test, "label") - 0.5) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [True, False])
def test_shuffled_captions_teach_nothing(shuffled, tmp_path):
    """While the images' own captions teach shapes and colours in as many steps."""
    pq.write_table(tiny_pairs(300), tmp_path / "pairs.parquet")
    config = tiny_config(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "run"))
    sections = {
        "run": {"evaluate": False},
        "data": {"shuffle_captions": shuffled},
        "episodes": {"size": 256, "count": 4, "batch_size": 32},
    }
    config = with_changes(config, sections)
    run.train(config)
    new = ImageTextPairs(tiny_pairs(150, seed=1), name="new")
    rank = relative_rank(*protoclip.load(tmp_path / "run"), new, "caption")
    assert 0.2 < rank < 0.8 if shuffled else rank < 0.15, rank
