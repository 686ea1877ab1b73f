"""The studies of `benchmarks/studies` can be trained."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "studies"
sys.path.insert(0, str(FOLDER))

import study as studies  # noqa: E402


def task_of(study, arm, out, *, data):
    return studies.Task(
        study=study,
        data=data,
        arm=study.arms[arm],
        seed=0,
        out=out,
        transfer=("emoji",),
        split="validation",
    )


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
