"""The checkpoints of a tiny run, measured by `protoclip analyze`."""

import json
import math
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from interrupting import with_changes
from protoclip.cli import main
from protoclip.results.examples import analyze_run
from protoclip.training.folder import to_toml
from protoclip.training.run import train
from testing import tiny_config, tiny_pairs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with three checkpoints, whose held-out pairs have their captions as classes; and one
    of the last checkpoint, called a CLIP run."""
    folder = tmp_path_factory.mktemp("analyze")
    for name, pairs in {"train": tiny_pairs(seed=1), "held_out": tiny_pairs(80, seed=2)}.items():
        with_classes = pairs.append_column("kind", pairs["caption"])
        pq.write_table(with_classes, folder / f"{name}.parquet")
    config = tiny_config(str(folder / "train.parquet"), out=str(folder / "proto"))
    data = {"validation": str(folder / "held_out.parquet"), "class_column": "kind"}
    often = {"save_steps": 4, "keep_checkpoints": 9}
    config = with_changes(config, {"data": data, "run": often, "episodes": {"count": 3}})
    train(config)
    old = shutil.ignore_patterns("step-000000004", "step-000000008")
    shutil.copytree(folder / "proto", folder / "clip", ignore=old)
    clip = with_changes(config, {"run": {"name": "CLIP"}, "loss": {"prototypical": 0.0}})
    (folder / "clip" / "config.toml").write_text(to_toml(clip))
    return folder


def test_analysis_of_a_run(runs):
    """Every checkpoint is measured, and the run's own prototypes where it has some."""
    found = analyze_run(runs / "proto", device=torch.device("cpu"))
    assert {name: found[name] for name in ("name", "pairs", "groups", "skipped")} == {
        "name": "tiny",
        "pairs": 80,
        "groups": 8,
        "skipped": 0,
    }
    assert [entry["step"] for entry in found["checkpoints"]] == [4, 8, 12]
    assert [entry["samples"] for entry in found["checkpoints"]] == [64, 128, 192]
    for number, entry in enumerate(found["checkpoints"]):
        assert entry.keys() == {"step", "samples", "features", "projections"}
        for values in (entry["features"], entry["projections"]):
            assert all(math.isfinite(value) for value in values.values())
            assert ("stability/image" in values) == (number > 0)
            assert {"classes/image", "alignment", "gap"} <= values.keys()
        own = {name for name in entry["projections"] if name.startswith("prototypes/")}
        assert len(own) == (10 if number > 0 else 0)  # the warm-up has none


def test_the_command_writes_a_file_for_each_run(runs, capsys):
    main(["analyze", str(runs / "proto"), str(runs / "clip"), "--json"])
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [analysis["name"] for analysis in found] == ["tiny", "CLIP"]
    assert json.loads((runs / "clip" / "analysis.json").read_text()) == found[1]
    assert "projections" not in found[1]["checkpoints"][0]  # CLIP's heads are not trained
    assert f"{runs / 'clip'}: a single checkpoint" in shown.err
    assert f"{runs / 'clip'}: only {found[1]['pairs']} pairs" in shown.err
