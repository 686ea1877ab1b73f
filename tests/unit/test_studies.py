"""The harness of `benchmarks/studies`: what it trains, how it judges, and how it compares."""

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

from interrupting import few_emoji
from protoclip.evaluation import datasets

FOLDER = Path(__file__).parents[2] / "benchmarks" / "studies"
sys.path.insert(0, str(FOLDER))

import judge  # noqa: E402
import study as studies  # noqa: E402

TINY = """
question = "Does it run?"
reference = "CLIP"

[[arms]]
name = "CLIP"
loss.prototypical = 0.0

[[arms]]
name = "few"
group = "prototypes"
prototypes.number = 4

[[arms]]
name = "gap"
group = "prototypes"
start = "CLIP"
schedule = 0.5
rotate = true
shift = 2.0
prototypes.number = 4
"""
SIZES = """
episodes = {size = 32, batch_size = 16, count = 4}
model = {embed_dim = 16, image.size = 32, text = {width = 16, layers = 1}, heads.hidden_dim = 32}
"""


def pretraining(settings=None):
    return studies.Pretraining(name="emoji", settings=settings or {}, teacher="emoji")


def task_of(study, arm, out, *, data=None, seed=0, split="validation"):
    return studies.Task(
        study=study,
        data=data or pretraining(),
        arm=study.arms[arm],
        seed=seed,
        out=out,
        transfer=("emoji",),
        split=split,
    )


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace("[[arms]]\n", "[[arms]]" + SIZES))
    return path


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_study_that_is_there_can_be_trained(path, tmp_path):
    """Its arms are valid on both kinds of data, and no two train the same."""
    if path == studies.PHOTOGRAPHS:
        return
    study = studies.read_study(path)
    files = "--teacher f --image-teacher f.parquet --emoji-image-teacher f.parquet"
    given = studies.options(f"{path} --captions pairs.tsv --root images {files}".split())
    for data in studies.pretrainings(given):
        tasks = [task_of(study, name, tmp_path, data=data) for name in study.arms]
        assert len({studies.folder_of(task) for task in tasks}) == len(tasks)
        configs = [studies.config_of(task) for task in tasks]
        for arm, config in zip(study.arms.values(), configs, strict=True):
            assert config.model.image.size in ({160} if arm.align else {None, 64})
        teachers = [each for config in configs for each in config.external_teachers.values()]
        assert not {"own", "own images"} & {teacher.features for teacher in teachers}


