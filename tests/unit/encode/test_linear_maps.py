"""PCA and whitening, where two frozen spaces agree, and heads that start there."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from sklearn.decomposition import PCA
from torch import nn

from protoclip.encode.linear_maps import (
    SecondMoments,
    Whitening,
    canonical_projections,
    choose_columns,
    fit_joint_space,
    fit_pca,
    moments_of_images,
    out_of_fold,
)
from protoclip.models.projections import start_projections
from testing import run_distributed
from tiny_align import rows_of, tiny_alignment

CPU = torch.device("cpu")


def moments_of_pairs(images: torch.Tensor, texts: torch.Tensor) -> SecondMoments:
    return moments_of_images(images, texts, torch.ones(len(images), dtype=torch.long))


def test_moments_count_an_image_once_however_many_captions_it_has(tmp_path):
    _, rows, _ = rows_of(tiny_alignment(tmp_path))
    found = rows.second_moments(CPU)
    assert found.samples == len(rows) == 96
    image, text, cross, sums = 0.0, 0.0, 0.0, [0.0, 0.0]
    for row in range(96):
        x = rows.image_rows(np.array([row]))[0].double().numpy()
        captions = rows.all_captions(np.array([row]))
        for y in rows.text_rows(captions).double().numpy():
            text += np.outer(y, y) / len(captions)
            cross += np.outer(x, y) / len(captions)
            sums[1] += y / len(captions)
        image += np.outer(x, x)
        sums[0] += x
    expected = [image, text, cross, *sums]
    made = [found.image, found.text, found.cross, found.sum_of_images, found.sum_of_texts]
    for moment, slow in zip(made, expected, strict=True):
        np.testing.assert_allclose(moment, slow, rtol=1e-5, atol=1e-4)


def test_directions_are_those_of_a_generalised_eigenproblem():
    """In which the most correlated directions of both spaces are the eigenvectors of the pencil
    of cross moments and of ridged moments; columns have their correlation as size."""
    draws = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = draws[:, :5], draws[:, 4:]  # one dimension is common to both
    y = y + 3  # what all samples share counts no more than what tells them apart
    sums = {"sum_of_images": x.sum(0), "sum_of_texts": y.sum(0)}
    image, text = canonical_projections(
        SecondMoments(image=x.T @ x, text=y.T @ y, cross=x.T @ y, **sums, samples=50)
    )
    spread = [2 * y.var(0, correction=0).sum(), (x * x).sum() / 50]
    ridged = [
        (z.T @ z).numpy() / 50 + float(size) / 50 * np.eye(5)
        for z, size in ((x, spread[1]), (y, spread[0]))
    ]
    cross, zero = (x.T @ y).numpy() / 50, np.zeros((5, 5))
    values, vectors = scipy.linalg.eigh(
        np.block([[zero, cross], [cross.T, zero]]), scipy.linalg.block_diag(*ridged)
    )
    order = np.argsort(-values)[:5]
    for column, (value, vector) in enumerate(zip(values[order], vectors.T[order], strict=True)):
        for found, expected, moment in (
            (image[:, column].numpy(), vector[:5], ridged[0]),
            (text[:, column].numpy(), vector[5:], ridged[1]),
        ):
            expected = expected / np.sqrt(expected @ moment @ expected) * value
            assert abs(found @ moment @ expected) == pytest.approx(value**2, rel=1e-7)
            assert found @ moment @ found == pytest.approx(value**2, rel=1e-7)


@pytest.mark.parametrize(
    ("samples", "scale", "offset"), [(1, 1.0, 0.0), (90, 0.0, 1.0), (90, 0.1, 3e3)]
)
def test_maps_are_finite_where_features_hardly_differ(samples, scale, offset):
    """One pair, equal images, and a common offset that float32 could not square."""
    draws = torch.randn(samples, 40, generator=torch.Generator().manual_seed(0))
    x, y = (scale * draws + offset * torch.eye(40)[0]).half(), draws[:, :30].half()
    found = moments_of_images(x, y, torch.ones(samples, dtype=torch.long))
    for linear in canonical_projections(found):
        assert linear.float().isfinite().all()
    torch.testing.assert_close(found.image, moments_of_pairs(x, y).image, rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize(
    "made",
    [
        lambda: nn.Parameter(torch.randn(6, 4)),
        lambda: nn.Linear(6, 4),
        lambda: TimmModel("test_resnet", embed_dim=4, proj="linear", proj_bias=True).head,
    ],
    ids=["matrix", "layer", "timm's layer"],
)
def test_a_projection_starts_as_a_linear_map(made):
    torch.manual_seed(0)
    projection, width = made(), 6
    if isinstance(projection, nn.Sequential):
        width = next(m for m in projection.modules() if isinstance(m, nn.Linear)).in_features
    features, linear = torch.randn(10, width), torch.randn(width, 4)
    towers = SimpleNamespace(visual=nn.Module(), text=nn.Module())
    towers.visual.proj, towers.text.proj = projection, nn.Linear(width, 4)
    start_projections(towers, linear, linear)
    with torch.no_grad():
        is_matrix = isinstance(projection, nn.Parameter)
        outputs = features @ projection if is_matrix else projection(features)
    assert torch.allclose(
        F.normalize(outputs, dim=-1), F.normalize(features @ linear, dim=-1), atol=0.02
    )


def heads_of(settings: dict[str, Any], cache: str) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", cache)
        _, _, model = rows_of(settings)
    return {name: value for name, value in model.state_dict().items() if ".head" in name}


def test_ranks_start_as_one_process(tmp_path):
    given = tiny_alignment(tmp_path)
    alone = heads_of(given, str(tmp_path / "cache"))
    ranks = run_distributed(heads_of, 2, given, str(tmp_path / "cache"))
    assert alone
    for name, value in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value, atol=1e-4, rtol=1e-3)


def test_columns_are_chosen_that_find_partners_of_other_folds():
    """Those with what pairs share are chosen, and noise beside is left out."""
    torch.manual_seed(0)
    shared, noise = torch.randn(400, 6), torch.randn(400, 60)
    first, rest = shared @ torch.randn(6, 8), shared @ torch.randn(6, 8)
    images = torch.cat(
        [first + 2 * torch.randn(400, 8), noise, rest + 0.1 * torch.randn(400, 8)], 1
    )
    some, noisy, last = torch.arange(8), torch.arange(68), torch.arange(68, 76)
    counts = torch.full((400,), 2)
    texts = (shared @ torch.randn(6, 10)).repeat_interleave(2, 0) + 0.1 * torch.randn(800, 10)
    texts = torch.cat([texts, torch.randn(800, 90)], 1)
    options = [some, noisy, torch.cat([some, last])], [torch.arange(10), torch.arange(100)]
    (image, text), ranks = choose_columns(images, texts, counts, options)
    assert (image, text) == (2, 0)
    assert ranks[2, 0] < ranks[0, 0] < ranks[1, 0]


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_joint_space_is_judged_by_pairs_that_no_fit_has_seen(is_shared):
    """Its maps are those of all pairs. What pairs do not share is found by chance alone, though
    the pairs of the fit would be found at once."""
    draws = torch.Generator().manual_seed(0)
    seen, read = torch.randn(2, 300, 40, generator=draws)
    if is_shared:
        read = seen @ torch.randn(40, 40, generator=draws)
    maps, rank, number = fit_joint_space(seen, read)
    expected = canonical_projections(moments_of_pairs(seen, read))
    assert all(torch.equal(m, e.float()) for m, e in zip(maps, expected, strict=True))
    assert number == 60
    assert rank < 1.5 if is_shared else rank > 15  # of 60, by chance at 22


def test_heads_that_score_a_pair_have_seen_nothing_of_its_group():
    """Against fits to the pairs of the other folds, one for each fold."""
    draws = torch.Generator().manual_seed(0)
    counts = torch.arange(60) % 3 + 1
    images = torch.randn(60, 7, generator=draws).half()
    captions = torch.randn(int(counts.sum()), 5, generator=draws).half().split(counts.tolist())
    texts = torch.stack([rows[0] for rows in captions])
    groups = torch.arange(60) // 4 * 3  # four pairs each
    groups[:20] = 0  # and one that fills more than a fold
    folds = [*out_of_fold(images, torch.cat(captions), counts, groups, seed=1)]
    assert sorted(torch.cat([rows for rows, _, _ in folds]).tolist()) == [*range(60)]
    for rows, image_map, text_map in folds:
        image = F.normalize(images[rows].float() @ image_map, dim=1)
        text = F.normalize(texts[rows].float() @ text_map, dim=1)
        rest = torch.tensor([row for row in range(60) if row not in rows])
        assert not {*groups[rows].tolist()} & {*groups[rest].tolist()}
        means = torch.stack([captions[row].double().mean(0) for row in rest.tolist()])
        of_all = [y.T @ y / len(y) for y in (captions[row].double() for row in rest.tolist())]
        moments = replace(moments_of_pairs(images[rest], means), text=sum(of_all))
        maps = canonical_projections(moments)
        for made, features, linear in zip((image, text), (images, texts), maps, strict=True):
            expected = F.normalize(features[rows].double() @ linear, dim=1)
            # Directions are known up to their sign, which both spaces share.
            torch.testing.assert_close(made.abs().double(), expected.abs(), atol=1e-4, rtol=1e-3)
        scored, expected = ((image * text).sum(1), sum_of(images, texts, rows, maps))
        torch.testing.assert_close(scored.double(), expected, atol=1e-5, rtol=1e-4)


def sum_of(images, texts, rows, maps):
    """The cosine of each of these pairs under linear maps."""
    led = (
        features[rows].double() @ linear
        for features, linear in zip((images, texts), maps, strict=True)
    )
    return F.cosine_similarity(*led, dim=1)


def correlated(rows: int, width: int, *, rank: int | None = None) -> np.ndarray:
    generator = np.random.default_rng(0)
    free = generator.normal(size=(rows, rank or width))
    return free @ generator.normal(size=(rank or width, width)) + 9


@pytest.mark.parametrize("width", [3, 8])
def test_pca_equals_the_svd_of_centred_rows(width):
    """Block by block, also if one is empty."""
    features = correlated(90, 8)
    mean, axes, kept = fit_pca(iter(np.array_split(features, [0, 3, 40, 41])), width)
    centred = features - features.mean(0)
    _, scale, expected = np.linalg.svd(centred, full_matrices=False)
    ours, theirs = (features - mean) @ axes.T, centred @ expected[:width].T
    np.testing.assert_allclose(ours, theirs * np.sign((ours * theirs).sum(0)), atol=1e-7)
    assert kept == pytest.approx((scale[:width] ** 2).sum() / (scale**2).sum())
    assert (axes[np.arange(width), np.abs(axes).argmax(1)] > 0).all()


def test_whitening_is_scikit_learns_scaled_to_unit_norm():
    features = torch.from_numpy(correlated(500, 12)).float()
    found = Whitening.fit(features, 5)(features)
    white = PCA(5, whiten=True).fit_transform(features.double().numpy())
    expected = F.normalize(torch.from_numpy(white).float())
    # Axes have no sign of their own, so compare how similar rows are.
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-4, rtol=0)
