"""The studies of `benchmarks/studies` are settings that can be trained."""

from pathlib import Path

import pytest

from scripts_as_modules import script

FOLDER = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_arms_of_a_study_are_valid_and_differ(path, tmp_path, monkeypatch):
    """On emoji and on photographs."""
    monkeypatch.syspath_prepend(FOLDER)
    with script("benchmarks/studies/study.py") as studies:
        if path == studies.PHOTOGRAPHS:
            return
        study = studies.read_study(path)
        photographs = studies.photographs("a.tsv", root=None, teacher="t", image_teacher="i")
        emoji = studies.Pretraining(name="emoji", settings={}, teacher="t", image_teacher="i")
        for data in (emoji, photographs):
            tasks = [
                studies.Task(study=study, data=data, arm=arm, seed=0, out=tmp_path, transfer=())
                for arm in study.arms.values()
            ]
            folders = {studies.name_folder(task) for task in tasks}  # by the settings of each
            assert len(folders) == len(tasks)
