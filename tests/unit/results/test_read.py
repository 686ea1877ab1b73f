"""What is read from run folders, whole or not."""

import json

import numpy as np

from protoclip.results.read import read_run, read_runs
from protoclip.training.folder import to_toml
from testing import tiny_config


def begun(folder, **settings):
    """A run folder as it is right after its start."""
    folder.mkdir()
    text = to_toml(tiny_config(out=str(folder)))
    for old, new in settings.items():
        text = text.replace(f"{old} = ", f"{old} = {new} # ", 1)
    (folder / "config.toml").write_text(text)
    return folder


def test_curves_are_the_finite_values_of_whole_lines(tmp_path):
    """A repeated step counts once, with its last value; the last line may be cut."""
    folder = begun(tmp_path / "run")
    values = [(1, 3.0), (2, None), (3, 1.0), (3, 2.0)]
    written = [json.dumps({"step": step, "episode": 0, "train/a": value}) for step, value in values]
    (folder / "metrics.jsonl").write_text("\n".join([*written, '{"step": 6, "train/a"']))
    run = read_run(folder)
    steps, found = run.curves["train/a"]
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(found, [3, 2])
    assert run.last_step == 3


def test_labels_tell_runs_apart(tmp_path):
    one, two, three, four = (tmp_path / name for name in "abcd")
    begun(one)
    begun(two, seed=1)
    begun(three, seed=1)
    begun(four, name='"other"')
    found = read_runs([one, two, three, four])
    assert [run.label for run in found] == [
        f"tiny ({one})",
        f"tiny ({two})",
        f"tiny ({three})",
        "other",
    ]
    found = read_runs([one, two, four, one])
    assert [run.label for run in found] == ["tiny, seed 0", "tiny, seed 1", "other"]
