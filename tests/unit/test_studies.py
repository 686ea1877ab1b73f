"""The harness of `benchmarks/studies`: what it trains, how it judges, and how it compares."""

import io
import json
import math
import multiprocessing
import os
import select
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

from interrupting import few_emoji
from protoclip.data.emoji import emoji_table
from protoclip.evaluation import datasets
from protoclip.models import loading
from protoclip.training.plan import make_plan

FOLDER = Path(__file__).parents[2] / "benchmarks" / "studies"
sys.path.insert(0, str(FOLDER))

import joined  # noqa: E402
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


def busy_study(output):
    """A study's pool, with a worker that is busy for a minute and prints there."""
    os.dup2(output, 1)
    pool = studies.workers(1)
    pool.submit(time.sleep, 0).result()
    minute = pool.submit(time.sleep, 60)
    os.write(1, b"busy\n")
    minute.result()


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


def test_some_arms_at_another_size(tiny, tmp_path):
    """As a log's command has them; an arm that another starts from cannot be left out."""
    study = studies.read_study(tiny)
    small = studies.at_size(studies.some_arms(study, ["few", "CLIP"]), 48)
    assert [*small.arms] == ["CLIP", "few"]
    sizes = [
        studies.config_of(task_of(small, arm, tmp_path)).model.image.size for arm in small.arms
    ]
    assert sizes == [48, 48]
    assert studies.some_arms(study, ["few"]).reference == "prototypes"
    for names, message in (
        (["few", "many"], "--arms: tiny has no 'many', but CLIP, few, gap"),
        (["gap"], "--arms: gap: start: name an arm"),
    ):
        with pytest.raises(ValueError, match=message):
            studies.some_arms(study, names)


def test_arms_fine_tune_the_run_that_is_given(tiny, tmp_path):
    """But for those that name another arm; a run that is missing, or that no arm takes, is told."""
    tuned = '[[arms]]\nname = "tuned"\nfinetune = true\n'
    tiny.write_text(f'{tiny.read_text()}{tuned}{tuned.replace("tuned", "after")}start = "CLIP"\n')
    study = studies.read_study(tiny)
    begun = studies.starting_at(study, "runs/other")
    starts = [studies.config_of(task_of(begun, arm, tmp_path)).model.start for arm in begun.arms]
    assert starts == [None, None, None, "runs/other", None]
    with pytest.raises(ValueError, match="--start: name the run that 'tuned' fine-tunes"):
        studies.starting_at(study, None)
    with pytest.raises(ValueError, match="no arm of tiny fine-tunes a run"):
        studies.starting_at(studies.some_arms(study, ["CLIP", "few"]), "runs/other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("reference", "answer"), r"not a study \('reference'\)"),
        (('reference = "CLIP"', 'reference = "other"'), "no group 'other'"),
        (('name = "few"', 'name = "CLIP"'), "two arms are called 'CLIP'"),
        (('start = "CLIP"', 'start = "gap"'), "name an arm that has no start itself"),
        (("prototypes.number = 4", "prototypes.number = 4000"), "few: prototypes.number: 4000"),
        (("prototypes.number", 'teacher.features = "own"\nprototypes.number'), "few: the emoji"),
    ],
)
def test_mistakes_are_refused_in_one_line(tiny, tmp_path, change, message):
    tiny.write_text(tiny.read_text().replace(*change))
    with pytest.raises(ValueError, match=message):  # noqa: PT012
        study = studies.read_study(tiny)
        data = replace(pretraining(), teacher=None)
        for name in study.arms:
            studies.config_of(task_of(study, name, tmp_path, data=data))


@pytest.mark.parametrize("way", ["rotate", "shift", "both"])
def test_a_displaced_start_moves_all_text_features_alike(tiny, tmp_path, way):
    """Distances among texts stay, their mean moves by twice their length, images stay."""
    config = studies.config_of(task_of(studies.read_study(tiny), "CLIP", tmp_path))
    given = {"rotate": way != "shift", "shift": 0.0 if way == "rotate" else 2.0}
    studies.displaced(config, None, tmp_path / "start", **given)
    model = make_plan(config).config.model
    before = loading.model(model, seed=0).eval()
    after, _, tokenizer = loading.load(tmp_path / "start")
    tokens = tokenizer(emoji_table("train")["caption"][:256].to_pylist())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = before.encode_text(tokens), after.encode_text(tokens)
        assert torch.equal(before.encode_image(images), after.encode_image(images))
    apart = [torch.cdist(of.double(), of.double()) for of in (old, new)]
    assert torch.allclose(*apart, atol=1e-4)
    assert (old - new).norm(dim=1).min() > 0.5 * old.norm(dim=1).mean()
    if way == "shift":
        moved = (new - old).mean(0).norm() / old.norm(dim=1).mean()
        assert moved == pytest.approx(2.0, rel=1e-3)


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


