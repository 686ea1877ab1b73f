"""An evaluation shared by several ranks is the one that a single process makes."""

import copy
import json
from dataclasses import replace
from typing import Any, Literal
from unittest.mock import Mock

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import protoclip
from protoclip.config import ParallelConfig
from protoclip.data.pairs import ImageTextPairs
from protoclip.distributed import collectives
from protoclip.distributed.parallel import shard, spread
from protoclip.evaluation import datasets, suite
from protoclip.evaluation.datasets import EvaluationData
from protoclip.models.protoclip import ProtoCLIP
from protoclip.testing import run_distributed, tiny_config, tiny_pairs
from protoclip.training.run import train

# Batches of 8: 8 of the training images, 3 and 5 of the others; 2 of the captions, 1 of the
# classes, which leaves a rank without one.
SIZES = {"train": 60, "validation": 24, "test": 37}


def tiny_data() -> EvaluationData:
    """Coloured shapes; a caption is a concept, a colour a class."""
    parts = {}
    for seed, (split, size) in enumerate(SIZES.items()):
        table = tiny_pairs(size, seed=seed)
        captions = table["caption"].to_pylist()
        for name in ("concept", "label"):
            table = table.append_column(name, pa.array(captions))
        colours = pa.array([caption.split()[1] for caption in captions])
        parts[split] = ImageTextPairs(
            table.append_column("subgroup", colours), name=f"tiny/{split}"
        )
    return EvaluationData(name="tiny", **parts)


class TinyModel(ProtoCLIP):
    """Two towers with fixed weights; those of the image tower see every pixel."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image_tower = nn.Sequential(
                nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 16)
            )
            self.text_tower = nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), nn.Linear(320, 16))

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        return F.normalize(self.image_tower(images), dim=1)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        return F.normalize(self.text_tower(tokens), dim=1)


def transform(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(24, 24, 3).permute(2, 0, 1).float() / 255


def tokens(texts: list[str]) -> Tensor:
    return torch.tensor([[ord(letter) for letter in text.ljust(20)] for text in texts])


def evaluated(model: ProtoCLIP | None = None) -> tuple[dict[str, Tensor], dict[str, float]]:
    data = tiny_data()
    given = model or TinyModel(), transform, tokens, data
    features = suite.extract(*given, split="test", batch_size=8)
    return features, suite.measure(features, data, split="test")[0]


def test_every_rank_has_the_features_and_metrics_of_one_process():
    """To the last bit and in the same order, with some ranks without a batch."""
    ((alone, metrics),) = run_distributed(evaluated, 1)
    assert {split: len(alone[split]) for split in SIZES} == SIZES
    assert len(metrics) == 18
    for features, shared in run_distributed(evaluated, 2):
        assert features.keys() == alone.keys()
        assert all(torch.equal(features[name], rows) for name, rows in alone.items())
        assert list(shared.items()) == list(metrics.items())


class LastBatchFails(TinyModel):
    """Not finite in one batch alone: the last of the training images, number 7, with 4 rows."""

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        features = super().encode_image(images)
        return features.log() if len(images) == 4 else features


def evaluate_what_fails_on_one_rank() -> tuple[str, list[int]]:
    """The error here, and a collective afterwards: whether the ranks are still in step."""
    with pytest.raises(ValueError, match="finite") as error:
        evaluated(LastBatchFails())
    return str(error.value), collectives.all_gather_object(collectives.rank())


def test_features_that_are_not_finite_are_refused_on_every_rank():
    """Though only the last rank has met them; none is left waiting."""
    for message, ranks in run_distributed(evaluate_what_fails_on_one_rank, 2):
        assert message == "tiny images: train: the model's features are not finite; it has diverged"
        assert ranks == [0, 1]


def error_in_one_metric() -> str:
    """What is raised here for an error of the fifth stage, which rank 0 computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "knn_predict", Mock(side_effect=ValueError("one line")))
        with pytest.raises(ValueError, match="one line") as raised:
            evaluated()
    return type(raised.value).__name__


def test_an_error_in_one_metric_is_raised_on_every_rank():
    """Unchanged on the rank that computes the metric, and with its message on the others."""
    assert run_distributed(error_in_one_metric, 2) == ["ValueError", "RaisedOnAnotherRank"]


class TinyTowers(nn.Module):
    """The least that can be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.7))

    def encode_image(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images.flatten(1))
        return features


def encode(model: ProtoCLIP, number: int, broken: int | None = None) -> Tensor:
    """Features of the first so many colours, of which one cannot be read."""

    def read(rows: Any) -> Tensor:
        if broken in rows:
            raise OSError(f"image {broken}: gone")
        return torch.tensor(rows).float().view(-1, 1, 1, 1).expand(-1, 3, 1, 2)

    return suite.encode(
        model.encode_image, read, range(number), stage="colours", batch_size=2, device="cpu"
    )


def sharded_features(numbers: list[int]) -> tuple[list[Tensor], str]:
    """Features by a model of which each rank has a shard, and the error for an unreadable image."""
    torch.manual_seed(0)
    model = whole = ProtoCLIP(TinyTowers(), nn.Linear(4, 4))
    if collectives.world_size() > 1:
        model = copy.deepcopy(whole)
        shard(model, torch.device("cpu"))
        spread(model, whole if collectives.rank() == 0 else None)
    found = [encode(model, number) for number in numbers]
    with pytest.raises((OSError, ValueError)) as error:
        encode(model, 8, broken=3)
    return found, str(error.value)


def test_every_rank_enters_every_forward_of_a_sharded_model():
    """With no rows, with fewer batches than ranks, and with a last round in which one rank has no
    batch. An image that one rank cannot read ends all before the forward."""
    numbers = [0, 1, 3, 9, 10]
    ((expected, _),) = run_distributed(sharded_features, 1, numbers)
    assert [len(rows) for rows in expected] == numbers
    for found, error in run_distributed(sharded_features, 2, numbers):
        for rows, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(rows, wanted)
        assert error == "image 3: gone"


def trained(strategy: Literal["ddp", "fsdp"], out: str) -> dict[str, float]:
    config = tiny_config(out=out)
    config = replace(
        config,
        run=replace(config.run, evaluate_every=1),
        parallel=ParallelConfig(strategy=strategy),
        episodes=replace(config.episodes, count=2, size=16, locked_image=0),
        prototypes=replace(config.prototypes, number=4),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "emoji", tiny_data)
        found: dict[str, float] = train(config)["metrics"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_evaluates_as_one_process_does(strategy, tmp_path, monkeypatch):
    """During training, which goes on after it, and at the end, as its checkpoint scores alone."""
    first, second = run_distributed(trained, 2, strategy, str(tmp_path / "run"))
    monkeypatch.setattr(datasets, "emoji", tiny_data)
    alone = suite.evaluate(*protoclip.load(tmp_path / "run"), split="test", show=False)
    assert len(alone) == 18
    assert first == second
    # Filters in another order in memory change the last digits.
    assert first == pytest.approx(alone, abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sum(any(name.startswith("eval/") for name in line) for line in lines) == 2
