"""Losses against independent restatements of the paper's formulas, in float64."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from protoclip import (
    Embeddings,
    KMeans,
    Target,
    info_nce,
    objective,
    prototypical_loss,
    sigmoid_loss,
)
from protoclip.distributed import collectives
from protoclip.losses import info_nce as instance
from protoclip.losses import prototypical, tiles
from protoclip.losses.distil import StartFeatures, keep_relations
from protoclip.losses.objective import LossWeights
from protoclip.losses.prototypical import make_targets
from protoclip.losses.tiles import groups_of, mean_positives
from testing import run_distributed

B, D, P, Q, K = 7, 5, 6, 4, 9


def unit(*shape: int, seed: int) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows / rows.norm(dim=-1, keepdim=True)).requires_grad_()


def scale(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def slow_info_nce(
    image: Tensor, text: Tensor, s: Tensor, own: list[set[int]] | None = None, way: str = "pair"
) -> Tensor:
    """-log of a pair's share of its row and of its column; `own` has the group of each pair."""
    terms, total = (s * image @ text.T).exp(), torch.zeros((), dtype=torch.float64)
    for i in range(len(image)):
        group = {i} if way == "pair" else own[i]
        right = group if way == "shared" else {i}
        rivals = [j for j in range(len(image)) if way != "masked" or j == i or j not in group]
        for row in (terms[i], terms[:, i]):
            shares = torch.stack([row[j] for j in sorted(right)]) / row[rivals].sum()
            total = total - shares.log().mean() / (2 * len(image))
    return total


def slow_sigmoid(
    image: Tensor,
    text: Tensor,
    s: Tensor,
    bias: Tensor,
    own: list[set[int]] | None = None,
    way: str = "pair",
) -> Tensor:
    """-log of the probability that each logit gives to the truth, one by one."""
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(image):
        for j, y in enumerate(text):
            related = way != "pair" and j in own[i]
            if way == "masked" and related and i != j:
                continue
            z = 1 if i == j or related else -1
            total = total - torch.log(1 / (1 + torch.exp(-z * (s * x @ y + bias))))
    return total / len(image)