def test_the_groups_of_data_sets_stand_side_by_side():
    """Five equal rows a group: the standard error is that of groups. Two sets may share groups."""
    right = torch.arange(100).repeat_interleave(5) % 2 == 0
    names = [f"group {row:02}" for row in range(100) for _ in range(5)]
    one = judge.grouped_means({"knn/acc1": right}, names, "x", ami=0.3)
    two = judge.grouped_means({"knn/acc1": ~right}, names, "x", ami=0.5)
    three = judge.grouped_means({"knn/acc1": right}, names, "y", ami=0.1)
    found = judge.side_by_side({"one": one, "two": two, "three": three})
    values = [found[name]["knn/acc1"] for name in found]
    assert [len(of) for of in values] == [201] * 3
    assert [of[0] for of in values] == [0.5] * 3
    error = math.sqrt(0.25 / 99)
    assert np.linalg.norm(values[0][1:]) == pytest.approx(error)
    assert np.linalg.norm(values[0][1:] + values[1][1:]) == pytest.approx(0.0)
    assert np.linalg.norm(values[0][1:] + values[2][1:]) == pytest.approx(error * math.sqrt(2))


def test_what_has_no_interval_has_no_star(tiny):
    """AMI, and each mean with it; the mean without it has one."""
    metrics = {"knn/acc1": np.array([0.4, 0.01]), "clustering/ami": np.array([0.2, np.nan])}
    recalls = dict.fromkeys(judge.RECALLS, np.array([0.3, 0.01]))
    named = {**recalls, "zero_shot/acc1": np.array([0.5, 0.0])}
    found = judge.deciding({judge.HELD_OUT: named, "x": metrics})
    assert found[judge.WITH_INTERVALS].tolist() == pytest.approx([0.4, 0.02 / 3])
    study = studies.read_study(tiny)
    task = task_of(study, "CLIP", Path())
    zeros = dict.fromkeys(judge.DECIDING, np.zeros(2))
    runs = [{0: studies.Judged(task=task, metrics=of, seconds=1.0)} for of in (found, zeros)]
    gap = studies.difference(*runs, judge.ALL)
    assert (gap["mean"], gap["interval"], gap["beyond"]) == (pytest.approx(0.35), None, False)
    assert studies.cell({"mean": 0.5, "difference": gap}) == "50.0<br>+35.0"


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