def test_folds_share_no_group():
    """What only a group's own rows tell is not learned; what classes have in common is."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(30).repeat_interleave(4)
    labels = (torch.arange(30) % 2).repeat_interleave(4)
    of_group = torch.randn(30, 16, generator=generator)[groups]
    of_class = of_group + 9.0 * F.one_hot(labels, 16)
    alone = judge.by_folds(of_group, labels, groups)
    common = judge.by_folds(of_class, labels, groups)
    for name in ("linear_probe/acc1", "knn/acc1"):
        assert alone[name].float().mean() < 0.7
        assert bool(common[name].all())


def halves(captions, images, folder):
    """The halves for choices and for the test of a table of pairs."""
    ids = [f"tiny/{row}" for row in range(len(captions))]
    columns = {"image": pa.array(images, pa.binary()), "caption": captions, "sample_id": ids}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    data = studies.photographs(str(folder / "pairs.parquet"), root=None, teacher=None)
    study = studies.Study(
        name="a",
        question="",
        reference="CLIP",
        arms={"CLIP": studies.Arm(name="CLIP", group="CLIP", settings={})},
    )
    config = studies.config_of(task_of(study, "CLIP", folder, data=data))
    return [judge.held_out(config, split).splits[split] for split in ("validation", "test")]


def images_of_noise(number):
    draw, images = np.random.default_rng(0), []
    for _ in range(number):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, format="PNG")
        images.append(buffer.getvalue())
    return images


def test_held_out_pairs_are_halved(tmp_path):
    """The halves for choices and for the test share no pair, and training has none of them."""
    parts = halves([f"number {row}" for row in range(60)], images_of_noise(60), tmp_path)
    ids = [{part.images.sample_id(row) for row in range(len(part.images))} for part in parts]
    assert len(ids[0]) + len(ids[1]) == 12
    assert not ids[0] & ids[1]
    assert all(ids)
    for part in parts:
        row_of = {part.images.sample_id(row): row for row in range(len(part.images))}
        assert all(part.captions[row] == (f"number {own[5:]}",) for own, row in row_of.items())


def judged(study, arm, values, *, seed=0, split="validation", spread=0.0):
    influences = spread * np.random.default_rng(seed).standard_normal(100)
    metrics = {judge.ALL: np.concatenate([[values], influences])}
    task = task_of(study, arm, Path(), seed=seed, split=split)
    return studies.Judged(task=task, metrics=metrics, seconds=1.0)


def test_differences_cover_seeds_and_samples(tiny):
    """Of one seed, samples only; of two, both, but for what the seeds show of samples already.

    With two seeds the variance over samples that is left is the product of both influences.
    """
    study = studies.read_study(tiny)
    one = {0: judged(study, "CLIP", 0.1), 1: judged(study, "CLIP", 0.2, seed=1)}
    other = {0: judged(study, "few", 0.4, spread=0.01), 1: judged(study, "few", 0.7, spread=0.02)}
    other[1].metrics[judge.ALL][1:51] *= -0.5
    found = studies.difference({0: other[0]}, one, judge.ALL)
    moved = (other[0].metrics[judge.ALL] - one[0].metrics[judge.ALL])[1:]
    samples = scipy.stats.t.ppf(0.975, len(moved) - 1) * float(np.linalg.norm(moved))
    assert found["mean"] == pytest.approx(0.3)
    assert found["half_width"] == {"seeds": 0.0, "samples": pytest.approx(samples)}
    found = studies.difference(other, one, judge.ALL)
    seeds = 12.706 * 0.1  # Student's t of one degree of freedom, standard error of 0.3 and 0.5
    assert found["mean"] == pytest.approx(0.4)
    assert found["half_width"]["seeds"] == pytest.approx(seeds, rel=1e-3)
    products = moved * other[1].metrics[judge.ALL][1:]
    assert products.sum() > 0
    half = math.hypot(seeds, samples * math.sqrt(products.sum()) / np.linalg.norm(moved))
    assert found["interval"] == pytest.approx([0.4 - half, 0.4 + half], rel=1e-3)
    assert not found["beyond"]
    other[1].metrics[judge.ALL][1:] *= -1
    assert studies.difference(other, one, judge.ALL)["half_width"]["samples"] == 0
    assert studies.difference({0: one[0]}, {1: one[1]}, judge.ALL) is None


def test_the_test_split_is_opened_for_one_list_of_arms(tiny, tmp_path):
    """Each opening counts; after other arms were tried it judges nothing any more."""
    study = studies.read_study(tiny)
    assert studies.open_test(study, [pretraining()], tmp_path) == 1
    assert studies.open_test(study, [pretraining()], tmp_path) == 2
    tiny.write_text(tiny.read_text().replace("prototypes.number = 4", "prototypes.number = 5"))
    with pytest.raises(ValueError, match=r"opened on .* for other arms"):
        studies.open_test(studies.read_study(tiny), [pretraining()], tmp_path)


@pytest.mark.slow
def test_a_study_from_its_file_to_its_tables(tiny, tmp_path, capsys, monkeypatch):
    """Validation for all arms, test for the chosen ones; a second call repeats nothing."""
    monkeypatch.setattr(datasets, "emoji", few_emoji)
    out = tmp_path / "out"
    words = [str(tiny), "--out", str(out), "--jobs", "1", "--test"]
    studies.main(words)
    known = json.loads((out / "tiny-test.json").read_text())
    names = [entry["name"] for entry in known["pretraining"]["emoji"]]
    chosen = known["chosen_on_validation"]
    assert names == [name for name in ("CLIP", "few", "gap") if name in chosen.values()]
    assert known["settings_tried"] == {"CLIP": 1, "prototypes": 2}
    assert known["test_opened"] == 1
    assert set(judge.DECIDING) < set(known["pretraining"]["emoji"][0]["metrics"])
    # A start that is not chosen is not looked at on test.
    tested = {path.parent.parent.name for path in out.glob("runs/*/judged-by-group/test-*")}
    assert len(tested) == 2
    files = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/*") if path.is_file()}
    capsys.readouterr()
    studies.main(words)
    assert "opened 2 time(s)" in capsys.readouterr().out
    assert files == {
        path: path.stat().st_mtime_ns for path in out.glob("runs/**/*") if path.is_file()
    }
