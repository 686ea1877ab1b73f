"""The harness of `benchmarks/studies`: what it trains, how it judges, and how it compares."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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
