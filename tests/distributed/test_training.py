"""W processes train what one process trains: gradients of every loss, and weights of short runs."""

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protoclip.config import Config, ImageTowerConfig, ParallelConfig
from protoclip.distributed import collectives, parallel
from protoclip.distributed.parallel import distribute, no_sync, reach_everything
from protoclip.losses.grad_cache import forward_in_chunks
from protoclip.losses.objective import LossWeights, objective
from protoclip.losses.prototypical import prepare_targets
from protoclip.models import batch_norm, loading
from protoclip.models.loading import find_checkpoint, read_tensors
from protoclip.prototypes.targets import PrototypeTarget
from protoclip.testing import run_distributed, tiny_config, tiny_model
from protoclip.training.run import train
from protoclip.training.session import Session
from protoclip.training.stages import PROTOTYPICAL, enter_stage

PAIRS, PROTOTYPES, WIDTH = 16, 6, 8


def whole_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "image": torch.randn(PAIRS, 3, 32, 32, generator=generator, dtype=torch.float64),
        "text": torch.randint(1, 400, (PAIRS, 8), generator=generator),
        "image_assignments": torch.randint(0, PROTOTYPES, (PAIRS,), generator=generator),
        "text_assignments": torch.randint(0, PROTOTYPES, (PAIRS,), generator=generator),
        # A teacher that knows half of the samples, of which one process may have none.
        "teacher_assignments": torch.cat(
            [
                torch.full((PAIRS // 2,), -1),
                torch.randint(0, PROTOTYPES, (PAIRS // 2,), generator=generator),
            ]
        ),
    }


def gradients(terms: tuple[str, ...], micro_batch: int | None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a batch whose rows are shared among the processes of the group."""
    model = loading.model(tiny_model(), seed=0).double()
    batch_norm.synchronise(model)
    enter_stage(model, PROTOTYPICAL)
    share = PAIRS // collectives.world_size()
    own = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    batch = {name: rows[own] for name, rows in whole_batch().items()}
    generator = torch.Generator().manual_seed(5)
    targets = {
        name: PrototypeTarget(
            student_centroids=torch.randn(PROTOTYPES, WIDTH, generator=generator).double(),
            teacher_centroids=torch.randn(PROTOTYPES, WIDTH, generator=generator).double(),
            assignments=torch.zeros(PAIRS, dtype=torch.long),
        )
        for name in terms
        if name != "info_nce"
    }
    # A cluster that is empty for the student: rows assigned to it have no part in the mean.
    for target in targets.values():
        target.student_centroids[2] = 0
    prepared = prepare_targets(
        targets, target_temperatures={"image": 0.1, "text": 0.1, "teacher": 0.0}
    )
    module = distribute(model)
    if micro_batch is None:
        embeddings, finish = module(batch["image"], batch["text"]), lambda: None
    else:
        chunks = [
            partial(module, image, text)
            for image, text in zip(
                batch["image"].split(micro_batch), batch["text"].split(micro_batch), strict=True
            )
        ]
        embeddings, finish = forward_in_chunks(
            chunks, buffers=model.buffers(), no_sync=no_sync(module)
        )
    losses, _ = objective(
        embeddings,
        prepared or None,
        {space: batch[f"{space}_assignments"] for space in ("image", "text", "teacher")},
        weights=LossWeights(info_nce=float("info_nce" in terms), teachers={"teacher": 2.0}),
    )
    total = torch.stack(list(losses.values())).sum()
    (total + reach_everything(embeddings)).backward()
    finish()
    mean = collectives.all_reduce(total.detach()) / collectives.world_size()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(mean), found


TERMS = {
    "InfoNCE": ("info_nce",),
    "prototypical": ("image_from_text", "text_from_image"),
    "teacher": ("image_from_teacher", "text_from_teacher"),
    "all": (
        "info_nce",
        "image_from_text",
        "text_from_image",
        "image_from_teacher",
        "text_from_teacher",
    ),
}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", list(TERMS))
def test_gradients_are_those_of_one_process(name: str, world_size: int) -> None:
    """In float64: the loss to 1e-10 and every gradient to 1e-9 of the largest, on every process."""
    loss, expected = run_distributed(gradients, 1, TERMS[name], None)[0]
    for rank_loss, found in run_distributed(gradients, world_size, TERMS[name], None):
        assert rank_loss == pytest.approx(loss, rel=1e-10)
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            assert_near(found[parameter], value, parameter, 1e-9)


@pytest.mark.parametrize("world_size", [1, 2])
def test_accumulated_gradients_are_the_same_in_any_number_of_processes(world_size: int) -> None:
    """Micro-batches of four pairs in each process: gradients of whole-batch InfoNCE (GradCache).

    BatchNorm sees the same pairs together only where micro-batches are the same, so it is made to
    use its running statistics here.
    """
    _, expected = run_distributed(frozen_statistics, 1, None)[0]
    for _, found in run_distributed(frozen_statistics, world_size, 4):
        for parameter, value in expected.items():
            assert_near(found[parameter], value, parameter, 1e-9)


def frozen_statistics(micro_batch: int | None) -> tuple[float, dict[str, Tensor]]:
    forward = batch_norm.SyncBatchNorm.forward
    plain = torch.nn.functional.batch_norm

    def evaluated(self: Any, rows: Tensor) -> Tensor:
        return plain(rows, self.running_mean, self.running_var, self.weight, self.bias)

    batch_norm.SyncBatchNorm.forward = evaluated  # type: ignore[method-assign]
    try:
        return gradients(TERMS["all"], micro_batch)
    finally:
        batch_norm.SyncBatchNorm.forward = forward  # type: ignore[method-assign]


def assert_near(found: Tensor, expected: Tensor, name: str, share: float) -> None:
    """Equal but for a share of the largest absolute value."""
    error = float((found - expected).abs().max())
    # Where the true gradient is zero, as of a bias before BatchNorm, only rounding is left.
    assert error <= share * float(expected.abs().max()) + 1e-12, f"{name}: off by {error:.2e}"


def trained(config: Config, out: str) -> dict[str, Tensor]:
    """Weights at the end of a run by the processes of the group, all of which return the same."""
    train(replace(config, run=replace(config.run, out=out, evaluate=False, name="many")))
    return read_tensors(find_checkpoint(out) / "model.safetensors")


WAYS = {
    "CLIP": {"loss": {"prototypical": 0.0}},
    "extracted, back-translated": {"prototypes": {"source": "extract"}},
    "extracted, not back-translated": {
        "prototypes": {"source": "extract", "back_translation": False}
    },
    "queue": {"prototypes": {"source": "queue"}},
    "queue across batches": {"prototypes": {"source": "queue"}},
    "FSDP2": {"parallel": {"strategy": "fsdp"}},
    "teacher": {"teacher": {"features": "emoji"}, "prototypes": {"source": "queue"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_short_run_ends_with_the_weights_of_one_process(
    way: str, world_size: int, tmp_path: Path
) -> None:
    """Warm-up, prototypical and locked-image steps: the way that all weights went, to 1e-4.

    Rounding may put a value on the other side of a ReLU, which moves a bias by more than its last
    digits; and AdamW divides by the gradient's size, so a large epsilon keeps rounding small.
    """
    whole = changed(tiny_config(out=str(tmp_path / "one")), WAYS[way])
    start = loading.model(whole.model, seed=whole.run.seed).state_dict()
    expected = run_distributed(trained, 1, whole, str(tmp_path / "one"))[0]
    found = run_distributed(trained, world_size, whole, str(tmp_path / "many"))
    for weights in found:
        assert difference(weights, expected) < 1e-4 * difference(expected, start)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Distance between two sets of parameters, taken as one vector."""
    return float(
        torch.stack(
            [
                (one[name] - other[name]).double().norm()
                for name in one.keys() & other.keys()
                if "running_" not in name and "num_batches" not in name
            ]
        ).norm()
    )


def changed(config: Config, sections: dict[str, dict[str, Any]]) -> Config:
    config = replace(
        config,
        parallel=ParallelConfig(sync_batch_norm=True),
        optim=replace(config.optim, eps=1e-2, warm_up_steps=0),
        episodes=replace(config.episodes, count=3, size=32),
    )
    for section, values in sections.items():
        part = getattr(config, section)
        values = {
            name: replace(getattr(part, name), **value) if isinstance(value, dict) else value
            for name, value in values.items()
        }
        config = replace(config, **{section: replace(part, **values)})
    return config


def interrupted(config: Config, out: str, step: int) -> None:
    """The run up to a step, at which one of its processes is told to stop."""
    on_step = Session.on_step

    def and_signal(session: Session, state: Any, stage: Any) -> None:
        on_step(session, state, stage)
        if state.step == step and collectives.rank() == collectives.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Session.on_step = and_signal  # type: ignore[method-assign]
    try:
        results = train(replace(config, run=replace(config.run, out=out)))
    finally:
        Session.on_step = on_step  # type: ignore[method-assign]
    assert results["stopped"] == "SIGTERM"
    assert results["steps"] == step


def resumed(config: Config, out: str) -> dict[str, Tensor]:
    train(replace(config, run=replace(config.run, out=out)), resume="auto")
    return read_tensors(find_checkpoint(out) / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["queue across batches", "FSDP2"])
def test_a_stopped_run_of_two_processes_goes_on_bit_for_bit(way: str, tmp_path: Path) -> None:
    """One process is told, both stop after the same step, within an episode with prototypes."""
    config = changed(tiny_config(out=str(tmp_path)), WAYS[way])
    config = replace(config, run=replace(config.run, evaluate=False, name="many"))
    expected = run_distributed(trained, 2, config, str(tmp_path / "whole"))[0]
    run_distributed(interrupted, 2, config, str(tmp_path / "parts"), 3)
    for weights in run_distributed(resumed, 2, config, str(tmp_path / "parts")):
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["queue across batches", "FSDP2"])
@pytest.mark.parametrize("after", [1, 4])
def test_a_run_of_two_processes_goes_on_with_another_number(
    way: str, after: int, tmp_path: Path
) -> None:
    """Batches, prototypes, queue and schedule go on exactly; weights end as in one process to
    1e-4 of the way they went, which is what rounding makes of it."""
    config = changed(tiny_config(out=str(tmp_path)), WAYS[way])
    config = replace(config, run=replace(config.run, evaluate=False, name="many"))
    start = loading.model(config.model, seed=config.run.seed).state_dict()
    expected = run_distributed(trained, 1, config, str(tmp_path / "whole"))[0]
    run_distributed(interrupted, 2, config, str(tmp_path / "parts"), 3)
    for weights in run_distributed(resumed, after, config, str(tmp_path / "parts")):
        assert difference(weights, expected) < 1e-4 * difference(expected, start)


def built(
    config: Config,
) -> tuple[int, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Whole models made, and of the sharded one: weights, buffers, and this process's shards."""
    made, model = [], loading.model

    def and_count(*given: Any, **more: Any) -> Any:
        made.append(given)
        return model(*given, **more)

    loading.model = and_count
    try:
        torch.manual_seed(collectives.rank())  # the state of a process has no say
        sharded, _ = loading.training_model(config, torch.device("cpu"))
    finally:
        loading.model = model
    shards = {name: p.detach().to_local() for name, p in sharded.named_parameters() if p.ndim}
    return len(made), parallel.weights(sharded), dict(sharded.named_buffers()), shards


def test_fsdp_builds_the_model_of_one_process_in_the_first_process_alone() -> None:
    """Bit for bit, with buffers that no state dict has; each process has half of every layer."""
    image = ImageTowerConfig(name="vit_tiny_patch16_224", size=32)
    config = replace(
        tiny_config(out="unused"),
        model=replace(tiny_model(), image=image),
        parallel=ParallelConfig(strategy="fsdp"),
    )
    whole = loading.model(config.model, seed=config.run.seed)
    expected, buffers = whole.state_dict(), dict(whole.named_buffers())
    assert "towers.attn_mask" in buffers.keys() - expected.keys()
    (made, first, *one), (made_by_other, second, *other) = run_distributed(built, 2, config)
    assert (made, made_by_other) == (1, 0)
    assert second == {}
    assert first.keys() == expected.keys()
    assert all(torch.equal(first[name], value) for name, value in expected.items())
    for found, shards in (one, other):
        assert found.keys() == buffers.keys()
        assert all(torch.equal(found[name], value) for name, value in buffers.items())
        held = sum(shard.numel() for shard in shards.values())
        assert held < 0.55 * sum(p.numel() for p in whole.parameters())


def statistics_kept(config: Config, out: str) -> dict[str, Tensor]:
    """BatchNorm statistics that a process ends an episode with."""
    kept: dict[str, Tensor] = {}
    evaluate = Session.evaluate

    def and_keep(session: Session, state: Any) -> Mapping[str, float]:
        kept.update({name: value.clone() for name, value in session.model.named_buffers()})
        return evaluate(session, state)

    Session.evaluate = and_keep  # type: ignore[method-assign]
    try:
        train(replace(config, run=replace(config.run, out=out)))
    finally:
        Session.evaluate = evaluate  # type: ignore[method-assign]
    return kept


def test_processes_that_normalise_apart_evaluate_one_model(tmp_path: Path) -> None:
    """Without SyncBatchNorm in the towers, the first process's statistics are everyone's."""
    config = changed(tiny_config(out=str(tmp_path)), {"parallel": {"sync_batch_norm": False}})
    config = replace(
        config,
        run=replace(config.run, evaluate=False, name="many"),
        episodes=replace(config.episodes, count=2, size=16, locked_image=0),
        prototypes=replace(config.prototypes, number=4),
    )
    one, other = run_distributed(statistics_kept, 2, config, str(tmp_path / "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(other[name], value) for name, value in one.items())
