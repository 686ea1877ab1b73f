"""An evaluation that is shared out over processes is the one that a single process makes."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from protoclip.config import ParallelConfig
from protoclip.data.emoji import emoji_table
from protoclip.data.pairs import ImageTextPairs
from protoclip.distributed import collectives
from protoclip.distributed.parallel import shard, spread
from protoclip.evaluation import datasets, suite
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.suite import SuiteFeatures
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP
from protoclip.testing import run_distributed, tiny_config, tiny_pairs
from protoclip.training import session
from protoclip.training.run import train

# Batches of 8: 8 of the training pictures, 3 and 5 of the others; 2 of the captions, 1 of the
# classes, which leaves some of four processes without one.
SIZES = {"train": 60, "validation": 24, "test": 37}
BATCH_SIZE = 8
WORLD_SIZES = (1, 2, 4)


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


class TinyModel(nn.Module):
    """Two towers with weights of a seed; those of the image tower see every pixel."""

    def __init__(self) -> None:
        super().__init__()
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


def extract() -> SuiteFeatures:
    return suite.extract(
        TinyModel().eval(),
        transform,
        tokens,
        tiny_data(),
        split="test",
        device="cpu",
        batch_size=BATCH_SIZE,
        progress=lambda stage, done, total: None,
    )


def evaluate(model: nn.Module | None = None, **settings: Any) -> dict[str, float]:
    return suite.evaluate(
        model or TinyModel(),
        transform,
        tokens,
        tiny_data(),
        device="cpu",
        batch_size=BATCH_SIZE,
        **settings,
    )


def evaluate_with_progress() -> tuple[dict[str, float], list[tuple[str, int, int]]]:
    calls: list[tuple[str, int, int]] = []
    return evaluate(progress=lambda *call: calls.append(call)), calls


def test_features_have_the_same_bits_and_order_in_every_process() -> None:
    """Of every split and text, whatever the number of processes; some have no batch of a kind."""
    (alone,) = run_distributed(extract, 1)
    assert {split: len(rows) for split, rows in alone.images.items()} == SIZES
    for world_size in WORLD_SIZES[1:]:
        for found in run_distributed(extract, world_size):
            for split, rows in alone.images.items():
                assert rows.dtype == torch.float32
                assert torch.equal(found.images[split], rows)
            assert torch.equal(found.captions, alone.captions)
            assert torch.equal(found.names, alone.names)
            assert torch.equal(found.classes, alone.classes)


def test_metrics_are_equal_for_one_two_and_four_processes() -> None:
    """Every process has all of them, equal to the last bit and in the same order, and only rank 0
    shows progress, which rises to each stage's end."""
    ((alone, shown_alone),) = run_distributed(evaluate_with_progress, 1)
    assert len(alone) == 18
    assert all(value == value for value in alone.values())
    totals = {stage: total for stage, _, total in shown_alone}
    for world_size in WORLD_SIZES[1:]:
        answers = run_distributed(evaluate_with_progress, world_size)
        for rank, (metrics, shown) in enumerate(answers):
            assert metrics == alone
            assert list(metrics) == list(alone)
            assert bool(shown) == (rank == 0)
        _, shown = answers[0]
        assert {stage: total for stage, _, total in shown} == totals
        for stage, total in totals.items():
            done = [call[1] for call in shown if call[0] == stage]
            # The texts are shown a kind after the other under one name, each from the start.
            assert done == sorted(done) or "texts" in stage
            assert done[-1] == total


class LastBatchFails(TinyModel):
    """Not finite in one batch alone: the last of the training pictures, number 7, with 4 rows."""

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        features = super().encode_image(images)
        return features.log() if len(images) == 4 else features


def evaluate_what_fails_in_one_process() -> tuple[str, list[int]]:
    """The error here, and a collective afterwards: whether the processes are still in step."""
    try:
        evaluate(LastBatchFails())
    except ValueError as error:
        message = str(error)
    return message, collectives.all_gather_object(collectives.rank())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_features_that_are_not_finite_are_refused_in_every_process(world_size: int) -> None:
    """With the one message, though only the last process has met them; none is left waiting."""
    for message, ranks in run_distributed(evaluate_what_fails_in_one_process, world_size):
        assert message == "tiny images: train: the model's features are not finite; it has diverged"
        assert ranks == list(range(world_size))