def test_the_test_repeats_nothing_of_validation(tmp_path, monkeypatch):
    """Titles and images that repeat over both halves are judged in validation's alone."""
    different = images_of_noise(90)
    titles = [f"Shirt {row // 2 if row < 60 else row}" for row in range(120)]
    images = [different[row if row < 60 else row // 2] for row in range(120)]
    parts = halves(titles, images, tmp_path)
    contents = [
        {*sum(part.captions, ()), *map(part.images.encoded, range(len(part.images)))}
        for part in parts
    ]
    assert all(contents)
    assert not contents[0] & contents[1]
    monkeypatch.setattr(judge, "content_of", lambda *_: set())
    before = halves(titles, images, tmp_path)
    assert before[0].captions == parts[0].captions
    assert len(before[1].captions) > len(parts[1].captions)


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


def test_arms_are_chosen_on_validation(tiny):
    """The best of each group in the mean over seeds; results on test are no ground for a choice."""
    study = studies.read_study(tiny)
    runs = [
        judged(study, arm, value, seed=seed)
        for arm, values in {"CLIP": (0.1, 0.1), "few": (0.2, 0.3), "gap": (0.4, 0.0)}.items()
        for seed, value in enumerate(values)
    ]
    assert studies.winners(study, runs) == {"CLIP": "CLIP", "prototypes": "few"}
    with pytest.raises(AssertionError, match="validation"):
        studies.winners(study, [judged(study, "few", 0.1, split="test")])


def test_the_test_split_is_opened_for_one_list_of_arms(tiny, tmp_path):
    """Each opening counts; after other arms were tried it judges nothing any more."""
    study = studies.read_study(tiny)
    assert studies.open_test(study, [pretraining()], tmp_path) == 1
    assert studies.open_test(study, [pretraining()], tmp_path) == 2
    tiny.write_text(tiny.read_text().replace("prototypes.number = 4", "prototypes.number = 5"))
    with pytest.raises(ValueError, match=r"opened on .* for other arms"):
        studies.open_test(studies.read_study(tiny), [pretraining()], tmp_path)


def test_the_wall_clock_at_which_a_quality_is_reached_lies_between_schedules(tiny):
    study = studies.read_study(tiny)

    def entry(name, value, time):
        return {"name": name, "time": time, "metrics": {judge.ALL: {"mean": value}}}

    found = [entry("CLIP", 0.5, 1.0), entry("few", 0.6, 1.0), entry("gap", 0.4, 0.5)]
    lines = studies.reached(study, found, {"CLIP": "CLIP", "prototypes": "few"})
    assert f"- prototypes reaches CLIP's {judge.ALL} at: 0.75" in lines


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


def part(gains: dict[str, float], half: float | None) -> dict[str, Any]:
    """A file of one metric: CLIP at 0.5 with each seed, and an arm that gains so much."""
    clip = {"by_seed": dict.fromkeys(gains, 0.5)}
    arm = {"by_seed": {seed: 0.5 + gain for seed, gain in gains.items()}}
    ends = None if half is None else [0.0, 1.0]
    arm["difference"] = {"interval": ends, "half_width": {"seeds": 0.0, "samples": half}}
    arms = [
        {"name": name, "settings": {}, "metrics": {"kNN": metric}}
        for name, metric in (("arm", arm), ("CLIP", clip))
    ]
    return {"split": "validation", "transfer": ["emoji"], "pretraining": {"pairs": arms}}


def test_parts_of_a_study_are_joined_by_seed():
    """Over all seeds, and over samples by the widest part; what parts share must be equal."""
    first, second = part({"0": 0.01}, 0.003), part({"1": 0.03, "2": 0.02}, 0.001)
    gain = joined.joined([first, second, part({"0": 0.01}, 0.002)])["arm"]["kNN"]
    assert gain["mean"] == pytest.approx(0.52)
    assert gain["difference"]["mean"] == pytest.approx(0.02)
    half = np.hypot(scipy.stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3), 0.003)
    assert gain["difference"]["interval"] == pytest.approx([0.02 - half, 0.02 + half])
    without = joined.joined([first, part({"1": 0.03}, None)])["arm"]["kNN"]["difference"]
    assert without["interval"] is None
    with pytest.raises(ValueError, match=r"seed 0: 0\.51 and 0\.52"):
        joined.joined([first, part({"0": 0.02}, 0.001)])
    alone = part({"3": 0.06}, None)
    alone["pretraining"]["pairs"] = [
        {"name": "arm", "settings": {}, "metrics": {"kNN": {"by_seed": {"3": 0.56}}}}
    ]
    others = part({"0": 0.01}, 0.003)
    others["pretraining"]["pairs"][1]["metrics"]["kNN"]["by_seed"]["3"] = 0.5
    gain = joined.joined([others, alone])["arm"]["kNN"]["difference"]
    assert gain["by_seed"] == pytest.approx({"0": 0.01, "3": 0.06})
    other = part({"1": 0.02}, 0.001)
    other["pretraining"]["pairs"][0]["settings"] = {"loss": {"prototypical": 0.0}}
    with pytest.raises(ValueError, match="arm: has other settings"):
        joined.joined([first, other])


@pytest.mark.slow
def test_workers_end_with_a_killed_study():
    ours, theirs = os.pipe()
    parent = multiprocessing.get_context("fork").Process(target=busy_study, args=(theirs,))
    parent.start()
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        assert pipe.readline() == "busy\n"
        parent.kill()
        # The pipe ends when no process holds it any more.
        assert select.select([pipe], [], [], 20)[0]
        assert pipe.read() == ""
    parent.join()
