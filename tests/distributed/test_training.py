"""Several ranks train what one process trains: gradients of every loss, weights of short runs."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from interrupting import (
    quick_config,
    relative_difference,
    stop_after,
    train_until,
    with_changes,
    with_out,
)
from protoclip.config import Config, ImageTowerConfig, ModelConfig, ParallelConfig
from protoclip.data.loader import Batch
from protoclip.data.pairs import ImageTextPairs, Sample
from protoclip.data.sampler import Episode
from protoclip.data.shards import ShardStream
from protoclip.data.tools import pack
from protoclip.distributed import collectives, parallel
from protoclip.distributed.parallel import distribute, reach_everything
from protoclip.encode.store import hash_ids
from protoclip.losses.distil import StartFeatures
from protoclip.losses.objective import LossWeights, objective
from protoclip.losses.prototypical import prepare
from protoclip.models import layers, loading
from protoclip.models.checkpoint import RESUME, find_checkpoint, read_tensors
from protoclip.models.start import resolve_start
from protoclip.prototypes.features import EpisodeFeatures, ExtractedFeatures
from protoclip.training.optim import PROTOTYPICAL, enter_stage
from protoclip.training.run import train
from protoclip.training.trainer import Trainer
from testing import build_model, run_distributed, tiny_config, tiny_model, tiny_pairs

PAIRS, PROTOTYPES, WIDTH = 16, 6, 8


def gradients(
    terms: tuple[str, ...],
    micro_batch: int | None = None,
    *,
    frozen: bool = False,
    sharded: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Loss, gradients and BatchNorm statistics of a batch whose rows the ranks share.

    `frozen` is the BatchNorm of the towers, `sharded` the model, by FSDP2.
    """
    model = build_model(tiny_model(), seed=0).double()
    if "sigmoid" in terms:
        model.add_logit_bias()
    distils = [term for term in terms if term.startswith("distil")]
    if distils:
        model.distils = {"image": "image", "text": "text"}
    if collectives.world_size() > 1:
        layers.synchronise(model, torch.device("cpu"))
    if sharded:
        whole, model = model, deepcopy(model).to("meta")
        parallel.shard(model, torch.device("cpu"))
        parallel.load_whole(model, whole)
    limits = replace(tiny_model(), frozen_batch_norm=frozen)
    stage = replace(PROTOTYPICAL, model=limits)
    enter_stage(model, stage)
    generator = torch.Generator().manual_seed(3)
    assigned = torch.randint(0, PROTOTYPES, (3, PAIRS), generator=generator)
    assigned[2, : PAIRS // 2] = -1  # samples that the teacher does not know
    images = torch.randn(PAIRS, 3, 32, 32, generator=generator, dtype=torch.float64)
    captions = torch.randint(1, 400, (PAIRS, 8), generator=generator)
    share = PAIRS // collectives.world_size()
    own = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    targets = {}
    for term in terms:
        if "_from_" in term:
            student, _, teacher = term.partition("_from_")
            centroids = torch.randn(2, PROTOTYPES, WIDTH, generator=generator).double()
            centroids[0, 2] = 0  # an empty cluster, whose rows the mean leaves out
            targets[student, teacher] = prepare(
                *centroids,
                0.0 if teacher == "teacher" else 0.1,
                torch.arange(PROTOTYPES),
                mask_empty=True,
            )
    trainer = Trainer.__new__(Trainer)
    trainer.model, trainer._module, trainer._stage = model, distribute(model), stage
    trainer.autocast, trainer.micro_batch_size = nullcontext, micro_batch
    batch = Batch(
        position=torch.arange(share), sample_id=[""] * share, image=images[own], text=captions[own]
    )
    embeddings, finish = trainer._forward(batch)
    rows = torch.randn(2, PAIRS, 16, generator=generator, dtype=torch.float64)[:, own]
    image, text = torch.nn.functional.normalize(rows, dim=-1)
    taught = torch.randn(2, PAIRS, WIDTH, generator=generator, dtype=torch.float64)
    taught[0, : PAIRS // 2 - 2] = taught[1, 3] = torch.nan  # samples that these do not know
    keys = torch.stack([torch.arange(PAIRS) // 3, torch.arange(PAIRS) % 7], dim=1)[own]
    losses, _ = objective(
        embeddings,
        targets or None,
        groups=keys,
        samples=(torch.arange(PAIRS) % 10)[own],  # some are drawn twice, by two ranks
        teachers=dict(zip(("image", "text"), taught[:, own], strict=True)),
        start=StartFeatures(image=image, text=text, logit_scale=torch.tensor(5.0).double()),
        assignments=dict(zip(("image", "text", "teacher"), assigned[:, own], strict=True)),
        weights=LossWeights(
            positives=next((term for term in terms if term in ("masked", "shared")), "pair"),
            info_nce=float("info_nce" in terms),
            sigmoid=float("sigmoid" in terms),
            teachers={"teacher": 2.0},
            keep=float("relations" in terms),
            distil={"image": 2.0 * bool(distils), "text": 3.0 * bool(distils)},
            joint=("image", "text") if distils else (),
        ),
    )
    total = torch.stack(list(losses.values())).sum()
    (total + reach_everything(embeddings)).backward()
    finish()
    if sharded:
        parallel.clip_gradients(model, math.inf)  # which averages those of scalars
    mean = collectives.all_reduce(total.detach()) / collectives.world_size()
    held = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in held.items()}
    return float(mean), found | {n: b for n, b in model.named_buffers() if "running_" in n}


TERMS = {
    "pairs": ("info_nce", "sigmoid"),
    "masked": ("info_nce", "sigmoid", "masked"),
    "keep": ("relations",),
    "distil relations": ("distil_relations",),
    "all": (
        *("info_nce", "sigmoid", "shared", "relations", "distil_relations"),
        *("image_from_text", "text_from_image", "image_from_teacher", "text_from_teacher"),
    ),
}


WAYS_TO_SHARE = [*((name, 2, False) for name in TERMS), ("all", 4, False)]
WAYS_TO_SHARE += [("masked", 2, True), ("all", 2, True)]


@pytest.mark.parametrize(("name", "world_size", "sharded"), WAYS_TO_SHARE)
def test_gradients_equal_those_of_one_process(name, world_size, sharded):
    """In float64 on every rank: the loss to 1e-10, every gradient to 1e-9 of the largest."""
    loss, expected = run_distributed(gradients, 1, TERMS[name])[0]
    shared = run_distributed(partial(gradients, sharded=sharded), world_size, TERMS[name])
    for rank_loss, found in shared:
        assert rank_loss == pytest.approx(loss, rel=1e-10)
        assert_near(found, expected)


@pytest.mark.parametrize("name", ["masked", "all"])
def test_accumulated_gradients_equal_those_of_one_process(name):
    """Micro-batches of at most three pairs give the whole batch's gradients of every loss, and
    statistics of the heads' BatchNorm.
    """
    _, expected = gradients(TERMS[name], frozen=True)
    for _, found in run_distributed(partial(gradients, frozen=True), 2, TERMS[name], 3):
        assert_near(found, expected)


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal up to 1e-9 of the largest absolute value of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).abs().max())
        # If the true gradient is zero, as for a bias before BatchNorm, only rounding is left.
        assert error <= 1e-9 * float(value.abs().max()) + 1e-11, f"{name}: off by {error:.2e}"


WAYS: dict[str, dict[str, Any]] = {
    "queue": {"prototypes": {"source": "queue"}},
    # It synchronises BatchNorm without being asked.
    "FSDP2": {
        "parallel": {"strategy": "fsdp", "sync_batch_norm": False},
        "teacher": {"features": "emoji", "distil": 1.0},
        "loss": {"teacher": 0.0},
    },
}


def short(**changes: dict[str, Any]) -> Config:
    """Warm-up, prototypical and locked-image steps.

    Rounding may move a value across a ReLU, which moves a bias by more than its last digits. AdamW
    divides by the gradient's size, so a large epsilon keeps rounding small.
    """
    sections = {
        "run": {"evaluate": False, "name": "many"},
        "parallel": {"sync_batch_norm": True},
        "optim": {"eps": 1e-2, "warm_up_steps": 0},
        "episodes": {"count": 3, "size": 32},
    }
    return with_changes(with_changes(tiny_config(out="unused"), sections), changes)


def trained(config: Config, out: str) -> dict[str, Tensor]:
    """Weights at the end of a run by all ranks, new or gone on with; each returns the same."""
    train(with_out(config, out), resume="auto")
    return read_tensors(find_checkpoint(out) / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[Any]]:
    """The weights with which a way ends on so many ranks, which tests share."""

    @cache
    def run(way: str, ranks: int) -> list[Any]:
        out = str(tmp_path_factory.mktemp("run"))
        return run_distributed(trained, ranks, short(**WAYS[way]), out)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_short_run_ends_with_the_weights_of_one_process(way, finished):
    """Up to 1e-4 of the way that all weights went."""
    expected = finished(way, 1)[0]
    for weights in finished(way, 2):
        assert relative_difference(weights, expected, short(**WAYS[way])) < 1e-4


@pytest.mark.slow
def test_ranks_fine_tune_what_one_process_does(tmp_path):
    """By LoRA, with the start as the teacher: up to a hundredth of the way, and in all ranks the
    same weights."""
    start = short(episodes={"count": 1, "size": 32, "locked_image": 0})
    train(with_out(start, str(tmp_path / "start")))
    config = replace(short(), model=ModelConfig(start=str(tmp_path / "start")))
    changes = {
        "model": {"lora": 2, "frozen_batch_norm": True},
        "teacher": {"features": "start", "number": 8, "whiten": 8},
        "optim": {"layer_decay": 0.7, "eps": 1e-2, "warm_up_steps": 0},
    }
    config = with_changes(config, changes)
    one = run_distributed(trained, 1, config, str(tmp_path / "one"))[0]
    first, second = run_distributed(trained, 2, config, str(tmp_path / "many"))
    assert relative_difference(first, one, config) < 0.01
    assert all(torch.equal(first[name], value) for name, value in second.items())


def interrupted(config: Config, out: str, step: int) -> None:
    """The run up to a step, at which a signal tells the last rank to stop."""
    results = train_until(step, with_out(config, out))
    assert (results["stopped"], results["steps"]) == ("SIGTERM", step)


@pytest.mark.slow
def test_a_stopped_run_of_two_ranks_goes_on(finished, tmp_path):
    """One rank gets the signal; both stop after the same step, within a prototypical episode. The
    run ends bit for bit as if it had not stopped, with another number of ranks or sharded but for
    rounding. One that was sharded before goes on in test_sharded_checkpoints.py."""
    config = short(**WAYS["queue"])
    run_distributed(interrupted, 2, config, str(tmp_path / "stopped"), 3)
    expected = finished("queue", 2)[0]
    sharded = {"parallel": {"strategy": "fsdp"}}
    for number, (ranks, changes) in enumerate([(1, {}), (2, {}), (2, sharded)]):
        folder = shutil.copytree(tmp_path / "stopped", tmp_path / f"{number}")
        for weights in run_distributed(trained, ranks, with_changes(config, changes), str(folder)):
            if ranks == 2 and not changes:
                assert all(torch.equal(weights[name], value) for name, value in expected.items())
            else:
                assert relative_difference(weights, expected, config) < 1e-4
        facts = json.loads((folder / "results.json").read_text())["environment"]
        assert (facts["hosts"], facts["ranks"]) == (1, ranks)
        began = [where.split(" on ")[0] for where in facts["machines"]]
        assert began == ["1 host, 2 ranks", "1 host, 1 rank"][: 3 - ranks]


def seen(
    config: Config, stop: int | None = None
) -> tuple[list[list[str]], dict[tuple[int, int], int]]:
    """The samples of this rank at each step of a run, new or gone on with, that a signal stops.

    And the hash of the sample that was clustered for each episode and position.
    """
    train_step, trained = Trainer.train_step, []
    features, clustered = ExtractedFeatures.features, {}

    def and_note(trainer: Trainer, batch: Batch, **more: Any) -> dict[str, float]:
        trained.append(batch.sample_id)
        return train_step(trainer, batch, **more)

    def and_note_keys(source: ExtractedFeatures, episode: Episode) -> EpisodeFeatures:
        made = features(source, episode)
        positions = range(len(made.keys)) if made.positions is None else made.positions.tolist()
        for position, key in zip(positions, made.keys.tolist(), strict=True):
            clustered[episode.index, position] = key
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", and_note)
        patch.setattr(ExtractedFeatures, "features", and_note_keys)
        if stop is not None:
            stop_after(stop, patch)
        train(config, resume="auto")
    return trained, clustered


def test_a_stream_goes_on_with_other_ranks(serve, tmp_path):
    """Begun on two, stopped within an episode that has prototypes, by one and by two again: the
    batches are those of the two lanes, of which each pass has every sample once. So are the samples
    that replace damaged ones, and prototypes are those of the samples that are trained on.
    Meanwhile the shards come from a web server."""
    pairs, damaged = tiny_pairs(40), {1, 6, 13, 17, 24, 35}
    images = pairs["image"].to_pylist()
    images = [image[: len(image) // 2] if n in damaged else image for n, image in enumerate(images)]
    pairs = pairs.set_column(0, "image", pa.array(images, pa.binary()))
    pack(ImageTextPairs(pairs, name="tiny"), tmp_path / "shards", samples_per_shard=7)
    config = quick_config(str(tmp_path / "shards"), tmp_path / "run")
    data = {"read": "streaming", "shuffle_buffer": 5, "workers": 0, "max_bad_share": 0.5}
    changes = {"data": data, "episodes": {"count": 5}, "prototypes": {"source": "extract"}}
    config = with_changes(config, changes)
    url = serve("ranges", tmp_path / "shards") + "/{00000..00005}.tar"
    elsewhere = with_changes(config, {"data": {"train": url, "read": "auto"}})
    steps: list[list[str]] = []
    clustered: dict[tuple[int, int], int] = {}
    for ranks, stop, given in ((2, 3, config), (1, 4, elsewhere), (2, None, config)):
        parts = run_distributed(seen, ranks, given, stop)
        steps += [
            [*itertools.chain(*step)] for step in zip(*(ids for ids, _ in parts), strict=True)
        ]
        for _, of_rank in parts:
            clustered |= of_rank
    stream = ShardStream(config.data.train, seed=config.run.seed, shuffle=5, lanes=2)
    lanes = [[*itertools.islice(stream.samples(0, lane), 48)] for lane in range(2)]
    first = [item.sample_id for item in [*lanes[0][:21], *lanes[1][:19]]]
    assert len({*first}) == 40  # three shards of each, and the one of five
    bad = {images[number] for number in damaged}

    def standing(items: list[Sample]) -> list[str]:
        """What stands for the first four."""
        spare = (item for item in items[4:] if item.image not in bad)
        return [(next(spare) if item.image in bad else item).sample_id for item in items[:4]]

    assert steps == [
        standing(lanes[0][begin:]) + standing(lanes[1][begin:]) for begin in range(0, 40, 4)
    ]
    amid = lanes[0][12:16] + lanes[1][12:16]  # the step after that at which it first stopped
    assert any(item.image in bad for item in amid)
    assert {index for index, _ in clustered} == {1, 2, 3}
    trained = hash_ids(itertools.chain(*steps)).view(np.int64).reshape(-1, 16)
    for (index, position), key in clustered.items():
        assert key == trained[index, position]


def built(config: Config) -> tuple[int, dict[str, Tensor], dict[str, Tensor], int]:
    """Whole models made; weights, buffers and parameters on this rank of the sharded model."""
    with pytest.MonkeyPatch.context() as patch:
        model = Mock(wraps=loading.build_model)
        patch.setattr(loading, "build_model", model)
        torch.manual_seed(collectives.rank())  # the state of a rank must not matter
        sharded, _ = loading.training_model(
            config, torch.device("cpu"), resolve_start(config.model)
        )
    held = sum(p.detach().to_local().numel() for p in sharded.parameters() if p.ndim)
    return model.call_count, parallel.gather_weights(sharded), dict(sharded.named_buffers()), held


def test_fsdp_builds_the_whole_model_on_rank_0_only():
    """It is that of one process bit for bit, with buffers that no state dict has."""
    image = ImageTowerConfig(name="vit_tiny_patch16_224", size=32)
    config = replace(
        tiny_config(out="unused"),
        model=replace(tiny_model(), image=image),
        parallel=ParallelConfig(strategy="fsdp"),
    )
    whole = build_model(config.model, seed=config.run.seed)
    expected, buffers = whole.state_dict(), dict(whole.named_buffers())
    assert "towers.attn_mask" in buffers.keys() - expected.keys()
    (made, first, *one), (made_by_other, second, *other) = run_distributed(built, 2, config)
    assert (made, made_by_other) == (1, 0)
    assert second == {}
    assert first.keys() == expected.keys()
    assert all(torch.equal(first[name], value) for name, value in expected.items())
    for found, held in (one, other):
        assert found.keys() == buffers.keys()
        assert all(torch.equal(found[name], value) for name, value in buffers.items())
        assert held < 0.55 * sum(p.numel() for p in whole.parameters())


def statistics_kept(config: Config, out: str) -> dict[str, Tensor]:
    """BatchNorm statistics that a rank ends the run with."""
    end_episode, kept = Trainer.end_episode, {}

    def and_keep(trainer: Trainer, *given: Any) -> Any:
        result = end_episode(trainer, *given)
        kept.update({name: value.clone() for name, value in trainer.model.named_buffers()})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "end_episode", and_keep)
        train(with_out(config, out))
    return kept


def test_ranks_evaluate_one_model_without_sync_batch_norm(tmp_path):
    """All ranks end an episode with the BatchNorm statistics of rank 0."""
    config = short(parallel={"sync_batch_norm": False}, episodes={"size": 32, "locked_image": 0})
    one, other = run_distributed(statistics_kept, 2, config, str(tmp_path / "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(other[name], value) for name, value in one.items())


def pulls_of(config: Config, out: str) -> dict[str, Tensor]:
    """The running means of the pulls at the end of a run by all ranks."""
    train(with_out(config, out))
    state = read_tensors(find_checkpoint(out) / RESUME)
    return {name: value for name, value in state.items() if name.startswith("balance/")}


def test_pulls_are_those_of_one_process(tmp_path):
    """So that the strengths go on where a run goes on with other ranks."""
    config = short(loss={"strengths": "automatic"})
    expected = pulls_of(config, str(tmp_path / "one"))
    assert set(expected) == {"balance/image", "balance/text"}
    for pulls in run_distributed(pulls_of, 2, config, str(tmp_path / "two")):
        for name, value in expected.items():
            torch.testing.assert_close(pulls[name], value, rtol=1e-2, atol=0.0)
