"""PCA and whitening of teacher features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from protoclip.config import Config
from protoclip.data import sources
from protoclip.encode import teachers
from protoclip.encode.store import StoredFeatures, write_folder
from protoclip.encode.teachers import read_teacher
from protoclip.encode.whiten import Whitening, fit_pca


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


def test_directions_without_variance_are_left_out():
    """Rounding errors would count as much as what the features say."""
    features = torch.from_numpy(correlated(90, 12, rank=3)).float()
    assert Whitening.fit(features, 8)(features).shape == (90, 3)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_teacher_whitens_what_is_looked_up(damaged, tmp_path):
    """By its sound rows: a damaged one is told of when it is met, and moves no other."""
    ids = [f"sample/{row}" for row in range(60)]
    features = correlated(60, 6).astype(np.float16)
    write_folder(tmp_path, ids, [features], {"teacher": "test"})
    sound = np.arange(60) != 7
    if damaged:
        stored = np.load(tmp_path / "features.npy", mmap_mode="r+")
        stored[7] = np.nan
        stored.flush()
    else:
        sound[:] = True
    teacher = read_teacher(tmp_path)
    teacher.whiten(4)
    plain = torch.from_numpy(features.astype(np.float32))
    expected = Whitening.fit(plain[sound], 4)(plain)
    found = teacher.lookup([ids[3], "nobody", ids[40]])
    torch.testing.assert_close(found[[0, 2]], expected[[3, 40]], atol=1e-5, rtol=1e-5)
    assert found[1].isnan().all()
    if damaged:
        with pytest.raises(ValueError, match="'sample/7' differs"):
            teacher.lookup(ids[5:9])


@pytest.mark.parametrize(("width", "equal"), [(3, False), (2, True)])
def test_narrow_or_equal_features_stay_as_they_are(width, equal):
    features = np.ones((5, 3), np.float32) if equal else correlated(5, 3).astype(np.float32)
    teacher = StoredFeatures.in_memory(name="mine", sample_ids=list("abcde"), features=features)
    teacher.whiten(width)
    assert teacher.lookup(["c"]).tolist() == [features[2].tolist()]


@pytest.mark.parametrize(("whiten", "width"), [(0, 6), (4, 4), (5, 5)])
def test_a_run_whitens_its_teachers_as_it_is_told(whiten, width, tmp_path):
    ids = [f"pairs.tsv/{row}" for row in range(60)]
    rows = "".join(f"{row}.jpg\tcaption {row}\n" for row in range(60))
    (tmp_path / "pairs.tsv").write_text("image\tcaption\n" + rows)
    (tmp_path / "t").mkdir()
    write_folder(tmp_path / "t", ids, [correlated(60, 6).astype(np.float16)], {"teacher": "test"})
    teacher = {"features": str(tmp_path / "t"), "whiten": whiten}
    data = {"train": str(tmp_path / "pairs.tsv")}
    config = Config.from_dict({"data": data, "teacher": teacher})
    found = teachers.teachers(config, sources.pairs(config), print)
    teachers.whiten(config, found)
    assert found["teacher"].lookup(ids).shape == (60, width)


def test_few_rows_keep_their_groups():
    """Along 64 directions 40 rows would all be equally far from each other."""
    centres = np.repeat(10 * np.eye(5, 80), 8, axis=0)
    features = centres + np.random.default_rng(0).normal(size=centres.shape)
    ids = [str(row) for row in range(40)]
    teacher = StoredFeatures.in_memory(name="mine", sample_ids=ids, features=features)
    teacher.whiten(64)
    found = teacher.lookup(ids)
    assert found.shape == (40, 5)
    within = (found @ found.T).reshape(5, 8, 5, 8).mean((1, 3)).diagonal()
    assert within.min() > 0.5