class Unsendable(Exception):
    """It cannot be made from its message alone, and so not be unpickled."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"{what} number {number}")


ERRORS = {
    "value": ValueError("one line"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "file": FileNotFoundError(2, "No such file or directory", "picture.png"),
    "other": Unsendable(7, "thing"),
}


def fail_in_one_metric(which: str) -> tuple[int, str, str]:
    """The number of calls of the failing metric here, the error's class, and its message."""
    calls = []

    def fail(*arguments: Any, **settings: Any) -> dict[str, float]:
        calls.append(which)
        raise ERRORS[which]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "knn_predict", fail)
        try:
            evaluate()
        except Exception as error:
            return len(calls), type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("which", "kind", "message"),
    [
        ("value", "RaisedOnAnotherRank", "one line"),
        ("memory", "RuntimeError", "CUDA out of memory. Tried to allocate 2 GiB"),
        ("file", "RaisedOnAnotherRank", "[Errno 2] No such file or directory: 'picture.png'"),
        ("other", "RuntimeError", "Unsendable: thing number 7"),
    ],
)
def test_an_error_in_one_metric_is_raised_in_every_process(
    which: str, kind: str, message: str
) -> None:
    """As it was in the process that computes the metric, and with its message in the others."""
    answers = run_distributed(fail_in_one_metric, 2, which)
    assert [calls for calls, _, _ in answers] == [1, 0]  # the fifth of the stages
    own, other = ((kind_, message_) for _, kind_, message_ in answers)
    assert own == (type(ERRORS[which]).__name__, str(ERRORS[which]))
    assert other == (kind, message)


def sharded_model() -> ProtoCLIP:
    """A tiny model, of which each of several processes has a part."""
    torch.manual_seed(0)
    whole = ProtoCLIP(TinyTowers(), nn.Linear(4, 4))
    if collectives.world_size() == 1:
        return whole
    model = copy.deepcopy(whole)
    shard(model, torch.device("cpu"))
    spread(model, whole if collectives.rank() == 0 else None)
    return model


def sharded_features(numbers: list[int]) -> list[Tensor]:
    """Features of the first so many colours by an FSDP2 model, of which each process has a part."""
    model = sharded_model()
    return [
        suite.encode(
            model.encode_image,
            lambda rows: torch.tensor(rows).float().view(-1, 1, 1, 1).expand(-1, 3, 1, 2),
            range(number),
            stage="colours",
            batch_size=2,
            device="cpu",
            progress=lambda stage, done, total: None,
        )
        for number in numbers
    ]


class TinyTowers(nn.Module):
    """The least that can be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.7))

    def encode_image(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual(images.flatten(1))
        return features


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_process_enters_every_pass_through_a_sharded_model(world_size: int) -> None:
    """With no rows, fewer rows than processes, and a last round in which some have no batch."""
    numbers = [0, 1, 3, 9, 10]
    expected = run_distributed(sharded_features, 1, numbers)[0]
    assert [len(rows) for rows in expected] == numbers
    for found in run_distributed(sharded_features, world_size, numbers):
        for rows, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(rows, wanted)


def unreadable() -> str:
    """What this process raises where a picture that another one has cannot be read."""
    model = sharded_model()

    def read(rows: Any) -> Tensor:
        if 3 in rows:
            raise OSError("picture 3: gone")
        return torch.zeros(len(rows), 3, 1, 2)

    with pytest.raises((OSError, ValueError)) as found:
        suite.encode(
            model.encode_image,
            read,
            range(8),
            stage="colours",
            batch_size=2,
            device="cpu",
            progress=lambda stage, done, total: None,
        )
    return str(found.value)


def test_a_picture_that_one_process_cannot_read_ends_all() -> None:
    """Before the sharded pass, in which the others would wait for it."""
    assert run_distributed(unreadable, 2) == ["picture 3: gone"] * 2


def with_few_emoji(call: Callable[[], Any]) -> Any:
    """The evaluation data cut to every twentieth sample meanwhile."""
    parts = {}
    for split in datasets.SPLITS:
        table = emoji_table(split)
        rows = list(range(0, table.num_rows, 20))
        parts[split] = ImageTextPairs(table.take(rows), name=f"emoji/{split}")
    few = EvaluationData(name="emoji", **parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "emoji", lambda: few)
        return call()


def trained(strategy: Literal["ddp", "fsdp"], out: str) -> dict[str, float]:
    config = tiny_config(out=out)
    config = replace(
        config,
        run=replace(config.run, evaluate_every=1),
        parallel=ParallelConfig(strategy=strategy),
        episodes=replace(config.episodes, count=2, size=16, locked_image=0),
        prototypes=replace(config.prototypes, number=4),
    )
    found: dict[str, float] = with_few_emoji(lambda: train(config)["metrics"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_a_run_evaluates_as_one_process_does(
    strategy: Literal["ddp", "fsdp"], world_size: int, tmp_path: Path
) -> None:
    """During training, which goes on after it, and at the end, as its checkpoint scores alone."""
    out = str(tmp_path / "run")
    answers = run_distributed(trained, world_size, strategy, out)
    model, image_transform, tokenizer = loading.load(out)
    alone = with_few_emoji(
        lambda: session.evaluate(model, image_transform, tokenizer, split="test", show=False)
    )
    assert len(alone) == 18
    assert [found == answers[0] for found in answers] == [True] * world_size
    # Filters in another order in memory change the last digits.
    assert answers[0] == pytest.approx(alone, abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sum(any(name.startswith("eval/") for name in line) for line in lines) == 2