# Captions and images of twenty pairs, of which the third joins two groups; a hash may be negative.
KEYS = [[-(2**63) + min(row // 3, 4), 5 * (row % 13) + 2**40] for row in range(20)]
KEYS[2][1] = KEYS[10][1]


def slow_prototypical(
    h: Tensor, student: Tensor, teacher: Tensor, assigned: list[int], s: Tensor, temperature, alive
) -> Tensor:
    """Term by term over the classes in `alive`."""
    total = torch.zeros((), dtype=torch.float64)
    for i, a in enumerate(assigned):
        partition = sum(torch.exp(s * h[i] @ student[k]) for k in alive)
        if temperature is None or temperature < 0:
            target = {k: float(k == a) for k in alive}
        else:
            raw = {k: math.exp(float(teacher[a] @ teacher[k]) / temperature) for k in alive}
            target = {k: value / sum(raw.values()) for k, value in raw.items()}
        for k in alive:
            share = torch.exp(s * h[i] @ student[k]) / partition
            total = total - target[k] * torch.log(share)
    return total / len(h)


def assert_equal_with_gradients(ours: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    assert ours.item() == pytest.approx(slow.item(), abs=1e-9, rel=1e-9)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def target_of(
    student: Tensor, teacher: Tensor, temperature: float, *, mask_empty: bool = True
) -> Target:
    """The target whose student prototypes are these: one sample each, none for a zero row."""
    alive = torch.nonzero((student != 0).any(1)).flatten()
    found = KMeans(centroids=teacher.detach(), assignments=alive, inertia=0.0, history=())
    return make_targets(
        {"text": found},
        image_projections=student.detach()[alive],
        text_projections=student.detach()[alive],
        target_temperatures={"text": temperature},
        mask_empty=mask_empty,
    )["image", "text"]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of three rows and two classes, so that a few rows need many; the last are smaller."""
    monkeypatch.setattr(tiles, "ROWS", 3)
    monkeypatch.setattr(tiles, "CPU_SCORES", 6)


WAYS = [("pair", 1), ("masked", 1), ("masked", 2), ("shared", 1), ("shared", 2), ("shared", 3)]


def keys(number: int) -> list[list[int]]:
    """Of each pair one to three keys."""
    return [[*own, row % 9][:number] for row, own in enumerate(KEYS)]


def matching(keys: list[list[int]]) -> list[set[int]]:
    """Who has a key in common with each pair, itself included."""
    return [
        {j for j, other in enumerate(keys) if any(a == b for a, b in zip(own, other, strict=True))}
        for own in keys
    ]


def sums_over_ranks(
    loss_of: Callable[..., Tensor],
    leaves: list[Tensor],
    tile: tuple[int, int],
    number: int,
    way: str,
) -> list[Tensor]:
    """Means over ranks of the loss, and of its gradients: all rows of features, and the others."""
    world_size, rank = collectives.world_size(), collectives.rank()
    own = [leaf.chunk(world_size)[rank] if leaf.dim() else leaf for leaf in leaves]
    own = [value.clone().requires_grad_() for value in own]
    groups = torch.tensor(keys(number)).chunk(world_size)[rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instance, "TILED_ABOVE", 0 if tile[0] < 100 else 10**6)
        patch.setattr(tiles, "ROWS", tile[0])
        patch.setattr(tiles, "CPU_SCORES", tile[0] * tile[1])
        # A factor reaches the gradients, as that of a loss scaler does.
        loss = 3 * loss_of(*own, groups.squeeze(1) if number == 1 else groups, positives=way)
        loss.backward()
    gather = collectives.all_gather
    sums = [gather(x.grad) if x.dim() else collectives.all_reduce(x.grad) for x in own]
    return [value / world_size for value in (collectives.all_reduce(loss.detach()), *sums)]


@pytest.mark.parametrize("tile", [(3, 2), (100, 100)], ids=["tiles of 3 x 2", "one tile"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["InfoNCE", "sigmoid"])
def test_a_loss_of_pairs_is_its_papers_formula(kind, world_size, tile):
    """Plain and tiled, on any number of ranks, with all gradients; and with groups of pairs that
    have a key in common: in SupCon's form, which has their mean, or left out."""
    leaves = [unit(20, D, seed=1), unit(20, D, seed=2), scale(14.0)]
    leaves += [scale(-6.0)] if kind == "sigmoid" else []
    slow, alone = {
        "InfoNCE": (slow_info_nce, info_nce),
        "sigmoid": (slow_sigmoid, sigmoid_loss),
    }[kind]
    several = partial(alone, across_ranks=True)
    fixed = [leaf.detach() for leaf in leaves]
    arguments = [(several, fixed, tile, number, way) for way, number in WAYS]
    if world_size == 1:
        arguments += [(alone, *rest) for _, *rest in arguments]
    ends = run_distributed(all_of, world_size, sums_over_ranks, arguments)
    for case, *found in zip(arguments, *ends, strict=True):
        loss = 3 * slow(*leaves, matching(keys(case[3])), case[4])
        expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        for ours in found:
            for mine, theirs in zip(ours, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_shared_positives_change_nothing_where_one_side_is_equal():
    """Equal captions, or one image with its captions: the mean over a group cancels in the sum. So
    what repeats is to be masked."""
    image, given, s = unit(6, D, seed=1), unit(6, D, seed=2), scale(14.0)
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    for sides in ((image, given[groups]), (given[groups], image)):
        found = {
            way: [
                loss := info_nce(*sides, s, groups, positives=way),
                *torch.autograd.grad(loss, [image, given, s], retain_graph=True),
            ]
            for way in ("pair", "shared", "masked")
        }
        for mine, theirs in zip(found["shared"], found["pair"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        assert abs(found["masked"][0] - found["pair"][0]) > 0.1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_pairs_that_match_in_any_key_count_once(number):
    groups = matching(keys(number))
    expected = sum(map(len, groups)) / len(groups) - 1
    assert mean_positives(torch.tensor(keys(number))).item() == pytest.approx(expected)


@pytest.mark.parametrize("groups", [torch.zeros(3), torch.zeros(4).long(), torch.zeros(2, 2).int()])
def test_groups_of_other_pairs_are_refused(groups):
    with pytest.raises(ValueError, match=r"groups: .* for 3 pairs; give an integer"):
        groups_of(groups, 3, "masked")


def all_of(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """What a function gives for each of several arguments, in one group of processes."""
    return [function(*given) for given in arguments]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mask_empty", [True, False])
@pytest.mark.parametrize("temperature", [None, -1.0, 0.3, 0.05])
@pytest.mark.parametrize("empty", [(), (0, 4)])
def test_the_prototypical_loss_is_the_papers_formula(empty, temperature, mask_empty):
    """Directly and by a prepared target, with gradients. Rows without a prototype, or with an empty
    one that is left out, have no part; with mask_empty=False it is a class with logit 0."""
    h, s = unit(B, P, seed=1), scale(9.0)
    student, teacher = unit(K, P, seed=2).detach(), 0.7 * unit(K, Q, seed=3).detach()
    for k in empty:
        student[k] = 0
    alive = [k for k in range(K) if k not in empty or not mask_empty]
    target = target_of(student, teacher, temperature or 0.0, mask_empty=mask_empty)
    for assignments in ([8, 8, 7, 7, 6, 6, 1], [-1, 8, 4, -1, 0, 2, 3]):
        rows = [i for i, a in enumerate(assignments) if a in alive]
        own = [assignments[i] for i in rows]
        slow = slow_prototypical(h[rows], student, teacher, own, s, temperature, alive)
        index = torch.tensor(assignments)
        ours = prototypical_loss(h, student, teacher, index, s, temperature, mask_empty=mask_empty)
        assert_equal_with_gradients(ours, slow, [h, s])
        slow = slow_prototypical(h[rows], student, teacher, own, s, temperature, alive)
        assert_equal_with_gradients(target.loss(h, index, s), slow, [h, s])


# Past the type checks of tests, as a user calls it.
unchecked_loss = inspect.unwrap(prototypical_loss)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student_centroids", torch.ones(K, P + 1)),
        ("teacher_centroids", torch.ones(K - 1, Q)),
        ("assignments", torch.zeros(B - 1).long()),
        ("assignments", torch.zeros(B)),
    ],
)
def test_what_does_not_fit_the_prototypical_loss_is_named(name, value):
    given = {"student_projections": unit(B, P, seed=1), "student_centroids": unit(K, P, seed=2)}
    given |= {"teacher_centroids": unit(K, Q, seed=3), "assignments": torch.zeros(B).long()}
    with pytest.raises(ValueError, match=rf"{name}.+$"):
        unchecked_loss(**{**given, name: value}, logit_scale=9.0, target_temperature=0.1)


def test_info_nce_names_what_does_not_pair():
    with pytest.raises(ValueError, match=r"text_features: shape \(4, 8\), not \(9, 8\)"):
        inspect.unwrap(info_nce)(unit(9, 8, seed=1), unit(4, 8, seed=2), 9.0)


@pytest.mark.parametrize("halved", range(3))
@pytest.mark.parametrize("temperature", [None, 0.1])
def test_the_prototypical_loss_takes_different_precisions(halved, temperature):
    """And computes in the widest of them."""
    rows = [unit(B, P, seed=1), unit(K, P, seed=2), unit(K, Q, seed=3)]
    rows[halved] = rows[halved].half()
    index = torch.arange(B).to(torch.uint8)
    loss = unchecked_loss(*rows, index, 9.0, temperature)
    same = prototypical_loss(*(values.double() for values in rows), index.long(), 9.0, temperature)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, same)


def test_a_batch_without_known_samples_has_no_loss():
    """The loss and its gradients are 0, so that the step can be taken all the same."""
    h, s = unit(B, P, seed=1), scale(9.0)
    unknown = torch.full((B,), -1)
    loss = prototypical_loss(h, unit(K, P, seed=2), unit(K, Q, seed=3), unknown, s, 0.1)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, [h, s]):
        assert not gradient.any()


@pytest.mark.parametrize("chunk_elements", [1, 10**6])
@pytest.mark.parametrize(("mask_empty", "right"), [(True, 2 / 3), (False, 1 / 3)])
def test_accuracy_counts_the_nearest_prototype(mask_empty, right, chunk_elements, monkeypatch):
    """Among the rows with a prototype; an empty prototype is only a class if it is not masked."""
    monkeypatch.setattr(prototypical, "CHUNK_ELEMENTS", chunk_elements)
    centroids = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    projections = torch.tensor([[1.0, 0.1], [0.1, -1.0], [1.0, -0.1], [1.0, 1.0]])
    target = target_of(centroids, centroids, 0.0, mask_empty=mask_empty)
    found = target.accuracy(projections, torch.tensor([2, 2, 1, -1]))
    assert found.item() == pytest.approx(right)


@pytest.mark.usefixtures("small_tiles")
def test_the_objective_is_the_weighted_sum():
    """InfoNCE, the sigmoid loss, both modalities and an external teacher, each with its weight."""
    e = Embeddings(
        image_features=unit(B, D, seed=1),
        text_features=unit(B, D, seed=2),
        image_projections=unit(B, P, seed=3),
        text_projections=unit(B, P, seed=4),
        logit_scale=scale(14.0),
        prototype_logit_scale=scale(9.0),
        logit_bias=scale(-6.0),
    )
    temperatures = {"image": 0.2, "text": 0.4, "bert": 0.0}
    pairs = [("image", "text"), ("text", "image"), ("image", "bert"), ("text", "bert")]
    centroids = {
        pair: (unit(K, P, seed=i), unit(K, Q, seed=i + 9).detach()) for i, pair in enumerate(pairs)
    }
    targets = {pair: target_of(*c, temperatures[pair[1]]) for pair, c in centroids.items()}
    assignments = {
        teacher: [(3 * i + n) % K for i in range(B)] for n, teacher in enumerate(temperatures)
    }
    pairs = e.image_features, e.text_features, e.logit_scale
    expected = 0.5 * slow_info_nce(*pairs) + 0.7 * slow_sigmoid(*pairs, e.logit_bias)
    for (student, teacher), (own, other) in centroids.items():
        expected = expected + {"bert": 3.0}.get(teacher, 2.0) / 2 * slow_prototypical(
            getattr(e, f"{student}_projections"),
            own,
            other,
            assignments[teacher],
            e.prototype_logit_scale,
            temperatures[teacher] or None,
            list(range(K)),
        )
    weights = LossWeights(info_nce=0.5, sigmoid=0.7, prototypical=2.0, teachers={"bert": 3.0})
    index = {teacher: torch.tensor(own) for teacher, own in assignments.items()}
    losses, report = objective(e, targets, index, weights=weights)
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    _, brief = objective(e, targets, index, weights=weights, detailed=False)
    assert {name for name in report if "accuracy" not in name} == brief.keys()


def test_a_sample_that_is_drawn_twice_is_no_negative_of_itself():
    """Nor a target of its own relations: equal to the losses among other samples alone."""
    samples = torch.tensor([row % 3 for row in range(B)])
    own = [{j for j in range(B) if j % 3 == i % 3} for i in range(B)]
    e = Embeddings(
        image_features=unit(B, D, seed=1),
        text_features=unit(B, D, seed=2),
        image_projections=None,
        text_projections=None,
        logit_scale=scale(14.0),
        prototype_logit_scale=scale(9.0),
        logit_bias=scale(-6.0),
        distilled={"bert": unit(B, D, seed=3)},
    )
    teacher = unit(B, Q, seed=4).detach()
    weights = LossWeights(sigmoid=1.0, distil={"bert": 1.0})
    losses, _ = objective(e, None, {}, weights=weights, teachers={"bert": teacher}, samples=samples)
    pairs = e.image_features, e.text_features, e.logit_scale
    expected = {
        "info_nce": slow_info_nce(*pairs, own, "masked"),
        "sigmoid": slow_sigmoid(*pairs, e.logit_bias, own, "masked"),
        "distil_bert": slow_relations(e.distilled["bert"], teacher, own),
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-9, atol=1e-9)


def test_two_teachers_in_one_space_teach_pairs_by_their_mean_weight():
    """At a temperature of their own, whatever the model's is; and not a tower that is locked."""
    teachers = {"seen": unit(B, Q, seed=3).detach(), "read": unit(B, Q, seed=4).detach()}
    e = Embeddings(
        image_features=unit(B, D, seed=1),
        text_features=unit(B, D, seed=2),
        image_projections=None,
        text_projections=None,
        logit_scale=scale(14.0),
        prototype_logit_scale=scale(9.0),
        image_outputs=3 * unit(B, D, seed=1),
        text_outputs=2 * unit(B, D, seed=2),
        distilled={"seen": unit(B, D, seed=1), "read": unit(B, D, seed=2)},
    )
    weights = LossWeights(distil={"seen": 1.0, "read": 4.0}, joint=("seen", "read"))
    taught = partial(objective, targets=None, assignments={}, weights=weights, teachers=teachers)
    losses, report = taught(e)
    start = StartFeatures(
        image=teachers["seen"], text=teachers["read"], logit_scale=torch.tensor(20.0)
    )
    expected = keep_relations(e.image_features, e.text_features, start)
    torch.testing.assert_close(losses["distil_pairs"], 2.5 * expected)
    torch.testing.assert_close(report["train/loss/distil/pairs"], expected.detach())
    hotter, _ = taught(replace(e, logit_scale=scale(50.0)))
    assert torch.equal(hotter["distil_pairs"], losses["distil_pairs"])
    locked, _ = taught(replace(e, distilled={"read": e.distilled["read"]}))
    assert locked.keys() == {"info_nce", "distil_read"}


def slow_relations(rows: Tensor, frozen: Tensor, own: list[set[int]]) -> Tensor:
    """KL of each row's softmax over the rows of other samples, at temperature 0.1."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j not in own[i]]
        p = torch.softmax(frozen[others] @ frozen[i] / 0.1, 0)
        q = torch.softmax(rows[others] @ rows[i] / 0.1, 0)
        total = total + (p * (p / q).log()).sum() / len(rows)
    return total
